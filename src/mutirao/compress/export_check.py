"""Is an exported model the model it was made from? Logits and tokens, compared before it counts.

Logits of the source, in float32 with its weights as they are stored, stand against those of the
export as another program reads it, on some windows of plain text. How far they may be apart
depends on what was done to the weights (``TOLERANCES``). Of a GGUF file, the tokenizer is read
back too, and must cut and number texts, and words of its own vocabulary, as the source's does.

``read_logits`` reads a GGUF file with transformers, which knows neither RoPE scaling, nor biases
of the llama architecture, nor windows; the engine does (``mutirao.inference.read_back``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mutirao.config import Config
from mutirao.errors import ArtifactError, FormatError
from mutirao.formats.compressed_tensors import is_packed, load_packed
from mutirao.formats.gguf import load_gguf
from mutirao.formats.gguf_header import read_gguf_header
from mutirao.formats.gguf_plan import Change
from mutirao.formats.gguf_tokenizer import convert_gguf_tokenizer
from mutirao.formats.gguf_vocabulary import PROBE, read_tokenizer
from mutirao.formats.huggingface import load_causal_lm

Windows = Sequence[Sequence[int]]
Logits = list[NDArray[np.float32]]
ReadLogits = Callable[[Path, Windows], Logits]
"""Returns (tokens, vocabulary) of each window, by the model in a file or folder."""

TOLERANCES = {
    Change.KEPT: 1e-5,
    Change.CODES: 1e-3,
    Change.ROUNDED_16: 1e-3,
    Change.ROUNDED_8: 0.05,
    Change.ROUNDED_4: 0.8,
}
"""Largest accepted mean KL divergence, in nats per token, by what was done to the weights. Where
nothing was, only float32 sums differ. SmolLM2-135M-Instruct (2026-11-27) has 1e-11 kept, 2e-6
with its 4-bit codes, 0.0014 in Q8_0, 0.44 in Q4_0; with the rows of queries and keys in disorder
1.03, so that at 4 bits a small model's loss is not far from an error's."""

NUM_WINDOWS = 4
WINDOW_TOKENS = 48
NUM_WORDS = 2000
"""Tokens of the vocabulary that are encoded again, evenly spaced."""

TEXT = """\
The house stands at the end of the road. On Saturday forty neighbours came with ladders, boards and
food, and by the evening it had a roof. Nobody was paid; next month it is somebody else's turn.

A casa fica no fim da estrada. No sábado vieram quarenta vizinhos com escadas, tábuas e comida, e à
noite ela já tinha telhado. Ninguém recebeu nada; no mês que vem é a vez de outro.

Question: A tank holds 1,250 litres and loses 3.5 % each day. How much is left after 2 days?
Answer: 1250 * (1 - 0.035) ** 2 = 1164.03 litres.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Dr. Lima wrote: "The patient, aged 67, had a fever of 39.2 degrees; the cough began on 14/03."
"""
"""Sentences of several kinds, written for this."""


class Parity(Config):
    """How close an export is to its source."""

    num_tokens: int
    """Positions compared."""
    max_logit_difference: float
    """Largest difference of any logit."""
    mean_kl_nats: float
    """Mean Kullback-Leibler divergence of the export from the source, nats per token."""
    same_top_share: float
    """Share of positions at which both find the same token likeliest."""
    tolerance_kl_nats: float
    """What ``mean_kl_nats`` was held against."""


def text_windows(tokenizer: Tokenizer, context_tokens: int, text: str = TEXT) -> list[list[int]]:
    """Return tokens of a text in windows that fit a context, at most ``NUM_WINDOWS``."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    length = max(1, min(WINDOW_TOKENS, context_tokens))
    begins = range(0, len(ids), length)
    return [ids[begin : begin + length] for begin in begins][:NUM_WINDOWS]


def directory_logits(path: Path, windows: Windows) -> Logits:
    """Return the logits of a Hugging Face directory, plain or compressed, in float32."""
    load = load_packed if is_packed(path) else load_causal_lm
    model, _ = load(path, dtype="float32")
    return _run(model, windows)


def gguf_logits(path: Path, windows: Windows) -> Logits:
    """Return the logits of a GGUF file as transformers reads it, in float32."""
    model, _ = load_gguf(path, dtype="float32")
    return _run(model, windows)


def compare(expected: Logits, got: Logits, tolerance_kl_nats: float) -> Parity:
    """Compare logits of the source with those of an export.

    Raises:
        ArtifactError: their shapes differ.
    """
    differences, divergences, same = [], [], []
    for source, export in zip(expected, got, strict=True):
        if source.shape != export.shape:
            raise ArtifactError(
                f"the export has logits of shape {export.shape} (expected {source.shape})"
            )
        first, second = (torch.from_numpy(np.array(each)).double() for each in (source, export))
        logprobs, others = first.log_softmax(1), second.log_softmax(1)
        differences.append((first - second).abs().max(1).values)
        divergences.append((logprobs.exp() * (logprobs - others)).sum(1))
        same.append(first.argmax(1) == second.argmax(1))
    divergence = torch.cat(divergences)
    return Parity(
        num_tokens=len(divergence),
        max_logit_difference=float(torch.cat(differences).max()),
        mean_kl_nats=float(divergence.mean()),
        same_top_share=float(torch.cat(same).double().mean()),
        tolerance_kl_nats=tolerance_kl_nats,
    )


def refuse_beyond_tolerance(parity: Parity) -> None:
    """Raise where an export is further from its source than is accepted.

    Raises:
        ArtifactError: it is, or its logits are not finite.
    """
    if parity.mean_kl_nats <= parity.tolerance_kl_nats:  # False for NaN too
        return
    raise ArtifactError(
        f"the export does not predict what its source predicts: mean KL divergence "
        f"{parity.mean_kl_nats:.3g} nats per token (accepted up to {parity.tolerance_kl_nats:g}), "
        f"largest difference of a logit {parity.max_logit_difference:.3g}; nothing was written. "
        "Try another --type; --tolerance accepts more, --no-check does not look"
    )


def check_tokens(folder: Path, gguf_path: Path) -> int:
    """Check that a GGUF file's tokenizer encodes texts as its source's does.

    Returns:
        How many texts were compared.

    Raises:
        FormatError: one comes out otherwise.
    """
    own = read_tokenizer(folder)
    header = read_gguf_header(gguf_path)
    document, _ = convert_gguf_tokenizer(header.metadata)
    back = Tokenizer.from_str(json.dumps(document))
    num_texts = 0
    for text in _texts(own):
        expected, got = own.encode(text).ids, back.encode(text).ids
        if expected != got:
            at = next(i for i, pair in enumerate(_paired(expected, got)) if pair[0] != pair[1])
            raise FormatError(
                f"the tokenizer of {folder} cannot be written as GGUF: {text[:60]!r} becomes "
                f"{got[at : at + 4]} instead of {expected[at : at + 4]} from token {at} on; export "
                "with --format huggingface"
            )
        num_texts += 1
    return num_texts


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield prose, odd cases, and words of the vocabulary alone and in rows."""
    yield TEXT
    yield PROBE
    added = set(tokenizer.get_added_tokens_decoder())
    size = tokenizer.get_vocab_size()
    ids = [index for index in range(0, size, max(1, size // NUM_WORDS)) if index not in added]
    words = [tokenizer.decode([index]) for index in ids]
    yield from words
    yield from ("".join(words[begin : begin + 16]) for begin in range(0, len(words), 16))


def _paired(first: list[int], second: list[int]) -> Iterator[tuple[int | None, int | None]]:
    for index in range(max(len(first), len(second))):
        yield (
            first[index] if index < len(first) else None,
            second[index] if index < len(second) else None,
        )


@torch.inference_mode()
def _run(model: Any, windows: Windows) -> Logits:
    return [
        model(input_ids=torch.tensor([list(window)]), use_cache=False).logits[0].float().numpy()
        for window in windows
    ]
