"""Our quantizers and other people's: one model, the same windows, the same true bits per weight.

    make bench-quantizers ARGS="MODEL TEXT --only ours-*-3-*,llm-compressor-*-3-* --threads 2"

Each setting is a process of its own that leaves a model on disk, which is opened from there and
scored on held-out windows beside the original; the loss of every window is kept, so that any two
settings are compared on the same windows. Bits are those of codes, scales and zero points of the
blocks' linear layers. One line for each finished setting stays in the work folder, under a name
made from model and windows: the command may be stopped and repeated, and for other settings. A
setting that failed is not tried again without --again. AutoRound's steps are in its names. Writes
docs/benchmarks/data/quantizers-MODEL.json and docs/benchmarks/quantizers-MODEL.svg, and prints
tables. The peers are installed first where they are missing (see quantizers/peers.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantizers import ours, peers
from quantizers.picture import draw
from quantizers.scoring import Scorer
from quantizers.settings import LIGHT_ITERS, AnySetting, choose
from quantizers.table import ORIGINAL, OURS, Row, compare, markdown, summarize

from mutirao.artifact import sha256_of_file, write_atomic
from mutirao.compress.config import TextConfig
from mutirao.compress.windows import read_windows
from mutirao.environment import cache_directory, silence
from mutirao.errors import MutiraoError
from mutirao.models.causal import CausalModel

ROOT = Path(__file__).parents[1]
IMATRIX_NOTE = (
    "the importance matrix was kept from an earlier run: its seconds count, its memory is unknown"
)


def main() -> None:
    """Run what is missing, and write all."""
    options = _options()
    try:
        chosen = choose([each for each in options.only.split(",") if each], options.iters)
    except MutiraoError as error:
        raise SystemExit(str(error)) from None
    if options.list:
        print("\n".join(chosen))
        return
    silence()
    torch.set_num_threads(options.threads)
    bench = prepare(options)
    for name, setting in chosen.items():
        bench.run(name, setting)
    bench.report(options.docs)


@dataclass
class Bench:
    """One model and its windows."""

    model: Path
    text: Path
    windows: TextConfig
    folder: Path
    scorer: Scorer
    about: dict[str, Any]
    options: argparse.Namespace

    def run(self, name: str, setting: AnySetting) -> None:
        """Run and score one setting, unless that was done before; a failure is recorded."""
        before = self.rows().get(name)
        if before and (before["state"] == "ok" or not self.options.again):
            return
        place = self.folder / "models" / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        tool = OURS if isinstance(setting, ours.OurSetting) else setting.peer
        row: Row = {"name": name, "tool": tool}
        begin_s = time.monotonic()
        try:
            folder, figures = self._quantize(setting, place)
            row |= {"state": "ok", **figures, **self.scorer.score(folder)}
        except Exception as error:  # whatever one setting dies of, the others go on
            row |= {"state": "failed", "reason": _last_words(error)}
            if (place / "log.txt").is_file():
                (self.folder / "logs").mkdir(exist_ok=True)
                shutil.copy(place / "log.txt", self.folder / "logs" / f"{name}.txt")
        self.keep(row)
        shutil.rmtree(place)
        print(f"{name}: {row['state']}, {time.monotonic() - begin_s:.0f} s", file=sys.stderr)

    def _quantize(self, setting: AnySetting, place: Path) -> tuple[Path, dict[str, Any]]:
        """Return the folder of the result, and its figures."""
        threads, limit_s = self.options.threads, self.options.time_limit
        if isinstance(setting, ours.OurSetting):
            figures = ours.run(
                setting,
                self.model,
                self.text,
                self.windows,
                place,
                threads=threads,
                time_limit_s=limit_s,
            )
            return place / "model", flat(figures)
        calibration = self.folder / "calibration.npy"
        (figures,) = peers.quantize(
            setting, self.model, calibration, place, threads=threads, time_limit_s=limit_s
        )
        return place / setting.results[0], flat(figures)

    def keep(self, row: Row) -> None:
        """Add a row to the file."""
        with self._path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            is_cut = content and not content.endswith(b"\n")  # by a kill
            file.write(b"\n" * bool(is_cut) + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> dict[str, Row]:
        """Return the rows by name, the last of each; a line that a kill cut is left out."""
        rows: dict[str, Row] = {}
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["name"]] = row
        return rows

    @property
    def _path(self) -> Path:
        return self.folder / "rows.jsonl"

    def report(self, docs: Path) -> None:
        """Write all that is known, and print it."""
        known = list(self.rows().values())
        rows, failed = summarize(known), [row for row in known if row["state"] != "ok"]
        pairs = compare(rows)
        parts = {"settings": rows, "failed": failed, "comparisons": pairs}
        lists = [
            f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, part)) + "\n]"
            for name, part in parts.items()
        ]
        content = "{" + ",\n".join([f'"about": {json.dumps(self.about)}', *lists]) + "}\n"
        name = f"quantizers-{self.model.name}"
        (docs / "data").mkdir(parents=True, exist_ok=True)
        write_atomic(docs / "data" / f"{name}.json", content)
        tokens = f"{self.windows.heldout_windows} × {self.windows.window_tokens}"
        draw(rows, f"{self.model.name}, {tokens} held-out tokens", docs / f"{name}.svg")
        print(markdown(rows, pairs, failed))


def prepare(options: argparse.Namespace) -> Bench:
    """Cut the windows, and score the original where that was not done before."""
    model = options.model.resolve()
    original = CausalModel.open(model, options.dtype)
    config = TextConfig(
        window_tokens=options.window_tokens,
        calibration_windows=options.calibration_windows,
        heldout_windows=options.heldout_windows,
    )
    windows = read_windows(options.text, original, config)
    calibration, heldout = (each.numpy().astype(np.int32) for each in windows)
    about = {
        "model": model.name,
        "config_sha256": sha256_of_file(model / "config.json"),
        "weights_sha256": {
            each.name: sha256_of_file(each) for each in sorted(model.glob("*.safetensors"))
        },
        "calibration_sha256": hashlib.sha256(calibration.tobytes()).hexdigest(),
        "heldout_sha256": hashlib.sha256(heldout.tobytes()).hexdigest(),
        "text": config.model_dump(mode="json"),
        "scored_in": options.dtype,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    folder = options.work / f"{model.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "calibration.npy", calibration)
    about["processor"] = platform.processor() or platform.machine()
    scorer = Scorer(original.model, windows.heldout, options.dtype, folder / "original.pt")
    bench = Bench(model, options.text, config, folder, scorer, about, options)
    if ORIGINAL not in bench.rows():
        row = {"name": ORIGINAL, "tool": ORIGINAL, "state": "ok", "bits_per_weight": _bits(model)}
        bench.keep(row | scorer.score_original())
    return bench


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row from what a tool's run left.

    Each of llama.cpp's types is a run, and all but the first find its importance matrix made; its
    seconds are counted for all of them.
    """
    linear = figures["linear"]
    row = {
        "method": figures["method"],
        "bits": figures["bits"],
        "group_size": figures["group_size"],
        "symmetric": figures["symmetric"],
        "options": figures["options"],
        "bits_per_weight": linear["bits_per_weight"],
        "stored_bits_per_weight": linear["stored_bits_per_weight"],
        "num_weights": linear["num_weights"],
        "kinds": linear.get("num_weights_by_kind", {}),
        "model_bytes": figures["model_bytes"],
        "threads": figures["threads"],
        "versions": figures["versions"],
        "seconds": figures["seconds"],
        "process_seconds": figures["process_seconds"],
        "peak_bytes": figures["peak_bytes"],
        "peak_measure": figures["peak_measure"],
        "notes": list(figures["notes"]),
    }
    steps_s = sum(figures["seconds"].values())
    if "imatrix" in figures["seconds"] and steps_s > figures["process_seconds"]:
        row["process_seconds"] = round(
            figures["process_seconds"] + figures["seconds"]["imatrix"], 3
        )
        row["peak_bytes"] = None
        row["notes"].append(IMATRIX_NOTE)
    return row


def _bits(model: Path) -> float:
    """Return the bits of a weight as a model directory stores it."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype: torch.dtype = getattr(torch, name)
    return 8.0 * dtype.itemsize


def _last_words(error: Exception) -> str:
    """Return the last line of what was said, without the names of this machine's folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[-1] if lines else type(error).__name__
    return words.replace(str(Path.home()), "~").replace(str(ROOT), ".")[-300:]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="a Hugging Face directory")
    parser.add_argument("text", type=Path, nargs="?", help="a folder or file of text")
    parser.add_argument("--only", default="", help="settings or patterns, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of the settings")
    parser.add_argument("--again", action="store_true", help="try again what failed")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--heldout-windows", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--iters", type=int, default=LIGHT_ITERS, help="AutoRound's, per block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=peers.TIME_LIMIT_S, help="s per run")
    parser.add_argument("--work", type=Path, default=cache_directory() / "bench-quantizers")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    if not options.list and options.text is None:
        parser.error("MODEL and TEXT are missing")
    return options


if __name__ == "__main__":
    main()
