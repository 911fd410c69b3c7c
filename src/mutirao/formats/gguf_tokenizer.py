"""A GGUF file's tokenizer as Hugging Face's tokenizer.json and tokenizer_config.json.

Byte-level vocabularies ('gpt2') bring their merges along. SentencePiece ones ('llama') bring
scores, from which merges are made as transformers makes them; those of Gemma are in the order
of the tokens. Where a choice is llama.cpp's (src/llama-vocab.cpp), a comment says so. Word
pieces, T5's and RWKV's vocabularies are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from mutirao.errors import FormatError
from mutirao.formats.pre_tokenizers import BYTE_LEVEL, find_pre_tokenizer

SPACE = "▁"
"""What SentencePiece writes for a space, U+2581."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens (``tokenizer.ggml.token_type``)."""

END_NAMES = frozenset(
    (
        "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
        "<|end|>", "<end_of_turn>", "</s>", "<eos>", "<EOT>",
    )
)  # fmt: skip
"""Control tokens that end a generation whatever the file says, as in llama.cpp: many files
name the end of a turn or the end of a document, and leave the other out."""

_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # the specification's spelling
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
"""What llama.cpp takes where a SentencePiece file does not say."""


def convert_gguf_tokenizer(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what tokenizer.json and tokenizer_config.json hold.

    Args:
        metadata: a GGUF file's, with its arrays.

    Raises:
        FormatError: there is no tokenizer, it is of a kind that is not supported, or its
            parts do not fit together.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise FormatError(
            f"tokenizer.ggml.model={model!r} is not supported (expected 'gpt2' or 'llama')"
        )
    vocabulary = _Vocabulary(metadata, _SENTENCEPIECE_IDS if model == "llama" else {})
    convert = _byte_level if model == "gpt2" else _sentencepiece
    tokenizer, adds_bos = convert(metadata, vocabulary)
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    bos_id = vocabulary.ids.get("bos_token_id")
    if adds_bos and bos_id is None:
        raise FormatError(
            "the tokenizer is damaged: text is to begin with a token (tokenizer.ggml."
            "add_bos_token) that the file does not name; convert the model again"
        )
    bos = vocabulary.tokens[bos_id] if adds_bos and bos_id is not None else None
    tokenizer["post_processor"] = None if bos is None else begin_with(bos, int(bos_id or 0))
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocabulary.names(),
        "add_bos_token": adds_bos,
        "bos_token_id": bos_id,
        "eos_token_ids": vocabulary.ends(),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def begin_with(token: str, token_id: int) -> dict[str, Any]:
    """Return tokenizer.json's post-processor that puts a token before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, sequences[0]],
        "pair": [first, *sequences],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


class _Vocabulary:
    """Tokens, their types and the ids with a role, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any], roles: Mapping[str, int]) -> None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not _is_list(tokens) or not all(isinstance(token, str) for token in tokens):
            raise FormatError(
                "the file holds no vocabulary (tokenizer.ggml.tokens); convert the model again"
            )
        self.tokens: list[str] = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        self.check_unique()
        types = metadata.get("tokenizer.ggml.token_type")
        self.types = [int(kind) for kind in types] if _is_list(types) else [NORMAL] * len(tokens)
        if len(self.types) != len(self.tokens):
            raise FormatError(
                f"the tokenizer is damaged: {len(self.tokens)} tokens came with "
                f"{len(self.types)} types; convert the model again"
            )
        self.ids = {
            role: self._checked(role, metadata.get(f"tokenizer.ggml.{role}", roles.get(role)))
            for role in (*_NAMED.values(), *_ENDS)
            if metadata.get(f"tokenizer.ggml.{role}", roles.get(role)) is not None
        }
        for token_id in self.ids.values():
            if self.types[token_id] == NORMAL and self.tokens[token_id] in END_NAMES:
                self.types[token_id] = CONTROL  # some converters forget it

    def _checked(self, role: str, token_id: Any) -> int:
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise FormatError(
                f"the tokenizer is damaged: tokenizer.ggml.{role}={token_id!r} is no token "
                f"(expected 0 to {len(self.tokens) - 1}); convert the model again"
            )
        return token_id

    def check_unique(self) -> None:
        if len(set(self.tokens)) < len(self.tokens):
            raise FormatError(
                "the tokenizer is damaged: two of its tokens are the same; convert the model again"
            )

    def names(self) -> dict[str, str]:
        return {
            name: self.tokens[self.ids[role]] for name, role in _NAMED.items() if role in self.ids
        }

    def ends(self) -> list[int]:
        """Return every token that ends a generation, sorted."""
        named = {self.ids[role] for role in _ENDS if role in self.ids}
        known = {
            index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == CONTROL and token in END_NAMES
        }
        return sorted(named | known)

    def added(self) -> list[dict[str, Any]]:
        """Return tokenizer.json's entries of tokens that are found in text as a whole."""
        return [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def by_token(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary
) -> tuple[dict[str, Any], bool]:
    way = find_pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    merges = metadata.get("tokenizer.ggml.merges")
    if not _is_list(merges) or not all(isinstance(m, str) and " " in m[1:] for m in merges):
        raise FormatError(
            "the tokenizer is damaged: it has no list of merges, two tokens each "
            "(tokenizer.ggml.merges); convert the model again"
        )
    # The first character belongs to the left token, even where it is a space.
    pairs = [[m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]] for m in merges]
    model = _model(vocabulary, pairs, ignore_merges=way.ignore_merges)
    tokenizer = {
        **_frame(vocabulary),
        "normalizer": way.normalizer(),
        "pre_tokenizer": way.pre_tokenizer(),
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    return tokenizer, way.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary
) -> tuple[dict[str, Any], bool]:
    is_gemma = str(metadata.get("general.architecture")).startswith("gemma")
    if is_gemma:
        # Runs of spaces are written as spaces, though merges make them of U+2581.
        for index, token in enumerate(vocabulary.tokens):
            if token and not token.strip(" "):
                vocabulary.tokens[index] = SPACE * len(token)
                vocabulary.types[index] = NORMAL
        vocabulary.check_unique()
        scores: Sequence[float] = [-float(index) for index in range(len(vocabulary.tokens))]
    else:
        scores = metadata.get("tokenizer.ggml.scores", ())
        if not _is_list(scores) or len(scores) != len(vocabulary.tokens):
            raise FormatError(
                "the tokenizer is damaged: its tokens have no scores (tokenizer.ggml.scores); "
                "convert the model again"
            )
    # A space goes before each text, after a special token too, as in llama.cpp.
    prepends = bool(metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    shown = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps = [{"type": "Prepend", "prepend": SPACE}, spaces] if prepends else [spaces]
    decoders = [shown, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prepends:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown_id = vocabulary.ids.get("unknown_token_id")
    model = _model(
        vocabulary,
        [list(pair) for pair in merges_from_scores(vocabulary.tokens, vocabulary.types, scores)],
        unk_token=None if unknown_id is None else vocabulary.tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = {
        **_frame(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return tokenizer, True


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's scores stand for, the first to be done first.

    Every way to make a token of two others is a merge with the token's score. The best score
    goes first; of equal ones the longer left part, then the longer right one, as transformers
    has it (SentencePiece itself takes the leftmost place in the text).

    Args:
        tokens: all tokens by id.
        types: their types; those that no text becomes are left out.
        scores: of each token, higher is better.
    """
    mergeable = {
        token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED)
    }
    found = [
        (scores[index], len(left), len(right), -mergeable[left], -mergeable[right], left, right)
        for token, index in mergeable.items()
        for left, right in _halves(token, mergeable)
    ]
    found.sort(reverse=True)
    return [(left, right) for *_, left, right in found]


def _halves(token: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in tokens and right in tokens:
            yield left, right


def _model(vocabulary: _Vocabulary, merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": vocabulary.by_token(),
        "merges": merges,
    }


def _frame(vocabulary: _Vocabulary) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
    }


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Say whether a metadata value is an array, a list or one of numpy's."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))
