"""Every way to make one model smaller: what each costs, from disk to disk, one process each.

    python benchmarks/bench_compress.py MODEL TEXT [--only gptq-4,awq-4] [--work FOLDER]

Each setting is one run of ``mutirao compress``, which opens what it wrote and measures it. What was
measured before is not run again. Writes docs/benchmarks/data/compress.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mutirao.artifact import sha256_of_file, write_atomic
from mutirao.environment import child_environment

ROOT = Path(__file__).parents[1]
MUTIRAO = str(Path(sys.executable).parent / "mutirao")
SETTINGS: dict[str, list[str]] = {
    **{
        f"{method.replace(',', '+')}-{bits}": ["--method", method, "--bits", str(bits)]
        for bits in (4, 3, 2)
        for method in ("rtn", "gptq", "awq", "awq,gptq", "gptq,tune")
    },
    "rtn-8": ["--method", "rtn", "--bits", "8"],
    "fp8": ["--method", "fp8"],
    "nf4": ["--method", "nf4"],
    "wanda-50": ["--method", "wanda"],
    "wanda-2:4": ["--method", "wanda", "--pattern", "2:4"],
    "magnitude-50": ["--method", "magnitude"],
    "svd-80": ["--method", "svd", "--kept-parameters", "0.8"],
    "svd-50": ["--method", "svd", "--kept-parameters", "0.5"],
    "share-2": ["--method", "share"],
    "wanda-50+gptq-4": ["--method", "wanda,gptq", "--bits", "4"],
}


def main() -> None:
    """Run what is missing, and print all."""
    options = _options()
    known: dict[str, Any] = {}
    about = {
        "model": options.model.name,
        "config_sha256": sha256_of_file(options.model / "config.json"),
        "weights_sha256": sha256_of_file(options.model / "model.safetensors"),
        "text_bytes": sum(each.stat().st_size for each in _files(options.text)),
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
    }
    if options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        known = before.pop("settings")
        if before != about:
            raise SystemExit(f"{options.out} is of another model, text or machine; move it away")
    chosen = options.only.split(",") if options.only else list(SETTINGS)
    for name in chosen:
        if name not in known:
            known[name] = _run(options, SETTINGS[name])
            content = {**about, "settings": known}
            write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    for name, found in known.items():
        smallest = found.get("ideal_bytes", found["total_bytes"])
        print(
            f"{name:18} {found['total_bytes'] / 1e6:7.1f} MB on disk, at best "
            f"{smallest / 1e6:7.1f} MB {8 * smallest / found['num_weights']:6.2f} bits "
            f"rise {found['heldout.rise']:+.4f} ± {found['heldout.standard_error']:.4f} "
            f"KL {found['heldout.divergence']:.4f} {found['seconds']:.0f} s "
            f"{found['peak_memory_bytes'] / 1e9:.2f} GB"
        )


def _files(text: Path) -> list[Path]:
    return sorted(text.iterdir()) if text.is_dir() else [text]


def _run(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    out = options.work / "small"
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    command = [MUTIRAO, "compress", str(options.model), "--text", str(options.text)]
    command += ["--out", str(out), "--json", *arguments]
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=child_environment(**threads)
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout)
    del found["path"]
    shutil.rmtree(out)
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", default="", help="settings, separated by commas")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/bench-compress"))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks" / "data" / "compress.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
