"""How byte-level vocabularies cut text into words, by the name a GGUF file gives the way.

The names are llama.cpp's (``tokenizer.ggml.pre``; src/llama-vocab.cpp says which names share
a way); the patterns are those of the models' own tokenizer.json. Ways that only models of
architectures that are not supported use are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mutirao.errors import FormatError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_SEED_CODER = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting; what it cuts, the next pattern cuts further."""

    patterns: tuple[str, ...]
    normalizes: bool = False
    """Text is composed first (Unicode's NFC)."""
    ignore_merges: bool = False
    """A word that is a token stays one, whatever the merges say."""
    adds_bos: bool = False
    """Text begins with a begin-of-text token where the file does not say."""

    def normalizer(self) -> dict[str, Any] | None:
        """Return tokenizer.json's entry."""
        return {"type": "NFC"} if self.normalizes else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """Return tokenizer.json's entry."""
        steps: list[dict[str, Any]] = [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            for pattern in self.patterns
        ]
        return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}

_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_LIKE_LLAMA3 = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    # llama.cpp does not compose, but the tokenizer that Qwen2 was trained with does.
    "qwen2": PreTokenizer((_QWEN2,), normalizes=True),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez", "stablelm2"), PreTokenizer((_QWEN2,))),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "midm-2.0", "pixtral"), _LIKE_LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(
        ("gpt-2", "mpt", "olmo", "phi-2", "gigachat", "mellum", "trillion"), _PLAIN_GPT2
    ),
    **dict.fromkeys(
        ("smollm", "refact", "starcoder", "codeshell", "command-r", "exaone", "minerva-7b"),
        _DIGITS_THEN_GPT2,
    ),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer((_GPT4O,))),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
    ),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def find_pre_tokenizer(name: str | None) -> PreTokenizer:
    """Return the way of cutting text that a GGUF file names.

    Raises:
        FormatError: it names none, or one that is not known.
    """
    if name is None:
        raise FormatError(
            "the file does not say how text is cut into words (it has no tokenizer.ggml.pre, as "
            "old files have not); convert the model again"
        )
    if name not in PRE_TOKENIZERS:
        raise FormatError(
            f"tokenizer.ggml.pre={name!r} is not supported (expected one of "
            f"{', '.join(sorted(PRE_TOKENIZERS))})"
        )
    return PRE_TOKENIZERS[name]
