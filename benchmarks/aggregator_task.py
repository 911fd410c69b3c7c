"""What every peer of the aggregator benchmark is given: tensors, sizes, and made-up updates.

Tensors have the shapes of a decoder with a vocabulary of 32,768: one embedding, and in each
block four square matrices and two of four times the width. Updates are random numbers that
follow from site and round, so that a run that is interrupted can lead to the same hash;
nothing is trained. Imports NumPy alone: NVFlare's environment has nothing of ours.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 32_768
SIZES = {
    "0.1M": (64, 2, 128),
    "4M": (128, 1, VOCABULARY),
    "16M": (384, 2, VOCABULARY),
    "64M": (640, 9, VOCABULARY),
    "256M": (1024, 18, VOCABULARY),
}
"""Width, blocks and vocabulary; the exact number of parameters is ``count_parameters``."""
SCALE = np.float32(0.01)
_WHOLE = np.uint32(0xFFFF0000)
"""Bits of a float32 that a bfloat16 has."""


@dataclass(frozen=True)
class Task:
    """One run of one peer."""

    peer: str
    """Name of the peer."""
    size: str
    """Key of ``SIZES``."""
    num_sites: int
    """Sites that answer."""
    num_rounds: int
    """Rounds of aggregation."""
    upload: str
    """Form of an update's values on the wire."""
    folder: str
    """Where the run's files lie; empty before it, removed after it."""
    port: int = 9092
    """Port of the server, in the run's own network namespace."""
    disturbed: bool = False
    """Whether the server is killed in the middle of round 2 and started again."""

    @property
    def sites(self) -> list[str]:
        """Names of the sites, sorted."""
        return [f"site-{number:02d}" for number in range(1, self.num_sites + 1)]

    def write(self) -> Path:
        """Write the task for the processes of the run."""
        path = Path(self.folder) / "task.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Task:
        """Read it in one of them."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors, by name, sorted."""
    width, num_blocks, vocabulary = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, width)}
    for block in range(num_blocks):
        for name in ("query", "key", "value", "output"):
            shapes[f"block_{block:02d}_{name}"] = (width, width)
        shapes[f"block_{block:02d}_up"] = (4 * width, width)
        shapes[f"block_{block:02d}_down"] = (width, 4 * width)
    return dict(sorted(shapes.items()))


def count_parameters(size: str) -> int:
    """Return the number of values of all tensors."""
    return sum(int(np.prod(shape)) for shape in shapes_of(size).values())


def make_tensor(name: str, shape: tuple[int, ...], *seed: int) -> NDArray[np.float32]:
    """Return one tensor of random values, each of which a bfloat16 can hold."""
    generator = np.random.default_rng([*seed, *name.encode()])
    values = (generator.random(shape, np.float32) - np.float32(0.5)) * SCALE
    values.view(np.uint32)[...] &= _WHOLE
    return values


def make_update(task: Task, site: str, round_number: int) -> dict[str, NDArray[np.float32]]:
    """Return a site's made-up tensors of a round."""
    number = int(site.rpartition("-")[2])
    return {
        name: make_tensor(name, shape, round_number, number)
        for name, shape in shapes_of(task.size).items()
    }


def note_answer(folder: str | Path, site: str, round_number: int, *, down: int, up: int) -> None:
    """Say that a site has answered, with the bytes of tensors that it got and sent."""
    line = {"time": time.time(), "site": site, "round": round_number, "down": down, "up": up}
    with (Path(folder) / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_answers(folder: str | Path) -> list[dict[str, float]]:
    """Return what sites have said, as far as it is written."""
    path = Path(folder) / "answers.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
