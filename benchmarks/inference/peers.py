"""Who is measured: each engine, how it is started, and what it is given.

A budget is a share of the model's file plus 250 MB, the same for everybody. Python with
PyTorch alone takes more than those 250 MB, so peers built on it may have more than the budget:
the least of ``EXTRA_STEPS_BYTES`` with which they are neither killed nor caught reading their
own program again and again (``START_S`` and ``STEP_S`` of measure.py) is theirs, and it is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.installation import LLAMA_CPP_VERSION
from mutirao.inference.store.weight_store import store_directory

HERE = Path(__file__).parent
OVERHEAD_BYTES = 250_000_000
EXTRA_STEPS_BYTES = (0, 250_000_000, 500_000_000, 750_000_000, 1_000_000_000, 1_500_000_000)
NUM_THREADS = 2
CONTEXT_TOKENS = 512


@dataclass(frozen=True)
class Budget:
    """How much memory a run may take."""

    share: float | None
    """Of the model's file, to which 250 MB come; None: no limit."""

    def limit_bytes(self, model_bytes: int) -> int | None:
        """The limit in bytes."""
        if self.share is None:
            return None
        return int(self.share * model_bytes) + OVERHEAD_BYTES

    @property
    def name(self) -> str:
        """As it is written in records and tables."""
        return "none" if self.share is None else f"{self.share:g}"

    @classmethod
    def parse(cls, name: str) -> Budget:
        """Read a name back.

        Raises:
            ValueError: neither 'none' nor a number.
        """
        return cls(None if name == "none" else float(name))


@dataclass(frozen=True)
class Materials:
    """Where everything is that the peers need."""

    model: Path
    bfloat16: Path | None
    smaller: dict[str, tuple[str, Path]]
    """By budget name: the smaller quantization that fits, and its file."""
    python: Path | None
    """Of the peers' virtual environment."""
    programs: Path | None
    """llama.cpp's programs."""
    scratch: Path


Options = Callable[[Materials, Budget], dict[str, Any]]


@dataclass(frozen=True)
class Peer:
    """One line of the chart."""

    name: str
    label: str
    runner: str
    options: Options
    seconds_per_prompt: float = 30.0
    model: str = "gguf"
    """Which weights: gguf, bfloat16 or smaller."""
    enters_limit_itself: bool = False
    """Its runner puts only a child of its own under the limit."""
    needs_extra: bool = False
    """Gets more than the budget where it does not run within it."""
    runs_unlimited: bool = False
    """Is also measured without a limit."""
    in_default: bool = True
    prepare: dict[str, Any] = field(default_factory=dict)
    """Options of a first start, unmeasured and unlimited; empty: none is needed."""

    def python(self, materials: Materials) -> Path:
        """The interpreter that runs the runner."""
        is_theirs = self.model == "bfloat16" and self.runner != "run_ours.py"
        if is_theirs and materials.python is not None:
            return materials.python
        return Path(sys.executable)

    def files(self, materials: Materials, budget: Budget) -> list[Path]:
        """The files it reads while it runs."""
        weights = self.weights(materials, budget)
        if self.runner == "run_ours.py" and weights is not None:
            return [store_directory(weights) / "weights.bin"]
        if self.runner == "run_airllm.py":
            return sorted((materials.scratch / "airllm").rglob("*.safetensors"))
        if weights is None or weights.is_file():
            return [weights] if weights else []
        return sorted(weights.glob("*.safetensors"))

    def weights(self, materials: Materials, budget: Budget) -> Path | None:
        """The file or folder it runs, None where it has none at this budget."""
        if self.model == "bfloat16":
            return materials.bfloat16
        if self.model == "smaller":
            return materials.smaller.get(budget.name, ("", None))[1]
        return materials.model


def _ours(speculation: str) -> Options:
    return lambda _materials, _budget: {"speculation": speculation}


def _llama_cpp(*flags: str) -> Options:
    def options(materials: Materials, _budget: Budget) -> dict[str, Any]:
        assert materials.programs is not None
        server = str(materials.programs / "llama-server")
        return {"server": server, "flags": list(flags), "version": LLAMA_CPP_VERSION}

    return options


def _accelerate(materials: Materials, budget: Budget) -> dict[str, Any]:
    share = budget.share
    weights_bytes = None if share is None else int(share * materials.model.stat().st_size)
    return {"folder": str(materials.scratch), "weights_bytes": weights_bytes}


def _airllm(materials: Materials, _budget: Budget) -> dict[str, Any]:
    return {"folder": str(materials.scratch / "airllm")}


FLAGS = ("--flash-attn", "on", "--load-mode", "mmap")
"""Tried on 2026-11-22: flash attention is a little faster; the other load modes are not."""
NO_REPACK = (*FLAGS, "--no-repack", "--ubatch-size", "128")
"""Without repacking, no second copy of the weights stands where the page cache could be; the
smaller batch needs smaller buffers."""
NGRAM = (
    *("--spec-type", "ngram-simple"),
    *("--spec-ngram-simple-size-n", "1", "--spec-ngram-simple-size-m", "4"),
)
"""Of thirteen settings of its five n-gram methods the one with the most tokens per pass on these
prompts: 1.52, 1.21 and 1.19 (2026-11-22). With the settings they come with, the three methods
that were tried so drafted nothing."""

PEERS = (
    Peer(
        "ours",
        "Mutirão, pin and stream",
        "run_ours.py",
        _ours("off"),
        seconds_per_prompt=180.0,
        runs_unlimited=True,
        prepare={"speculation": "auto", "prepare": True},
    ),
    Peer(
        "ours-speculation",
        "Mutirão, with self-speculation",
        "run_ours.py",
        _ours("auto"),
        seconds_per_prompt=180.0,
        prepare={"speculation": "auto", "prepare": True},
    ),
    Peer(
        "ours-bfloat16",
        "Mutirão, bfloat16, with self-speculation",
        "run_ours.py",
        _ours("auto"),
        model="bfloat16",
        prepare={"speculation": "auto", "prepare": True},
    ),
    Peer(
        "llama.cpp",
        "llama.cpp, mmap, default flags",
        "run_llama_cpp.py",
        _llama_cpp(*FLAGS),
        enters_limit_itself=True,
        runs_unlimited=True,
    ),
    Peer(
        "llama.cpp-tuned",
        "llama.cpp, mmap, tuned (no repacking)",
        "run_llama_cpp.py",
        _llama_cpp(*NO_REPACK),
        enters_limit_itself=True,
    ),
    Peer(
        "llama.cpp-ngram",
        "llama.cpp, tuned, with its n-gram speculation",
        "run_llama_cpp.py",
        _llama_cpp(*NO_REPACK, *NGRAM),
        enters_limit_itself=True,
    ),
    Peer(
        "smaller",
        "llama.cpp, smaller quantization that fits",
        "run_llama_cpp.py",
        _llama_cpp(*NO_REPACK),
        model="smaller",
        enters_limit_itself=True,
    ),
    Peer(
        "accelerate",
        "accelerate, disk offload, bfloat16",
        "run_accelerate.py",
        _accelerate,
        model="bfloat16",
        needs_extra=True,
    ),
    Peer(
        "airllm",
        "AirLLM, bfloat16",
        "run_airllm.py",
        _airllm,
        model="bfloat16",
        needs_extra=True,
        prepare={"prepare": True},
    ),
)
