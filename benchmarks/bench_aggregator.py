"""Memory, bytes, time and recovery of the aggregator, beside plain Flower's and NVFlare's.

    make bench-aggregator
    python benchmarks/bench_aggregator.py [--repeats 2] [--only CASE ...] [--fresh]

Synthetic: sites answer at once with random float tensors; nothing is trained. Memory is the
peak over time of the sum over the server's processes (SuperLink, SuperExec, ServerApp and what
started them; NVFlare's simulator without its sites), sampled each 0.2 s. Cases are interleaved;
each run has a network namespace and a folder of its own (root needed for the namespace; without
it the loopback's bytes are left out). NVFlare goes into an environment of its own below the
cache folder; TORCH_INDEX names PyTorch's CPU index where it is needed.

Writes docs/benchmarks/data/aggregator.json and docs/benchmarks/aggregator.svg; finished runs are
kept and not made again, unless with ``--fresh``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aggregator_chart import draw
from aggregator_summary import summarize, table
from aggregator_task import Task, count_parameters
from inference.machine import describe_machine
from peer_environment import PeerError, make_environment

from mutirao.environment import cache_directory, silence

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs/benchmarks/data/aggregator.json"
CHART = ROOT / "docs/benchmarks/aggregator.svg"
REQUIREMENTS = ("nvflare==2.9.0", "torch==2.13.0", "numpy>=2")
RUN_LIMIT_S = 900


def _case(peer: str, size: str, num_sites: int, upload: str = "fp32", rounds: int = 1) -> Task:
    return Task(peer, size, num_sites, rounds, upload, folder="")


CASES: dict[str, Task] = {
    "ours base": _case("mutirao", "0.1M", 4, "bf16"),
    "flower base": _case("flower", "0.1M", 4),
    "nvflare base": _case("nvflare", "0.1M", 4),
    "nvflare-offload base": _case("nvflare-offload", "0.1M", 4),
    "ours 4M 4 int8": _case("mutirao", "4M", 4, "int8"),
    "ours 4M 32 int8": _case("mutirao", "4M", 32, "int8"),
    "flower 4M 4": _case("flower", "4M", 4),
    "flower 4M 32": _case("flower", "4M", 32),
    "nvflare-offload 4M 4": _case("nvflare-offload", "4M", 4),
    "nvflare-offload 4M 32": _case("nvflare-offload", "4M", 32),
    "nvflare 4M 4": _case("nvflare", "4M", 4),
    "ours 64M 4 bf16": _case("mutirao", "64M", 4, "bf16"),
    "flower 64M 4": _case("flower", "64M", 4),
    "nvflare 64M 4": _case("nvflare", "64M", 4),
    "nvflare-offload 64M 4": _case("nvflare-offload", "64M", 4),
    "ours 256M 4 bf16": _case("mutirao", "256M", 4, "bf16"),
    "ours undisturbed": _case("mutirao", "4M", 4, "int8", 3),
    "ours killed": replace(_case("mutirao", "4M", 4, "int8", 3), disturbed=True),
    "flower killed": replace(_case("flower", "4M", 4, rounds=3), disturbed=True),
    "nvflare killed": replace(_case("nvflare", "4M", 4, rounds=3), disturbed=True),
}
"""One round where memory is compared: at its end ours hands out the change of the state, as the
next round would. Three where a server is killed in the second."""
ONCE = ("4M 32", "64M", "256M", "base", "killed", "undisturbed")
"""Cases with one of these in their name are run once."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", action="append", choices=CASES, help="only this case")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--chart", type=Path, default=CHART)
    arguments = parser.parse_args()
    silence()
    folder = cache_directory() / "bench-aggregator"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "records.jsonl"
    if arguments.fresh:
        kept.unlink(missing_ok=True)
    records = _read(kept)
    nvflare = _install_nvflare(folder)
    for case, repeat in _plan(arguments.only or list(CASES), arguments.repeats):
        if any((each["case"], each["repeat"]) == (case, repeat) for each in records):
            continue
        record = {"case": case, "repeat": repeat, **_run(CASES[case], folder, nvflare)}
        records.append(record)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        _tell(record)
    result = _result(records, arguments, nvflare)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result["summary"], f"synthetic updates, {result['date']}", arguments.chart)
    print(table(result["summary"]))
    return 0


def _plan(cases: list[str], repeats: int) -> list[tuple[str, int]]:
    """Return what is run, in order: all cases once, then those again that are repeated."""
    return [
        (case, repeat)
        for repeat in range(repeats)
        for case in cases
        if repeat == 0 or not any(part in case for part in ONCE)
    ]


def _run(task: Task, folder: Path, nvflare: str) -> dict[str, Any]:
    """Run a case in processes of its own, and return its record."""
    if task.peer.startswith("nvflare") and not Path(nvflare).is_file():
        return {"outcome": "not installed", "reason": nvflare, **asdict(task)}
    work = folder / "run"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = replace(task, folder=str(work)).write()
    command = [sys.executable, str(ROOT / "benchmarks/aggregator_run.py"), str(path), nvflare]
    environment = dict(os.environ)
    if _has_namespaces():
        command = ["unshare", "--net", *command]
        environment["MUTIRAO_BENCH_NAMESPACE"] = "1"
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=RUN_LIMIT_S,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        found = {"outcome": "failed", "reason": str(error)[:500]}
    about = {key: value for key, value in asdict(task).items() if key not in ("folder", "port")}
    if found["outcome"] == "finished" or task.disturbed:
        shutil.rmtree(work, ignore_errors=True)
    else:
        shutil.rmtree(folder / "failed", ignore_errors=True)
        work.rename(folder / "failed")
    return about | {"num_parameters": count_parameters(task.size)} | found


def _has_namespaces() -> bool:
    """Whether this machine lets us make a network namespace, and count its bytes."""
    script = "ip link set lo up"
    try:
        done = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def _install_nvflare(folder: Path) -> str:
    """Return the Python of NVFlare's environment, or why there is none."""
    try:
        return str(make_environment(folder / "nvflare", REQUIREMENTS))
    except PeerError as error:
        return f"NVFlare could not be installed: {error}"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tell(record: dict[str, Any]) -> None:
    peak = record.get("peak_bytes", 0) / 1e6
    print(
        f"{time.strftime('%H:%M:%S')} {record['case']}: {record['outcome']}, {peak:.0f} MB, "
        f"{record.get('wall_s', 0):.0f} s {record.get('recovery', '')}",
        file=sys.stderr,
    )


def _result(
    records: list[dict[str, Any]], arguments: argparse.Namespace, nvflare: str
) -> dict[str, Any]:
    records = [each for each in records if each["case"] in CASES]
    return {
        "command": _command(arguments),
        "is_complete": {each["case"] for each in records} == {*CASES},
        "date": time.strftime("%Y-%m-%d"),
        "data": "synthetic: sites answer at once with random float tensors, nothing is trained",
        "machine": describe_machine(),
        "versions": {
            "mutirao": version("mutirao"),
            "flwr": version("flwr"),
            "numpy": version("numpy"),
            "nvflare": REQUIREMENTS[0].partition("==")[2] if Path(nvflare).is_file() else nvflare,
        },
        "summary": summarize(records),
        "records": records,
    }


def _command(arguments: argparse.Namespace) -> str:
    words = [f"--repeats {arguments.repeats}"]
    words += [f'--only "{case}"' for case in arguments.only or ()]
    return f"make bench-aggregator ARGS='{' '.join(words)}'"


if __name__ == "__main__":
    sys.exit(main())
