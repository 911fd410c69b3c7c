"""A Hugging Face tokenizer as the metadata of a GGUF file.

Byte-level vocabularies become 'gpt2' with their merges and the name of the way in which text is
cut into words, found by cutting a text with each way that has a name (``pre_tokenizers``).
Vocabularies with byte fallback become 'llama' (SentencePiece), which has scores instead of
merges: the earlier a merge is done, the higher the score of what it makes.

GGUF cannot say that spaces beside an added token are swallowed (``lstrip``, ``rstrip``), nor
more of a post-processor than whether a text begins and ends with its token; Unigram, word pieces
and merges with prefixes are refused. ``gguf_tokenizer`` reads back what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mutirao.errors import FormatError
from mutirao.formats.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from mutirao.formats.pre_tokenizers import PRE_TOKENIZERS

PROBE = (
    "it's IT'S we'll WE'LL don't DON'T I'm fooBar FOOBar Foo'd x'VE 1 12 123 1234 12345 v2.0 3½² "
    "٣ a1b22c333 $5+6=11^2~|<a>`  two   three    four\ttab\t\ttabs\nline\n\nlines\r\n\r\nend \n "
    "x\n  y !? ... (a) [b] {c} #d @e a/b//\n/* c */\n+++\n--- «à côté» São Paulo naïve e\u0301 ﬁ "
    "ＡＢ Ω≈ç 日本語テキスト、漢字。 한국어 हिन्दी العربية ไทย 😀😀 "
    "👩🏽\u200d⚕️ \u00a0nbsp\u3000wide\u2028 _x_ 'quoted' \"q\" \ufeff ' s ' ' t 1st 2nd  \n"
)
"""A text that any two of the ways in ``PRE_TOKENIZERS`` cut in different places (a test says)."""

_ROLES = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
    "sep_token_id": "seperator_token_id",  # the specification's spelling
    "cls_token_id": "cls_token_id",
    "mask_token_id": "mask_token_id",
}
_LOWEST_SCORE = -1e9
"""Of tokens that no merge makes."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """Open a directory's tokenizer.json.

    Raises:
        FormatError: missing, damaged, or of a kind that the tokenizers library lacks.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FormatError(
            f"{folder} has no tokenizer.json (transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise FormatError(f"{path} cannot be read: {error}") from None


def vocabulary_metadata(folder: Path, vocab_size: int, ends: tuple[int, ...]) -> dict[str, Any]:
    """Return the metadata of a directory's tokenizer, chat template included.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.
        vocab_size: rows of the embedding; ids without a token are filled with unused ones.
        ends: tokens that end a generation, as the model's own configuration has them.

    Raises:
        FormatError: of a kind that GGUF cannot express, damaged, or with more tokens than the
            embedding has rows.
    """
    tokenizer = read_tokenizer(folder)
    document = json.loads(tokenizer.to_str())
    named = _named_tokens(folder)
    kind, model = _kind(document), document["model"]
    tokens, types = _tokens(document, vocab_size, is_byte_level=kind == "gpt2")
    values: dict[str, Any] = {"model": kind, "tokens": tokens, "token_type": types}
    if kind == "gpt2":
        values["pre"] = find_name(document)
        values["merges"] = [" ".join(pair) for pair in _pairs(model)]
    else:
        values["pre"] = "default"
        values["scores"] = _scores(tokens, types, _pairs(model))
        begins = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        values["add_space_prefix"] = bool(begins and begins[0].startswith(SPACE))
    values |= _roles(named, ends, vocab_size)
    values |= _ends_of_text(tokenizer, values)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = named.get("chat_template")
    return metadata | ({"tokenizer.chat_template": template} if template else {})


def find_name(document: Mapping[str, Any]) -> str:
    """Return the name of the way in which a tokenizer.json cuts text into words.

    Raises:
        FormatError: no way that has a name cuts, composes and merges as this one does.
    """
    ignores_merges = bool(document["model"].get("ignore_merges"))
    normalizer = document.get("normalizer")
    cuts = _cuts(document.get("pre_tokenizer"))
    for name, way in PRE_TOKENIZERS.items():
        if (way.normalizer(), way.ignore_merges) == (normalizer, ignores_merges) and (
            _cuts(way.pre_tokenizer()) == cuts
        ):
            return name
    raise FormatError(
        "the way in which the tokenizer cuts text into words has no name in GGUF files "
        f"(pre_tokenizer {json.dumps(document.get('pre_tokenizer'))[:300]}, normalizer "
        f"{json.dumps(normalizer)[:100]}, ignore_merges {json.dumps(ignores_merges)}); export "
        "with --format huggingface"
    )


def _cuts(pre_tokenizer: Any) -> list[tuple[str, tuple[int, int]]] | None:
    """Return the words of ``PROBE``; None where the whole text is one."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    opened = Tokenizer.from_str(
        json.dumps({"version": "1.0", "pre_tokenizer": pre_tokenizer, "model": empty})
    ).pre_tokenizer
    return None if opened is None else list(opened.pre_tokenize_str(PROBE))


def _kind(document: Mapping[str, Any]) -> str:
    """Return 'gpt2' or 'llama', llama.cpp's names of the two kinds of vocabularies."""
    model, decoder = document["model"], document.get("decoder") or {}
    steps = [step.get("type") for step in decoder.get("decoders", [decoder])]
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] == "BPE" and not any(model.get(name) for name in unusual):
        if "ByteLevel" in steps:
            return "gpt2"
        if model.get("byte_fallback"):
            return "llama"
    raise FormatError(
        f"a tokenizer of type {model['type']} with decoder {' + '.join(map(str, steps))} cannot "
        "be written as GGUF (expected byte-level BPE, or BPE with byte fallback)"
    )


def _tokens(
    document: Mapping[str, Any], vocab_size: int, *, is_byte_level: bool
) -> tuple[list[str], list[int]]:
    """Return tokens and their types by id; an id without a token becomes an unused one."""
    model = document["model"]
    by_id = {int(index): token for token, index in model["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    if not is_byte_level:
        for byte in range(256):
            types |= {model["vocab"].get(f"<0x{byte:02X}>", -1): BYTE}
    for entry in document.get("added_tokens") or ():
        by_id[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    if not is_byte_level and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    if by_id and max(by_id) >= vocab_size:
        raise FormatError(
            f"the tokenizer has a token of id {max(by_id)}, and the embedding only {vocab_size} "
            "rows; resize the model's embedding or mend its tokenizer"
        )
    return (
        [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        [types.get(index, UNUSED) for index in range(vocab_size)],
    )


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = (each.split(" ", 1) if isinstance(each, str) else each for each in model["merges"])
    return [(left, right) for left, right in split]


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Return what stands for the order of merges: minus the rank of a token's first merge."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [
        -float(ranks[token]) if token in ranks else _LOWEST_SCORE if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _named_tokens(folder: Path) -> dict[str, Any]:
    """Return ids of tokens with a role, and the chat template, as transformers finds them."""
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the tokenizer of {folder} cannot be read: {error}") from None
    template = opened.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {name: getattr(opened, name, None) for name in _ROLES} | {"chat_template": template}


def _roles(named: Mapping[str, Any], ends: tuple[int, ...], vocab_size: int) -> dict[str, int]:
    """Return ids by role; a second end of the model's is its end of turn."""
    roles = {
        theirs: int(named[ours])
        for ours, theirs in _ROLES.items()
        if named[ours] is not None and 0 <= named[ours] < vocab_size
    }
    kept = [end for end in ends if 0 <= end < vocab_size]
    if kept:
        roles.setdefault("eos_token_id", kept[0])
        others = [end for end in kept if end != roles["eos_token_id"]]
        roles |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    return roles


def _ends_of_text(tokenizer: Tokenizer, values: Mapping[str, Any]) -> dict[str, bool]:
    """Say whether text begins and ends with a token.

    Raises:
        FormatError: it is put between other tokens than those.
    """
    bare, dressed = (
        tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
    adds_bos = dressed[:1] != bare[:1]
    adds_eos = len(dressed) > len(bare) + adds_bos
    first = [values.get("bos_token_id")] if adds_bos else []
    last = [values.get("eos_token_id")] if adds_eos else []
    if [*first, *bare, *last] != dressed:
        raise FormatError(
            f"the tokenizer puts text between tokens ({dressed[:8]}) other than its begin-of-text "
            "and end-of-text tokens, which GGUF cannot say; export with --format huggingface"
        )
    return {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
