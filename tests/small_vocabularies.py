"""Small vocabularies for tests, trained on a few sentences, as GGUF metadata describe them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SENTENCES = (
    "The patient was admitted with fever and a persistent cough; it's 39.5 degrees, isn't it?",
    "O paciente foi internado com febre às 14h35; a tosse era persistente. Não há ação!",
    "def f(x):\n    return x ** 2  # 1234567 + 890\n\n\nfor i in range(10):\n\tprint(f(i))\n",
    "   Spaces   in   rows, e\u0301 decomposed, 日本語 and 😀😀 👩🏽\u200d⚕️ DON'T SHOUT! <b>t</b>",
) * 3

EDGES = (
    "", " ", "  ", "\n", "a", " a", "a ", "\n\n\n", "\r\n", "\t\tx", "x\x00y", "\ufeff", "\ufffd",
    "e\u0301", "ã", "ＡＢ", "½²٣", "0", "12345", "1 2 3", "it's IT'S it'LL 'd", "a\u00a0b\u3000c",
    "😀", "👨\u200d👩\u200d👧", "🇧🇷", "日本語のテキスト", "हिन्दी", "عربى", "<|im_end|>",
    "<tool>x</s>", "a<|im_end|> b", "x" * 300, " " * 70, "ab" * 200, "\u2028", "▁", "a▁b",
    "fever and fever", *SENTENCES[:4],
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@cache
def _trained() -> tuple[list[str], list[str]]:
    """Return the tokens and merges of a byte-level vocabulary of 500."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def byte_level(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level vocabulary; ``changes`` replace some of them.

    No merge makes 'fevers'; it comes only where a word may be a token before any merge.
    """
    tokens, merges = _trained()
    types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3) + [NORMAL, USER_DEFINED]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "fevers", "<tool>"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@cache
def _trained_pieces() -> list[str]:
    """Return the pieces of a vocabulary spelled in characters, in the order of its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:3], trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    return sorted(vocab, key=lambda token: (len(token) == 1, vocab[token]))


def sentencepiece(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return the metadata of a SentencePiece vocabulary with a token for each byte."""
    pieces = _trained_pieces()
    is_gemma = architecture.startswith("gemma")
    control = ["<unk>", "<s>", "</s>", "<tool>"]
    runs = ["  ", "   ", "    ", "\n\n", "\n\n\n"] if is_gemma else []
    pieces = [piece for piece in pieces if piece.replace("▁", " ") not in runs]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED]
    types += [BYTE] * 256 + [USER_DEFINED] * len(runs) + [NORMAL] * len(pieces)
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": not is_gemma,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """Write a GGUF file with these metadata and one tensor."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
