"""Curated text in a smaller model, or raw text in a larger one: the same compute and bytes.

    make bench-curated

Raw text: the sweep's English passages, and as many bytes of the files of installed packages
(headers, scripts, build files), as they come. Curated: the documents of it that pass the quality
filter of ``mutirao data``, which knows nothing of what is measured. Both widths are trained on
both, for the same 6 N D (blocks and head), and rounded so that the blocks' bytes are alike: the
smaller to 8 bits per channel, the larger to 4 bits in groups of 32. Scored on English documents
that nobody trained on, and on held-out package files. Resumable; writes
docs/benchmarks/data/precision/curated.json and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from precision.family import SIZES, Size, make_model
from precision.rounding import Rounding, apply, window_losses
from precision.text import VOCABULARY, Bytes, draw_windows, prepare, spread_windows
from precision.training import STEP_TOKENS, Run, train_run

from mutirao.artifact import write_atomic
from mutirao.console import step_progress
from mutirao.data.config import QualityConfig
from mutirao.data.quality import QualityFilter
from mutirao.data.records import Record
from mutirao.environment import cache_directory

ENDINGS = {".h", ".hpp", ".cuh", ".py", ".pyi", ".cmake", ".jinja", ".json", ".yaml", ".js"}
PACKAGES = ("torch", "transformers")
HELDOUT_OF = 64
HELDOUT_WINDOWS = 512
SMALL, LARGE = "96", "128"
LARGE_STEPS = 1024
WAYS = {SMALL: Rounding("rtn", "channel", 8), LARGE: Rounding("gptq", "g32", 4)}
BITS = {SMALL: 8 + 24 / int(SMALL), LARGE: 4 + 20 / 32}
"""True bits per weight of blocks: codes, bfloat16 scales, zero points of a byte or of 4 bits."""


class Pool:
    """One kind of text, all of it in a row."""

    def __init__(self, path: Path) -> None:
        self._bytes: Bytes = np.load(path)

    def training(self, num_windows: int, seed: int, step: int) -> torch.Tensor:
        """Return the (windows, bytes + 1) of a step."""
        return draw_windows([self._bytes], num_windows, f"{seed}/{step}")

    def calibration(self, num_windows: int) -> torch.Tensor:
        """Return (windows, bytes) for methods that look at text."""
        return draw_windows([self._bytes], num_windows, "calibration")[:, :-1]

    def heldout(self, num_windows: int) -> torch.Tensor:
        """Return (windows, bytes + 1) that are spread evenly."""
        return spread_windows([self._bytes], num_windows)


def main() -> None:
    """Run what is missing, write and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    folder: Path = options.folder / "curated"
    counts = prepare_pools(options.folder / "text", folder)
    scored = {kind: Pool(folder / f"{kind}-heldout.npy") for kind in ("english", "files")}
    results = []
    for seed in map(int, options.seeds.split(",")):
        for pool in ("raw", "curated"):
            for size in (SMALL, LARGE):
                results.append(_measure(folder, pool, size, seed, scored))
    content = {"bytes": counts, "results": results}
    write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    _show(content)


def prepare_pools(text: Path, folder: Path) -> dict[str, int]:
    """Write both pools and what is scored, once; return their bytes."""
    counts_path = folder / "bytes.json"
    if not counts_path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        prepare(text)
        english = np.load(text / "english-train.npy").tobytes().split(b"\0")
        num_bytes = sum(map(len, english))
        files: list[bytes] = []
        heldout: list[bytes] = []
        for digest, document in sorted({_digest(each): each for each in _files()}.items()):
            if int(digest[:8], 16) % HELDOUT_OF == 0:
                heldout.append(document)
            elif num_bytes > 0:
                files.append(document)
                num_bytes -= len(document)
        kept = {
            kind: _kept(documents) for kind, documents in (("english", english), ("files", files))
        }
        parts = {
            "raw": [*english, *files],
            "curated": [*kept["english"], *kept["files"]],
            "english-heldout": np.load(text / "english-heldout.npy").tobytes().split(b"\0"),
            "files-heldout": heldout,
        }
        counts = {f"curated-{kind}": sum(map(len, each)) for kind, each in kept.items()}
        for name, documents in parts.items():
            whole = b"".join(each + b"\0" for each in documents if each)
            np.save(folder / f"{name}.npy", np.frombuffer(whole, np.uint8))
            counts[name] = len(whole)
        write_atomic(counts_path, json.dumps(counts, indent=1) + "\n")
    found: dict[str, int] = json.loads(counts_path.read_text(encoding="utf-8"))
    return found


def _files() -> Iterator[bytes]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*")):
            if file.suffix in ENDINGS and file.is_file():
                content = file.read_bytes().replace(b"\0", b" ").strip()
                if len(content) > 200:
                    yield content


def _digest(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()


def _kept(documents: list[bytes]) -> list[bytes]:
    quality = QualityFilter(QualityConfig(languages=("en",)))
    kept = []
    with step_progress() as progress:
        for document in progress.track(documents, description="filtering"):
            text = document.decode("utf-8", "replace")
            if text and quality.reason(Record(id="0", source="0", text=text)) is None:
                kept.append(document)
    return kept


def _steps(size: str) -> int:
    """Return how long a width is trained: as much compute as the larger's."""
    return round(LARGE_STEPS * _compute(SIZES[LARGE]) / _compute(SIZES[size]))


def _compute(size: Size) -> int:
    """Return the matrix entries that a byte passes: blocks and head."""
    return size.num_parameters + VOCABULARY * size.width


def _measure(
    folder: Path, pool: str, size: str, seed: int, scored: dict[str, Pool]
) -> dict[str, Any]:
    """Train one model, if it is not there, and score it, whole and rounded."""
    text: Any = Pool(folder / f"{pool}.npy")
    run = Run(size, seed, (_steps(size),), None, "float32")
    with step_progress() as progress:
        bar = progress.add_task(f"training {run.name} on {pool} text", total=_steps(size))
        trained = train_run(
            folder / pool, run, text, lambda step: progress.update(bar, completed=step)
        )
        path = next(path for _, is_decayed, path in trained if is_decayed)
    model = make_model(SIZES[size], seed)
    model.load_state_dict(torch.load(path))
    model.eval()
    rounded = copy.deepcopy(model)
    apply(rounded, WAYS[size], text)
    result: dict[str, Any] = {
        "pool": pool,
        "size": size,
        "seed": seed,
        "num_parameters": SIZES[size].num_parameters,
        "num_tokens": _steps(size) * STEP_TOKENS,
        "block_bytes": round(SIZES[size].num_parameters * BITS[size] / 8),
    }
    for kind, held in scored.items():
        ids_WT = held.heldout(HELDOUT_WINDOWS)
        for state, each in (("whole", model), ("rounded", rounded)):
            result[f"{kind}-{state}"] = [
                round(loss, 5) for loss in window_losses(each, ids_WT).tolist()
            ]
    return result


def _show(content: dict[str, Any]) -> None:
    by_run = {(each["pool"], each["size"], each["seed"]): each for each in content["results"]}
    print({name: f"{count / 1e6:.2f} MB" for name, count in content["bytes"].items()})
    keys = [f"{kind}-{state}" for kind in ("english", "files") for state in ("whole", "rounded")]
    print("pool, width, seed, bytes of blocks:", *keys)
    for (pool, size, seed), each in by_run.items():
        losses = "  ".join(f"{statistics.fmean(each[key]):.4f}" for key in keys)
        print(f"{pool:8} d{size:4} s{seed} {each['block_bytes']:8,}  {losses}")
    for seed in sorted({seed for _, _, seed in by_run}):
        for key in keys:
            ours = by_run["curated", SMALL, seed][key]
            others = by_run["raw", LARGE, seed][key]
            gaps = [one - other for one, other in zip(ours, others, strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            print(f"smaller, curated minus larger, raw, s{seed}, {key}: ", end="")
            print(f"{statistics.fmean(gaps):+.4f} ± {error:.4f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "bench-precision")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    docs = Path(__file__).parents[1] / "docs" / "benchmarks" / "data" / "precision"
    parser.add_argument("--out", type=Path, default=docs / "curated.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
