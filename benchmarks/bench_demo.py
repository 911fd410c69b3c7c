"""Time and peak memory of the demonstration, from nothing to the report, several runs.

The downloads are in the cache before the first counted run. Writes
docs/benchmarks/demo.json and prints the median, lowest and highest of each stage.

    make bench-demo            (RUNS=3; one run takes 7 to 9 minutes on 2 cores)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from mutirao.demo import DemoRecipe, run_demo
from mutirao.environment import runs_directory, silence

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=int(os.environ.get("RUNS", "3")))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/demo.json")
    arguments = parser.parse_args()
    silence()
    run = runs_directory() / "bench-demo"
    runs = []
    for _ in range(arguments.runs):
        started = time.monotonic()
        run_demo(DemoRecipe(), run, fresh=True)
        stages = {row["stage"]: row for row in json.loads((run / "stages.json").read_bytes())}
        runs.append({"seconds": time.monotonic() - started, "stages": stages})
    result = {
        "command": f"make bench-demo RUNS={arguments.runs}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_version()}",
        "total_seconds": _spread([each["seconds"] for each in runs]),
        "peak_memory_bytes": _spread(
            [max(row["peak_memory_bytes"] for row in each["stages"].values()) for each in runs]
        ),
        "stage_seconds": {
            name: _spread([each["stages"][name]["seconds"] for each in runs])
            for name in runs[0]["stages"]
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "lowest": round(min(values), 1),
        "highest": round(max(values), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
