"""Federated training beside synchronous data parallel: perplexity, bytes, and time by a model.

Runs what ``pretraining`` describes, seed by seed, and goes on where it was interrupted; then puts
beside it what the other federated benchmarks wrote, into one JSON and one chart.

    make bench-federated ARGS="--threads 1"

``bench_aggregator.py`` (memory, bytes and recovery beside plain Flower and NVFlare) and
``bench_privacy.py`` (attacks) have targets of their own, since they take machine and time of
another kind.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pretraining
import torch
from heart_disease import ROOT
from inference.machine import describe_machine
from pretraining import DATA, SITES, Setup, mean_loss

from mutirao.artifact import write_atomic
from mutirao.environment import runs_directory, silence
from mutirao.federated.aggregation.low_rank import Factors
from mutirao.federated.aggregation.low_rank_comparison import compare_rules
from mutirao.models.arithmetic import fast_dtype

PARTS = {"aggregator": "aggregator.json", "privacy": "privacy.json"}
GIGABITS = (0.1, 1, 10)
PLAIN = "turns-bf16"
FEDERATED = (PLAIN, "turns-int8", "turns-int4", "together-bf16")
ROWS = (
    "synchronous:0 turns-bf16:0 synchronous:1 turns-bf16:1 synchronous:2 turns-bf16:2 "
    "turns-int8:0 turns-int4:0 together-bf16:0"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=runs_directory() / "bench-federated")
    parser.add_argument(
        "--rows",
        default=ROWS,
        help="what to run, as label:seed; two calls may share the work",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/data/federated.json")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs/benchmarks/federated.svg")
    for field in fields(Setup):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    parser.add_argument("--outer-rate", type=float, default=1.0)
    parser.add_argument("--outer-momentum", type=float, default=0.0)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print(f"{DATA} is not there; name it in MUTIRAO_TEST_DATA")
        return 2
    silence()
    torch.set_num_threads(arguments.threads)
    setup = Setup(**{field.name: getattr(arguments, field.name) for field in fields(Setup)})
    outer = {
        "rule": "nesterov",
        "learning_rate": arguments.outer_rate,
        "momentum": arguments.outer_momentum,
    }
    settings = json.dumps({**asdict(setup), "outer": outer}, indent=1)
    path = arguments.run / "settings.json"
    if path.exists() and path.read_text() != settings:
        print(f"{arguments.run} has results of other settings ({path}); name another with --run")
        return 2
    write_atomic(path, settings)
    pretraining.prepare(arguments.run, setup)
    for row in arguments.rows.split():
        label, _, seed = row.partition(":")
        run_row(arguments.run, setup, outer, label, int(seed))
        write(arguments, setup, outer)
    write(arguments, setup, outer)
    return 0


def run_row(folder: Path, setup: Setup, outer: dict[str, Any], label: str, seed: int) -> None:
    """Run one row, unless its result is there."""
    path = folder / "results" / f"{label}-{seed}.json"
    if path.exists():
        return
    started = time.monotonic()
    if label == "synchronous":
        result = pretraining.synchronous(folder, setup, seed)
    else:
        settings = {"outer": outer, **pretraining.row_settings(label)}
        result = pretraining.federated(folder, folder / f"{label}-{seed}", setup, seed, settings)
    result |= {"label": label, "seed": seed, "seconds": time.monotonic() - started}
    write_atomic(path, json.dumps(result, indent=1))
    print(f"{label} seed {seed}: perplexity {math.exp(mean_loss(result['curve'][-1])):.3f}")


def summarise(folder: Path, setup: Setup) -> dict[str, Any]:
    """Return the table: perplexities with ratios to the synchronous run of the same seed, bytes."""
    results = [json.loads(path.read_bytes()) for path in sorted(folder.glob("results/*.json"))]
    by_row = {(each["label"], each["seed"]): each for each in results}
    synchronous = {seed: each for (label, seed), each in by_row.items() if label == "synchronous"}
    table: dict[str, Any] = {}
    for label in ("synchronous", *FEDERATED):
        chosen = {seed: each for (name, seed), each in by_row.items() if name == label}
        if not chosen:
            continue
        losses = {seed: mean_loss(each["curve"][-1]) for seed, each in chosen.items()}
        row: dict[str, Any] = {
            "perplexity": {seed: math.exp(loss) for seed, loss in losses.items()},
            "mean_perplexity": statistics.fmean(math.exp(loss) for loss in losses.values()),
        }
        for other, others in (("synchronous", synchronous), (PLAIN, _of(by_row, PLAIN))):
            ratios = [
                math.exp(losses[seed] - mean_loss(others[seed]["curve"][-1]))
                for seed in losses
                if seed in others
            ]
            if label != other and ratios:
                row[f"ratio_to_{other}"] = {
                    "mean": statistics.fmean(ratios),
                    "spread": [min(ratios), max(ratios)],
                }
        if label != "synchronous":
            row |= _bytes(next(iter(chosen.values())), setup)
        table[label] = row
    return table


def _of(rows: dict[tuple[str, int], Any], label: str) -> dict[int, Any]:
    return {seed: each for (name, seed), each in rows.items() if name == label}


def _bytes(result: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """Compare a site's bytes in a round with those of as many synchronous steps in bfloat16."""
    round_bytes = result["bytes_per_round_up"] + result["bytes_per_round_down"]
    step_bytes = 2 * 2 * result["num_parameters"]
    return {
        "bytes_per_round_up": result["bytes_per_round_up"],
        "bytes_per_round_down": result["bytes_per_round_down"],
        "bytes_first_state": result["bytes_first_state"],
        "times_fewer_bytes": setup.steps * step_bytes / round_bytes,
    }


def wall_times(folder: Path, setup: Setup, table: dict[str, Any]) -> dict[str, Any]:
    """Return modelled seconds of the whole training on as many machines as sites.

    A site's step takes the row's own processor time, divided by the sites and the steps of each;
    a message takes its bytes over the bandwidth, up and down after one another, nothing overlaps,
    and latency is left out. Sites that take turns wait for each other.
    """
    num_steps = setup.rounds * setup.steps
    steps_s = {}
    for label in table:
        path = sorted(folder.glob(f"results/{label}-*.json"))[0]
        cpu_seconds = json.loads(path.read_bytes())["cpu_seconds"]
        steps_s[label] = cpu_seconds / num_steps / len(SITES)
    times: dict[str, Any] = {"step_s": steps_s}
    for gigabits in GIGABITS:
        per_s = gigabits * 1e9 / 8
        rows = {}
        for label, step_s in steps_s.items():
            if label == "synchronous":
                moved = setup.steps * 4 * _num_parameters(folder)
            else:
                moved = table[label]["bytes_per_round_up"] + table[label]["bytes_per_round_down"]
            num_turns = len(SITES) if label.startswith("turns") else 1
            rows[label] = num_turns * (num_steps * step_s + setup.rounds * moved / per_s)
        times[f"{gigabits} Gbit/s"] = rows
    return times


def low_rank() -> dict[str, Any]:
    """Return each rule's error for adapters of four sites, on factors made up at random."""
    generator = np.random.default_rng(0)
    outputs, inputs, rank = 576, 1536, 16
    start = generator.uniform(-1, 1, (rank, inputs)) / np.sqrt(inputs)
    layer = {
        f"site{number}": Factors(
            (0.01 * generator.normal(size=(outputs, rank))).astype(np.float32),
            (start + 0.3 * generator.normal(size=(rank, inputs)) / np.sqrt(3 * inputs)).astype(
                np.float32
            ),
            2.0,
        )
        for number in range(4)
    }
    compared = compare_rules({"down": layer}, dict.fromkeys(layer, 1.0))
    sizes = {"outputs": outputs, "inputs": inputs, "rank": rank}
    rules = {rule: asdict(report) for rule, report in compared.items()}
    return {"factors": "synthetic", "sites": 4, "sizes": sizes, "rules": rules}


def write(arguments: argparse.Namespace, setup: Setup, outer: dict[str, Any]) -> None:
    """Write the JSON and the chart of what there is so far."""
    table = summarise(arguments.run, setup)
    document = {
        "command": "make bench-federated",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "threads": arguments.threads,
        "compute_dtype": fast_dtype() if setup.compute_dtype == "auto" else setup.compute_dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "setup": {**asdict(setup), "outer": outer, "sites": SITES},
        "pretraining": table,
        "wall_time_s": wall_times(arguments.run, setup, table),
        "adapters": low_rank(),
    }
    for part, name in PARTS.items():
        path = arguments.out.parent / name
        document[part] = json.loads(path.read_bytes()) if path.exists() else None
    if "synchronous" in table and len(table) > 1:
        num_parameters = document["pretraining_parameters"] = _num_parameters(arguments.run)
        draw(arguments.chart, table, setup.steps, setup.steps * 4 * num_parameters)
    write_atomic(arguments.out, json.dumps(document, indent=1, default=str) + "\n")


def _num_parameters(folder: Path) -> int:
    path = next(iter(folder.glob("results/*.json")))
    return int(json.loads(path.read_bytes())["num_parameters"])


def draw(path: Path, table: dict[str, Any], steps: int, synchronous_bytes: int) -> None:
    """Draw perplexity and bytes of each row."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    labels = list(table)
    for place, label in enumerate(labels):
        values = list(table[label]["perplexity"].values())
        left.plot([place] * len(values), values, "o", color="#1b6ca8", alpha=0.6)
        left.plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, color="#1b6ca8")
        row = table[label]
        moved = (
            synchronous_bytes
            if label == "synchronous"
            else row["bytes_per_round_up"] + row["bytes_per_round_down"]
        )
        right.bar(place, moved, color="#888888" if label == "synchronous" else "#1b6ca8")
        right.annotate(f"{moved / 1e6:,.0f} MB", (place, moved), ha="center", va="bottom")
    left.set_ylabel("held-out perplexity, each seed")
    right.set_ylabel(f"bytes of a site, {steps} steps")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xticks(range(len(labels)), [label.replace("-", "\n") for label in labels])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
