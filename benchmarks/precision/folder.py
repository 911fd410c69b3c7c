"""A checkpoint of the sweep as a Hugging Face directory, with text that it never saw.

    PYTHONPATH=benchmarks python -m precision.folder d192-s0 2048 OUT

OUT/bytes-RUN is the decayed checkpoint in bfloat16, with a tokenizer whose tokens are the 256
bytes; OUT/text.jsonl the held-out documents of both kinds, in an order drawn at random. That is
what other programs, which know models with tokenizers only, can be measured on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mutirao.environment import cache_directory
from precision.family import SIZES, make_model
from precision.text import VOCABULARY, prepare


def write_model(checkpoint: Path, size: str, folder: Path) -> None:
    """Write weights, configuration and tokenizer."""
    model = make_model(SIZES[size], 0)
    model.load_state_dict(torch.load(checkpoint))
    model.to(torch.bfloat16).save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return one whose token i is byte i; byte 0 ends a text."""
    characters = _characters()
    vocabulary = {characters[byte]: byte for byte in range(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = characters[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end
    )


def _characters() -> list[str]:
    """Return how ByteLevel shows each byte: itself where it is printable, else past U+00FF."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(VOCABULARY) if byte not in shown]
    places = {byte: byte for byte in shown} | {b: 256 + i for i, b in enumerate(hidden)}
    return [chr(places[byte]) for byte in range(VOCABULARY)]


def write_text(source: Path, path: Path) -> None:
    """Write held-out documents of both kinds, one JSON line each."""
    documents = [
        document.decode("utf-8", "replace")
        for kind in ("english", "python")
        for document in np.load(source / f"{kind}-heldout.npy").tobytes().split(b"\0")
        if document
    ]
    random.Random(0).shuffle(documents)
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="for example d192-s0")
    parser.add_argument("steps", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "bench-precision")
    options = parser.parse_args()
    prepare(options.folder / "text")
    options.out.mkdir(parents=True, exist_ok=True)
    size = options.run.partition("-")[0].removeprefix("d")
    checkpoint = options.folder / "runs" / options.run / f"{options.steps}-decayed.pt"
    write_model(checkpoint, size, options.out / f"bytes-{options.run}")
    write_text(options.folder / "text", options.out / "text.jsonl")


if __name__ == "__main__":
    main()
