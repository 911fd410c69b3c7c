"""Tokens per second and bytes per token against memory: Mutirão's engine and its peers.

Every run is a fresh process, started cold inside a memory limit of its own: 1.25, 1.0, 0.75
and 0.5 times the model's file plus 250 MB, the same for everybody. Three chat prompts, greedy.
Runs are interleaved, repeated, and written down one by one, so that an interrupted benchmark
goes on where it stopped. Writes docs/benchmarks/data/inference.json and inference.svg beside
it, and prints a table.

    make bench-inference                                       (about 3 hours on 2 cores)
    python benchmarks/bench_inference.py --only ours,llama.cpp --budgets 0.75 --repeats 1

Needs root for the memory limits and for emptying the page cache; elsewhere it says so and the
bytes alone count. The first start downloads 1.1 GB, builds llama.cpp, and takes 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inference.cgroup import can_limit
from inference.chart import draw
from inference.installation import LLAMA_CPP_VERSION, build_llama_cpp, install_python_peers
from inference.machine import describe_machine
from inference.materials import (
    MODEL_NAME,
    MODEL_SHA256,
    bfloat16_directory,
    fetch_model,
    materials_folder,
    quality,
    smaller_quantization,
)
from inference.measure import Settings, measure, prepare
from inference.peers import (
    CONTEXT_TOKENS,
    EXTRA_STEPS_BYTES,
    NUM_THREADS,
    OVERHEAD_BYTES,
    PEERS,
    Budget,
    Materials,
    Peer,
)
from inference.prompts import encode_prompts
from inference.summary import figures, ratios, same_tokens, summarize, table

from mutirao.environment import cache_directory, runs_directory, silence
from mutirao.errors import INTERRUPTED_EXIT_CODE, MutiraoError

ROOT = Path(__file__).parents[1]
DEFAULT_BUDGETS = "none,1.25,1.0,0.75,0.5"
Record = dict[str, Any]


def main() -> int:
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process is left behind
    silence()
    journal = _Journal(arguments.run / "records.jsonl", fresh=arguments.fresh)
    wanted = _select(arguments.only)
    budgets = [Budget.parse(name) for name in arguments.budgets.split(",")]
    try:
        if not arguments.report:
            _measure_all(wanted, budgets, arguments, journal)
        _report(journal, arguments)
    except MutiraoError as error:
        _tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _tell("Stopped. What is finished is kept: the same command goes on from here.")
        return INTERRUPTED_EXIT_CODE
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(peer.name for peer in PEERS)
    parser.add_argument("--only", default="", help=f"peers, comma-separated, of: {names}")
    parser.add_argument("--budgets", default=DEFAULT_BUDGETS, help="shares of the file, or none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256, help="per prompt")
    parser.add_argument("--quiet", type=float, default=60.0, help="most seconds to wait for quiet")
    parser.add_argument("--model", type=Path, help="the GGUF file, if it is here already")
    parser.add_argument("--run", type=Path, default=runs_directory() / "bench-inference")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--redo", action="store_true", help="measure the selected runs again")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/data/inference.json")
    return parser.parse_args()


def _select(only: str) -> list[Peer]:
    if not only:
        return list(PEERS)
    known = {peer.name: peer for peer in PEERS}
    if unknown := set(only.split(",")) - known.keys():
        sys.exit(f"--only={only}: unknown {', '.join(unknown)} (expected of {', '.join(known)})")
    return [known[name] for name in only.split(",")]


class _Journal:
    """Finished runs, one line of JSON each; a line that a crash has cut is dropped."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.records: list[Record] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            self.records = [json.loads(line) for line in whole]
            if len(whole) < len(lines):
                path.write_text("".join(whole), encoding="utf-8")

    def add(self, record: Record) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def find(self, **keys: object) -> list[Record]:
        return [
            record
            for record in self.records
            if all(record.get(name) == value for name, value in keys.items())
        ]

    def forget(self, **keys: object) -> None:
        gone = {id(record) for record in self.find(**keys)}
        self.records = [record for record in self.records if id(record) not in gone]
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in self.records)
        self.path.write_text(text, encoding="utf-8")


def _measure_all(
    peers: Sequence[Peer],
    budgets: Sequence[Budget],
    arguments: argparse.Namespace,
    journal: _Journal,
) -> None:
    materials = _gather(peers, budgets, arguments.model)
    why_not = can_limit()
    if why_not:
        _tell(f"No memory limit: {why_not}. Only bytes are comparable.")
    prompts = encode_prompts(
        bfloat16_directory(materials.model), materials_folder() / "prompts.json"
    )
    settings = Settings(
        prompts=prompts["ids"],
        stop_ids=prompts["stop_ids"],
        max_tokens=arguments.max_tokens,
        can_limit=why_not is None,
        quiet_s=arguments.quiet,
    )
    if arguments.redo:
        for peer in peers:
            for budget in budgets:
                journal.forget(peer=peer.name, budget=budget.name)
    peers = _prepare(peers, materials, settings)
    runs = list(_plan(peers, budgets, materials, arguments.repeats, why_not is None))
    for number, (peer, budget, repeat) in enumerate(runs, start=1):
        if journal.find(peer=peer.name, budget=budget.name, repeat=repeat, final=True):
            continue
        _tell(f"[{number}/{len(runs)}] {peer.name}, budget {budget.name}, repeat {repeat + 1}")
        _measure_with_extra(peer, budget, repeat, materials, settings, journal)


def _gather(peers: Sequence[Peer], budgets: Sequence[Budget], model: Path | None) -> Materials:
    """Bring here, build and convert what the selected peers need."""
    folder = cache_directory() / "bench-peers"
    folder.mkdir(parents=True, exist_ok=True)
    _tell("The model …")
    model = fetch_model(model)
    runners = {peer.runner for peer in peers}
    programs = python = None
    smaller: dict[str, tuple[str, Path]] = {}
    _tell("The same weights in bfloat16, and the prompts …")
    bfloat16 = bfloat16_directory(model)
    if "run_llama_cpp.py" in runners:
        _tell("llama.cpp …")
        programs = build_llama_cpp(folder)
    if runners & {"run_accelerate.py", "run_airllm.py"}:
        _tell("accelerate and AirLLM …")
        python = install_python_peers(folder)
    if programs and any(peer.model == "smaller" for peer in peers):
        _tell("Smaller quantizations …")
        for budget in budgets:
            limit = budget.limit_bytes(model.stat().st_size)
            if limit and (found := smaller_quantization(model, limit, programs)):
                smaller[budget.name] = found
    return Materials(model, bfloat16, smaller, python, programs, materials_folder())


def _prepare(peers: Sequence[Peer], materials: Materials, settings: Settings) -> list[Peer]:
    """Let each peer make what it keeps; one that cannot is told and left out."""
    ready = []
    for peer in peers:
        if peer.prepare:
            _tell(f"Preparing {peer.name} …")
            if error := prepare(peer, materials, settings):
                _tell(f"{peer.name} does not run here and is left out: {error}")
                continue
        ready.append(peer)
    return ready


def _plan(
    peers: Sequence[Peer],
    budgets: Sequence[Budget],
    materials: Materials,
    repeats: int,
    limited: bool,
) -> Iterator[tuple[Peer, Budget, int]]:
    """Yield runs so that every peer has its turn before any is repeated."""
    for repeat in range(repeats):
        for budget in budgets:
            for peer in peers:
                if budget.share is None and not peer.runs_unlimited and limited:
                    continue
                if peer.weights(materials, budget) is not None:
                    yield peer, budget, repeat


def _measure_with_extra(
    peer: Peer,
    budget: Budget,
    repeat: int,
    materials: Materials,
    settings: Settings,
    journal: _Journal,
) -> None:
    """Measure one run; where a peer does not run and may have more memory, with more."""
    known = [r["extra_bytes"] for r in journal.find(peer=peer.name, budget=budget.name, final=True)]
    least = max(known, default=0)
    steps = [extra for extra in EXTRA_STEPS_BYTES if extra >= least] if peer.needs_extra else [0]
    for extra_bytes in steps:
        record = measure(peer, budget, extra_bytes, materials, settings)
        is_final = record["outcome"] not in ("oom", "timeout") or extra_bytes == steps[-1]
        key = {"peer": peer.name, "budget": budget.name, "repeat": repeat, "final": is_final}
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        journal.add({**key, "date": date, "max_tokens": settings.max_tokens, **record})
        _tell(f"    {_one_line(record)}")
        if is_final:
            return


def _one_line(record: Record) -> str:
    if record["outcome"] != "ok":
        error = record["error"].strip()[-200:]
        return f"{record['outcome']} with {record['extra_bytes'] / 1e6:.0f} MB more: {error}"
    found = {name: value or 0.0 for name, value in figures(record).items()}
    return (
        f"{found['tokens_per_s']:.2f} tokens/s, {found['bytes_per_token'] / 1e6:.1f} MB per token, "
        f"first token {found['time_to_first_token_s']:.2f} s, peak {found['peak_bytes'] / 1e6:.0f} "
        f"MB, {found['num_tokens']:.0f} tokens; others took {record['others_share']:.0%}"
    )


def _report(journal: _Journal, arguments: argparse.Namespace) -> None:
    final = journal.find(final=True)
    if not final:
        _tell("Nothing has been measured.")
        return
    summary = summarize(final)
    machine = describe_machine()
    result = {
        "command": _command(arguments),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "model": {"name": MODEL_NAME, "sha256": MODEL_SHA256},
        "protocol": {
            "overhead_bytes": OVERHEAD_BYTES,
            "threads": NUM_THREADS,
            "context_tokens": CONTEXT_TOKENS,
            "max_tokens": sorted({record["max_tokens"] for record in final}),
            "repeats": 1 + max(record["repeat"] for record in final),
            "seconds_per_prompt": {peer.name: peer.seconds_per_prompt for peer in PEERS},
            "is_limited": any(record["peak_bytes"] for record in final),
            "is_cold": all(record["is_cold"] for record in final),
        },
        "versions": _versions(final),
        "same_tokens": same_tokens(final, ("ours", "ours-speculation")),
        "ratios": ratios(summary),
        "quality_of_smaller": _quality(final, arguments),
        "failed": _failed(journal),
        "results": summary,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"{MODEL_NAME} · {machine['processor']} · {result['date']}"
    try:
        draw(summary, title, arguments.out.with_suffix(".svg"))
    except ValueError as error:
        _tell(str(error))
    print(table(summary))
    _tell(f"Written to {arguments.out}")


def _command(arguments: argparse.Namespace) -> str:
    """Return the command that repeats this, without the paths of this machine."""
    only = f" --only {arguments.only}" if arguments.only else ""
    return (
        f"python benchmarks/bench_inference.py{only} --budgets {arguments.budgets} "
        f"--repeats {arguments.repeats} --max-tokens {arguments.max_tokens}"
    )


def _versions(records: Sequence[Record]) -> dict[str, str]:
    versions: dict[str, str] = {"llama.cpp from": LLAMA_CPP_VERSION}
    for record in records:
        if record["run"]:
            versions |= record["run"]["versions"]
    return versions


def _failed(journal: _Journal) -> list[dict[str, Any]]:
    """Return every run that ended for want of memory or time, those tried again included."""
    keys = ("peer", "budget", "repeat", "limit_bytes", "extra_bytes")
    failed = [*journal.find(outcome="oom"), *journal.find(outcome="timeout")]
    return [{key: record[key] for key in (*keys, "outcome")} for record in failed]


def _quality(records: Sequence[Record], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the smaller quantizations cost; measured once, then kept."""
    names = {record["weights"] for record in records if record["peer"] == "smaller"}
    if not names:
        return {}
    kept = arguments.run / "quality.json"
    known: dict[str, Any] = json.loads(kept.read_bytes()) if kept.is_file() else {}
    if missing := names - known.keys():
        _tell("What the smaller quantizations cost …")
        programs = build_llama_cpp(cache_directory() / "bench-peers")
        files = {name: materials_folder() / name for name in sorted(missing)}
        known |= quality(fetch_model(arguments.model), files, programs)
        kept.write_text(json.dumps(known), encoding="utf-8")
    return {name: known[name] for name in sorted(names)}


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
