"""The sweep behind the precision law: train, round, measure; resumable at any moment.

    make bench-precision ARGS="--sizes 64,96,128 --seeds 0 --steps 256,512,1024,2048"

Each (size, seed) is a run of ``precision.training``; every checkpoint of it is rounded in every
way of ``precision.rounding`` and one line per measurement is kept in FOLDER/rows/RUN.jsonl. What
is there stays, so that the command may be stopped, repeated, and run for other sizes at once.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from precision.family import SIZES, make_model
from precision.rounding import ALL, STABLE, Rounding, measure
from precision.text import Text, prepare
from precision.training import STEP_TOKENS, Run, train_run

from mutirao.console import step_progress
from mutirao.environment import cache_directory


def main() -> None:
    """Run what is missing."""
    options = _options()
    torch.set_num_threads(options.threads)
    prepare(options.folder / "text")
    text = Text(options.folder / "text")
    bits = [int(each) for each in options.train_bits.split(",")] if options.train_bits else [None]
    steps = tuple(int(each) for each in options.steps.split(","))
    for seed in map(int, options.seeds.split(",")):
        for size in options.sizes.split(","):
            for train_bits in bits:
                run = Run(size, seed, steps, train_bits, options.compute_dtype)
                sweep_run(options.folder, run, text)


def sweep_run(folder: Path, run: Run, text: Text, wanted: list[Rounding] = ALL) -> None:
    """Train one run and measure all its checkpoints; what is there stays."""
    rows_path = folder / "rows" / f"{run.name}.jsonl"
    rows_path.parent.mkdir(parents=True, exist_ok=True)
    known = {_key(row) for row in read_rows(rows_path)}
    size = SIZES[run.size]
    with step_progress() as progress:
        bar = progress.add_task(f"training {run.name}", total=run.num_steps[-1])
        trained = train_run(
            folder / "runs", run, text, lambda step: progress.update(bar, completed=step)
        )
        for num_steps, is_decayed, path in trained:
            common = {
                "run": run.name,
                "size": run.size,
                "seed": run.seed,
                "train_bits": run.train_bits,
                "num_parameters": size.num_parameters,
                "num_tokens": num_steps * STEP_TOKENS,
                "is_decayed": is_decayed,
            }
            left = [
                each
                for each in wanted
                if _key({**common, **vars(each)}) not in known and (is_decayed or each in STABLE)
            ]
            if not left:
                continue
            model = make_model(size, run.seed)
            model.load_state_dict(torch.load(path))
            with rows_path.open("a", encoding="utf-8") as file:
                if _is_cut(rows_path):
                    file.write("\n")
                for row in measure(model, text, left):
                    file.write(json.dumps(common | row) + "\n")
                    file.flush()
                    os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return the measurements in a file; a line that a kill cut is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _is_cut(path: Path) -> bool:
    """Say whether a kill left a line without its end, which the next row must not go on."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("num_tokens", "is_decayed", "method", "group", "bits"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "bench-precision")
    parser.add_argument("--sizes", default="64,96,128")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", default="256,512,1024,2048")
    parser.add_argument(
        "--train-bits", default="", help="of weights while training, for example 3,4"
    )
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
