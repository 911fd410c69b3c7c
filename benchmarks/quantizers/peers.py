"""Other people's quantizers: installed in places of their own, and run on given token windows.

llm-compressor and AutoRound go into virtual environments; llama.cpp's quantizer is compiled
from the source that llama-cpp-python carries (7 minutes on two cores; needs cmake and a C++
compiler). Each run is a process of its own, whose peak memory is watched from outside. It leaves
a plain Hugging Face directory with the quantized weights computed back, which one evaluator can
measure for all, and ``figures.json``: true bits per weight of the linear layers with scales,
zero points and blocks' outer scales, seconds of each step, and peak memory.

    PYTHONPATH=benchmarks python -m quantizers.peers MODEL CALIBRATION.npy OUT --only gptq-4-g64

A model read from a 4-bit GGUF is on a grid already: Q4_1 (blocks of 32) gives its own weights
back at 5 bits, so 4-bit results from it flatter formats with groups of 32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from aggregator_memory import MemorySampler, tree_of
from inference.installation import LLAMA_CPP_OPTIONS, LLAMA_CPP_VERSION, download_source
from peer_environment import PeerError, call, make_environment

from mutirao.artifact import write_atomic
from mutirao.environment import cache_directory

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "llm-compressor": (
        TORCH,
        "llmcompressor==0.14.0.1",
        "compressed-tensors==0.19.0",
        "transformers==5.17.0",
    ),
    "auto-round": (TORCH, "auto-round==0.16.1", "transformers==5.24.0"),
    "llama.cpp": (TORCH, "transformers==5.19.0"),
}
"""Of each environment; llama.cpp's also gets the gguf package beside its source."""
SCRIPTS = {
    "llm-compressor": "peer_llm_compressor.py",
    "auto-round": "peer_auto_round.py",
    "llama.cpp": "peer_llama_cpp.py",
}
GGUF_REQUIREMENTS = ("numpy>=2", "tqdm", "pyyaml", "requests")
BITS = (4, 3, 2)
GROUP_SIZES = (32, 64)
NUM_WINDOWS = 128
WINDOW_TOKENS = 512
ITERS = 200
"""AutoRound's own default."""
LLAMA_CPP_TYPES = (
    *("Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S"),
)
LLAMA_CPP_FOLDED = tuple(name for name in LLAMA_CPP_TYPES if name not in ("Q4_0", "IQ4_NL"))
"""Those with blocks of 256, which not every row fills."""
TIME_LIMIT_S = 4 * 3600.0


@dataclass(frozen=True)
class Setting:
    """One way to quantize; llama.cpp's leaves several models, one for each type."""

    peer: str
    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""

    @property
    def name(self) -> str:
        """As folders and tables call it, for example gptq-4-g64-sym."""
        parts = [self.method]
        if self.bits is not None:
            parts += [str(self.bits), f"g{self.group_size}", *(["sym"] if self.symmetric else [])]
        return "-".join([*parts, *([self.suffix] if self.suffix else [])])

    @property
    def results(self) -> tuple[str, ...]:
        """Folders of the models inside its own; a dot for the folder itself."""
        return tuple(self.options.get("types", (".",)))


def integer_settings(
    *,
    bits: Sequence[int] = BITS,
    group_sizes: Sequence[int] = GROUP_SIZES,
    symmetric: Sequence[bool] = (False, True),
    iters: int = ITERS,
) -> tuple[Setting, ...]:
    """Return GPTQ, AWQ, both together, plain rounding and SignRound on all these grids.

    The range of a group is searched for the least squared error (``memoryless_mse``) where
    llm-compressor lets one choose. Its own default, the extremes, is worse at few bits: GPTQ at
    2 bits in groups of 32 had perplexity 4734 with it and 242 so (SmolLM2-135M, 8 windows of
    256 tokens, 2026-11).
    """
    methods: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("llm-compressor", "rtn", {"observer": "memoryless_mse"}),
        ("llm-compressor", "gptq", {"observer": "memoryless_mse"}),
        ("llm-compressor", "awq", {"observer": "memoryless_mse"}),
        ("llm-compressor", "awq-gptq", {"observer": "memoryless_mse"}),
        ("auto-round", "signround", {"iters": iters}),
    )
    return tuple(
        Setting(peer, method, width, size, is_symmetric, options)
        for width in bits
        for size in group_sizes
        for is_symmetric in symmetric
        for peer, method, options in methods
    )


SETTINGS = (
    *integer_settings(),
    Setting("llama.cpp", "llama.cpp", options={"types": list(LLAMA_CPP_TYPES)}),
    Setting(
        "llama.cpp",
        "llama.cpp",
        options={"types": list(LLAMA_CPP_FOLDED), "fold": True},
        suffix="folded",
    ),
)


def peers_folder() -> Path:
    """Return the folder of environments and programs; it can be deleted at any time."""
    return cache_directory() / "bench-compression"


def install(peer: str, folder: Path | None = None) -> Path:
    """Make a peer's environment unless it is there; return its Python.

    Raises:
        PeerError: pip or the build failed; its last words are in the message.
        NetworkError: a source could not be downloaded.
    """
    folder = folder or peers_folder()
    requirements = REQUIREMENTS[peer]
    if peer == "llama.cpp":
        _build_llama_cpp(folder)
        requirements += GGUF_REQUIREMENTS
    return make_environment(folder / f"env-{peer}", requirements)


def quantize(
    setting: Setting,
    model: Path,
    calibration: Path,
    out: Path,
    *,
    threads: int = 1,
    folder: Path | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[dict[str, Any]]:
    """Run a peer once; return the figures of each model it left.

    ``process_seconds`` and ``peak_bytes`` are those of the whole run, for llama.cpp of all its
    types together; ``seconds`` has the steps of each.

    Args:
        setting: which peer and how.
        model: a Hugging Face directory.
        calibration: token ids as .npy, (windows, length).
        out: written anew; see ``Setting.results`` for what is where.
        threads: of the peer.
        folder: where the environments are, or are made.
        time_limit_s: the peer is ended after it.

    Raises:
        PeerError: it failed or took too long; what it said is in ``out``/log.txt.
    """
    folder = folder or peers_folder()
    python = install(setting.peer, folder)
    shutil.rmtree(out, ignore_errors=True)
    scratch = out / "scratch"
    scratch.mkdir(parents=True)
    task = {
        "method": setting.method,
        "model": str(model.resolve()),
        "calibration": str(calibration.resolve()),
        "out": str(out.resolve()),
        "scratch": str(scratch.resolve()),
        "threads": threads,
        "bits": setting.bits,
        "group_size": setting.group_size,
        "symmetric": setting.symmetric,
        "options": setting.options,
    }
    environment = _environment(threads)
    own = {}
    if setting.peer == "llama.cpp":
        own = {
            "quantize": str(_program(folder)),
            "version": LLAMA_CPP_VERSION,
            "cache": str(folder / "imatrix"),
        }
        task["options"] = setting.options | own
        environment["PYTHONPATH"] = str(_program(folder).parent / "gguf-py")
    begin_s = time.monotonic()
    memory = _watch(
        [str(python), str(HERE / SCRIPTS[setting.peer]), json.dumps(task)],
        environment,
        out / "log.txt",
        time_limit_s,
    )
    seconds = time.monotonic() - begin_s
    shutil.rmtree(scratch)
    found = []
    for each in setting.results:
        path = out / each / "figures.json"
        figures = json.loads(path.read_text(encoding="utf-8"))
        figures |= {"peer": setting.peer, "setting": setting.name}
        for name in own:  # paths of this machine
            del figures["options"][name]
        figures["peak_bytes"] = memory.peak_bytes
        figures["peak_measure"] = memory.measure
        figures["process_seconds"] = round(seconds, 3)
        write_atomic(path, json.dumps(figures, indent=2) + "\n")
        found.append(figures)
    return found


def _watch(
    command: list[str], environment: dict[str, str], log: Path, time_limit_s: float
) -> MemorySampler:
    """Run a command to its end; return the memory that it and its children took."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    processes: Callable[[], list[psutil.Process]] = lambda: tree_of([process.pid])  # noqa: E731
    try:
        with MemorySampler(processes) as memory:
            code = process.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        raise PeerError(f"a peer took more than {time_limit_s:.0f} s; see {log}") from None
    finally:
        for each in tree_of([process.pid]):
            each.kill()
        process.wait()
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise PeerError(f"a peer ended with {code}; see {log}: {tail}")
    return memory


def _environment(threads: int) -> dict[str, str]:
    """Return the variables of a peer: its threads, no accelerator and no hub."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        **dict.fromkeys(names, str(threads)),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _program(folder: Path) -> Path:
    return folder / "llama.cpp" / "llama-quantize"


def _build_llama_cpp(folder: Path) -> None:
    """Compile llama-quantize alone, and keep the gguf package of the same source beside it.

    The gguf package of that version on PyPI lacks the newest types.
    """
    program = _program(folder)
    if program.is_file():
        return
    if shutil.which("cmake") is None:
        raise PeerError("llama.cpp cannot be built: cmake is missing (install cmake and g++)")
    archive = download_source(folder)
    source, build = folder / "llama-source", folder / "llama-build"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    root = next(source.iterdir()) / "vendor" / "llama.cpp"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    call(["cmake", "-S", str(root), "-B", str(build), *generator, *LLAMA_CPP_OPTIONS])
    jobs = str(os.cpu_count() or 1)
    call(["cmake", "--build", str(build), "--parallel", jobs, "--target", "llama-quantize"])
    shutil.rmtree(program.parent, ignore_errors=True)
    shutil.copytree(root / "gguf-py", program.parent / "gguf-py")
    part = program.with_suffix(".part")
    shutil.copy2(build / "bin" / program.name, part)
    part.rename(program)
    shutil.rmtree(source)
    shutil.rmtree(build)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a model with other people's tools.")
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("calibration", type=Path, help="token ids, .npy of (windows, length)")
    parser.add_argument("out", type=Path, help="each setting gets a folder here")
    parser.add_argument("--only", help="settings, separated by commas; all without it")
    parser.add_argument("--iters", type=int, default=ITERS, help="of SignRound, per block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="s per run")
    arguments = parser.parse_args()
    known = {each.name: each for each in (*integer_settings(iters=arguments.iters), *SETTINGS[-2:])}
    names = arguments.only.split(",") if arguments.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {unknown[0]} is not known (expected {', '.join(known)})")
    for name in names:
        found = quantize(
            known[name],
            arguments.model,
            arguments.calibration,
            arguments.out / name,
            threads=arguments.threads,
            time_limit_s=arguments.time_limit,
        )
        for figures in found:
            linear = figures["linear"]
            print(
                f"{name:24} {figures['options'].get('type', ''):8} "
                f"{linear['bits_per_weight']:.4f} bits/weight, "
                f"{figures['process_seconds']:.0f} s, {figures['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
