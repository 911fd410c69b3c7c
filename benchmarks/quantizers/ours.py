"""Our own quantizers: the ``mutirao compress`` command itself, one process for each setting.

The command measures what it wrote, which cannot be left out; it is asked for the fewest windows
it accepts. Its time and peak memory, taken from outside as the peers' are, hold that too: opening
the original and the result, and two windows through each.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from aggregator_memory import MemorySampler, tree_of

from mutirao.compress.config import TextConfig
from mutirao.environment import child_environment
from mutirao.errors import FormatError, MutiraoError
from mutirao.formats.layer_bits import read_layer_bits
from quantizers.peer_result import integer_bits, read_tensors

MUTIRAO = str(Path(sys.executable).parent / "mutirao")
METHODS = ("rtn", "gptq", "awq", "awq,gptq", "gptq,tune", "awq,gptq,tune")
FEWEST_WINDOWS = 2
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
NAME = re.compile(r"ours-(?P<method>[a-z0-9+]+)-(?P<bits>\d+)-g(?P<group_size>\d+)")


class CommandError(MutiraoError):
    """The command failed or took too long."""


@dataclass(frozen=True)
class OurSetting:
    """One way to quantize."""

    method: str
    """As the command takes it: any steps, separated by commas."""
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """As tables call it, for example ours-awq+gptq-3-g32."""
        return f"ours-{self.method.replace(',', '+')}-{self.bits}-g{self.group_size}"

    @classmethod
    def parse(cls, name: str) -> OurSetting | None:
        """Return the setting of a name; None where it is no such name."""
        found = NAME.fullmatch(name)
        if found is None:
            return None
        method = found["method"].replace("+", ",")
        return cls(method, int(found["bits"]), int(found["group_size"]))


def run(
    setting: OurSetting,
    model: Path,
    text: Path,
    windows: TextConfig,
    place: Path,
    *,
    threads: int = 1,
    time_limit_s: float,
) -> dict[str, Any]:
    """Compress a model and return its figures, in the peers' fields.

    Args:
        setting: how.
        model: a Hugging Face directory.
        text: what the windows are read from; the command cuts the same ones as the benchmark.
        windows: of calibration, how many and how long.
        place: an empty folder; the result is in ``model`` there, what was said in ``log.txt``.
        threads: of the command.
        time_limit_s: the command is ended after it.

    Raises:
        CommandError: it failed or took too long; its last words are in the message.
    """
    command = [MUTIRAO, "compress", str(model), "--text", str(text), "--json"]
    command += ["--out", str(place / "model"), "--method", setting.method]
    command += ["--bits", str(setting.bits), "--group-size", str(setting.group_size)]
    command += ["--window-tokens", str(windows.window_tokens)]
    command += ["--calibration-windows", str(windows.calibration_windows)]
    command += ["--heldout-windows", str(FEWEST_WINDOWS)]
    begin_s = time.monotonic()
    said, memory = _watch(command, place / "log.txt", threads, time_limit_s)
    seconds = time.monotonic() - begin_s
    return {
        "versions": {
            "mutirao": importlib.metadata.version("mutirao"),
            "torch": torch.__version__,
        },
        "method": setting.method,
        "bits": setting.bits,
        "group_size": setting.group_size,
        "symmetric": False,
        "options": {},
        "threads": threads,
        **stored_figures(place / "model"),
        "seconds": {"quantize": json.loads(said)["compress_s"]},
        "process_seconds": round(seconds, 3),
        "peak_bytes": memory.peak_bytes,
        "peak_measure": memory.measure,
        "notes": [],
    }


def stored_figures(folder: Path) -> dict[str, Any]:
    """Return what a compressed model takes, counted as ``peer_result`` counts the peers'.

    Raises:
        FormatError: it has no integer codes.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    widths = read_layer_bits(config["quantization_config"])
    tensors = read_tensors(folder)
    layers = [name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")]
    if widths is None or not layers:
        raise FormatError(f"{folder} has no integer codes to count")
    num_bits = num_weights = stored_bytes = 0
    for layer in layers:
        parts = {part: tensors.pop(f"{layer}.{part}", None) for part in PARTS}
        scales, shape = parts["weight_scale"], parts["weight_shape"]
        if scales is None or shape is None:
            raise FormatError(f"layer {layer} of {folder} lacks scales or its shape")
        num_bits += integer_bits(
            int(shape.prod()),
            scales.numel(),
            widths.of(layer),
            symmetric=parts["weight_zero_point"] is None,
            scale_bits=8 * scales.element_size(),
        )
        num_weights += int(shape.prod())
        stored_bytes += sum(part.nbytes for part in parts.values() if part is not None)
    others_bytes = sum(2 * tensor.numel() for tensor in tensors.values())
    return {
        "linear": {
            "num_weights": num_weights,
            "bits_per_weight": num_bits / num_weights,
            "stored_bits_per_weight": 8 * stored_bytes / num_weights,
        },
        "model_bytes": (num_bits + 7) // 8 + others_bytes,
    }


def _watch(
    command: list[str], log: Path, threads: int, time_limit_s: float
) -> tuple[str, MemorySampler]:
    """Run a command to its end; return what it printed, and the memory that it took."""
    environment = child_environment(**dict.fromkeys(THREAD_VARIABLES, str(threads)))
    environment |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "1000"}  # errors on one line
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment,
            text=True,
        )
        try:
            with MemorySampler(lambda: tree_of([process.pid])) as memory:
                said, _ = process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            raise CommandError(f"it took more than {time_limit_s:.0f} s") from None
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise CommandError(log.read_text(encoding="utf-8", errors="replace")[-1500:])
    return said, memory
