"""What every peer is given and leaves: a task, a plain model directory and its figures.

A peer's script is started as ``python peer_X.py TASK`` in the peer's own environment, with the
task as JSON. It leaves, in the task's folder, the quantized model with its weights computed
back into floating point (so that one evaluator measures all of them), and ``figures.json``.
Sizes are those of what the peer quantized, never of that directory.

Needs torch, numpy and safetensors, which every peer's environment has.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FIGURES_NAME = "figures.json"
LEFT_OUT = ("README.md", "manifest.json", "model.safetensors.index.json")
"""Files beside the weights that would not be true of the copy."""
SCALE_BITS = 16
"""Of a scale in the formats of llm-compressor and AutoRound."""


@dataclass(frozen=True)
class Task:
    """What one run is to do."""

    method: str
    model: Path
    calibration: Path
    """Token ids as .npy, (windows, length)."""
    out: Path
    scratch: Path
    """For what the peer writes in its own format; emptied by the caller."""
    threads: int
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Of the peer's own."""

    @classmethod
    def read(cls) -> Task:
        """Return the task of the command line, with its threads set."""
        values = json.loads(sys.argv[1])
        for name in ("model", "calibration", "out", "scratch"):
            values[name] = Path(values[name])
        task = cls(**values)
        torch.set_num_threads(task.threads)
        torch.manual_seed(0)
        return task

    def windows(self) -> NDArray[np.int64]:
        """Return the calibration's token ids, (windows, length)."""
        return np.load(self.calibration, allow_pickle=False).astype(np.int64)


@dataclass(frozen=True)
class Linear:
    """One quantized matrix, as its peer stores it."""

    weight: Tensor
    """(O, I), computed back from codes, scales and zeros in float32."""
    kind: str
    """How it is stored, for the table."""
    num_bits: int
    """Of codes, scales and zeros, packed without gaps."""
    stored_bytes: int
    """Of the same in the peer's file, gaps and constants included."""


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what runs inside; it is added to what the step had."""
        begin_s = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin_s


def integer_bits(
    num_weights: int, num_groups: int, bits: int, *, symmetric: bool, scale_bits: int = SCALE_BITS
) -> int:
    """Count the bits of integer codes with a scale, and perhaps a zero point, for each group."""
    return bits * num_weights + num_groups * (scale_bits + (0 if symmetric else bits))


def dequantize(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | int) -> Tensor:
    """Compute (code - zero) times scale in float32, group by group."""
    num_rows, num_columns = codes_OI.shape
    codes_OGK = codes_OI.float().reshape(num_rows, scales_OG.shape[1], -1)
    zeros = zeros_OG.float()[:, :, None] if isinstance(zeros_OG, Tensor) else float(zeros_OG)
    weights_OGK = (codes_OGK - zeros) * scales_OG.float()[:, :, None]
    return weights_OGK.reshape(num_rows, num_columns)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a directory's safetensors files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def weight_bytes(paths: Iterable[Path]) -> int:
    """Return the size of files of weights."""
    return sum(path.stat().st_size for path in paths)


def finish(
    task: Task,
    linears: dict[str, Linear],
    others: dict[str, Tensor],
    clock: Clock,
    *,
    versions: dict[str, str],
    file_bytes: int,
    notes: Iterable[str] = (),
) -> None:
    """Write the directory and its figures.

    Args:
        task: what was asked.
        linears: the quantized matrices, by their names in the model.
        others: every other tensor.
        clock: what was measured.
        versions: of the peer and what it stands on.
        file_bytes: of the weights in the peer's own format.
        notes: what a reader of the figures must know.
    """
    with clock.step("export"):
        dtype = _write_directory(task, linears, others)
    num_weights = sum(each.weight.numel() for each in linears.values())
    num_bits = sum(each.num_bits for each in linears.values())
    stored_bytes = sum(each.stored_bytes for each in linears.values())
    kinds: Counter[str] = Counter()
    for each in linears.values():
        kinds[each.kind] += each.weight.numel()
    others_bytes = sum(tensor.numel() * 2 for tensor in others.values())
    windows = task.windows()
    figures = {
        "method": task.method,
        "bits": task.bits,
        "group_size": task.group_size,
        "symmetric": task.symmetric,
        "options": task.options,
        "threads": task.threads,
        "versions": {**versions, "torch": torch.__version__},
        "calibration": {"num_windows": windows.shape[0], "window_tokens": windows.shape[1]},
        "linear": {
            "num_weights": num_weights,
            "bytes": (num_bits + 7) // 8,
            "bits_per_weight": num_bits / num_weights,
            "stored_bytes": stored_bytes,
            "stored_bits_per_weight": 8 * stored_bytes / num_weights,
            "num_weights_by_kind": dict(kinds.most_common()),
        },
        "model_bytes": (num_bits + 7) // 8 + others_bytes,
        "others_bytes": others_bytes,
        "file_bytes": file_bytes,
        "dtype": dtype,
        "seconds": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        "notes": list(notes),
    }
    path = task.out / FIGURES_NAME
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _write_directory(task: Task, linears: dict[str, Linear], others: dict[str, Tensor]) -> str:
    """Write a plain Hugging Face directory; return its dtype.

    That is bfloat16 only where it holds every weight exactly; else it is float32.
    """
    config = json.loads((task.model / "config.json").read_text(encoding="utf-8"))
    tensors = {name: each.weight for name, each in linears.items()} | others
    if config.get("tie_word_embeddings"):
        head = tensors.pop("lm_head.weight", None)
        embeddings = tensors["model.embed_tokens.weight"]
        if head is not None and not torch.equal(head.float(), embeddings.float()):
            raise ValueError("the peer changed the head of a model whose embeddings are its head")
    expected = {name: tuple(tensor.shape) for name, tensor in read_tensors(task.model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ValueError(f"the peer's model has other tensors than it was given: {wrong[:4]}")
    fits = all(torch.equal(each.bfloat16().float(), each.float()) for each in tensors.values())
    dtype = torch.bfloat16 if fits else torch.float32
    config["dtype"] = str(dtype).removeprefix("torch.")
    task.out.mkdir(parents=True, exist_ok=True)
    for path in task.model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in LEFT_OUT:
            shutil.copyfile(path, task.out / path.name)
    (task.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain = {name: tensor.to(dtype).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(plain, task.out / "model.safetensors", metadata={"format": "pt"})
    return str(config["dtype"])
