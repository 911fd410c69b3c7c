"""Predicted beside measured speed, for several placements of one model.

    make bench-plan
    python benchmarks/bench_plan.py [MODEL] [--threads 2] [--tokens 24] [--rounds 3] [--quiet 60]
                                          [--case NAME ...] [--json FILE]

MODEL is a GGUF file, a folder, or a weight store; by default that of bench_inference.py. Each
placement runs in a process of its own, in rounds interleaved with the others; the machine is
probed right after each run, because a virtual disk's speed changes by the minute. A placement
with drafts runs cycles of a fixed number of drafts and one check, so that its time does not
depend on what text it writes. Before each run up to ``--quiet`` seconds are waited until other
programs rest; a run during which they took more than a tenth of the processors is not counted,
as long as another one was better.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from inference.materials import fetch_model

from mutirao.inference.architecture.program import compile_program
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.planning.cost_model import expected_tokens, predict
from mutirao.inference.planning.memory_use import memory_needed
from mutirao.inference.planning.placement import multiplied, only_looked_up, pin, split
from mutirao.inference.planning.probe import measure
from mutirao.inference.store.weight_store import WeightStore

PROMPT_TOKENS = 128
CONTEXT = 512
ACCEPTANCE = 0.8
"""Of drafted tokens, to turn the time of a cycle into tokens per second; any value does."""

MAX_OTHERS = 0.1

MIB = 1 << 20
CASES: dict[str, tuple[str, float, int, dict[str, int]]] = {
    "all resident": ("pin", 1.0, 0, {}),
    "25 % streamed": ("pin", 0.75, 0, {}),
    "50 % streamed": ("pin", 0.5, 0, {}),
    "75 % streamed": ("pin", 0.25, 0, {}),
    "50 %, ring 4 MiB, pieces 256 KiB": (
        *("pin", 0.5, 0),
        {"ring_bytes": 4 * MIB, "piece_bytes": MIB // 4},
    ),
    "50 %, ring 32 MiB, pieces 4 MiB": (
        *("pin", 0.5, 0),
        {"ring_bytes": 32 * MIB, "piece_bytes": 4 * MIB},
    ),
    "50 %, one reader": ("pin", 0.5, 0, {"num_readers": 1}),
    "15 % in lower planes, 5 drafts": ("split", 0.85, 5, {}),
    "30 % in lower planes, 7 drafts": ("split", 0.7, 7, {}),
    "30 % in lower planes, 15 drafts": ("split", 0.7, 15, {}),
}
"""How it is chosen, the share that is resident, drafted tokens, changes of the placement."""


WHAT = ("predicted", "measured")
COLUMNS = (
    ("tokens_per_s", 1, 2),
    ("bytes_per_token", 1e6, 0),
    ("first_token_s", 1, 2),
    ("memory", 1e6, 0),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=24, help="full passes in a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet", type=float, default=60, help="seconds to wait for it, at most")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_run(arguments)))
        return 0
    store = WeightStore.open_or_build(arguments.model or fetch_model(None))
    names = arguments.case or list(CASES)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names:
            _wait_for_quiet(arguments.quiet)
            command = [sys.executable, __file__, str(store.directory), "--child", name]
            command += ["--threads", str(arguments.threads), "--tokens", str(arguments.tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0:
                runs[name].append(json.loads(done.stdout))
                last = runs[name][-1]
                print(
                    f"round {number + 1}, {name}: {last['predicted_tokens_per_s']:.2f} predicted, "
                    f"{last['measured_tokens_per_s']:.2f} measured, others took "
                    f"{100 * last['others']:.0f} %",
                    file=sys.stderr,
                )
    result = {name: _medians(found) for name, found in runs.items() if found}
    _print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one placement, probe, and predict it."""
    how, share, draft_length, changes = CASES[arguments.child]
    store = WeightStore.open(arguments.model)
    program = compile_program(store.spec)
    matrices, lookups = multiplied(program, store.tensors), only_looked_up(program, store.tensors)
    budget = int(share * sum(each.num_bytes for each in matrices))
    choice = (pin if how == "pin" else split)(matrices, lookups, budget)
    if choice is None:
        sys.exit(1)  # the weights have no planes to leave out
    settings = {"num_readers": 8, "ring_bytes": 16 * MIB, "piece_bytes": MIB} | changes
    placement = Placement(
        choice.resident if share < 1 else {each.name: NOTHING for each in lookups},
        num_threads=arguments.threads,
        max_tokens=PROMPT_TOKENS,
        max_logit_rows=draft_length + 1,
        context=CONTEXT,
        **settings,
    )
    measured = _measured(store, placement, draft_length, arguments.tokens)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    machine = measure(store.directory, arguments.threads)
    acceptance = ACCEPTANCE if draft_length else None
    predicted = predict(
        machine,
        store.spec,
        store.tensors,
        placement,
        draft_length=draft_length,
        acceptance=acceptance,
        position=PROMPT_TOKENS,
    )
    yielded = expected_tokens(ACCEPTANCE, draft_length)
    return {
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "measured_tokens_per_s": yielded / measured["cycle_s"],
        "predicted_bytes_per_token": predicted.bytes_per_token,
        "measured_bytes_per_token": measured["bytes"] / yielded,
        "predicted_first_token_s": predicted.time_to_first_token_s,
        "measured_first_token_s": measured["first_token_s"],
        "predicted_memory": float(memory_needed(store.spec, store.tensors, placement).total),
        "measured_memory": float(peak_bytes),
        "others": max(measured["others"], machine.waited_share),
        "disk_bytes_per_s": max(each.bytes_per_s for each in machine.reads),
    }


def _measured(
    store: WeightStore, placement: Placement, draft_length: int, num_cycles: int
) -> dict[str, float]:
    """Run a prompt, then cycles: drafts and a check, or one token at a time."""
    prompt = [17 + 31 * index % 1000 for index in range(PROMPT_TOKENS)]
    with NativeBackend(store, placement) as backend:
        backend.run(prompt, 0)  # reading checks the sums the first time
        begin_s = time.perf_counter()
        backend.run(prompt, 0)
        first_token_s = time.perf_counter() - begin_s
        seconds, first, processors = [], backend.bytes_read, _Processors()
        room = CONTEXT - PROMPT_TOKENS - draft_length - 1
        for cycle in range(num_cycles):
            position = PROMPT_TOKENS + cycle % room
            begin_s = time.perf_counter()
            tokens = [position]
            for index in range(draft_length):
                row = backend.run(tokens[-1:], position + index, mode="draft")[0]
                tokens.append(int(row.argmax()))
            rows = backend.run(tokens, position, logits="all")
            rows.argmax(1)
            seconds.append(time.perf_counter() - begin_s)
        num_bytes = (backend.bytes_read - first) / num_cycles
        others = processors.others()
    cycle_s = sum(seconds) / num_cycles
    return {
        "cycle_s": cycle_s,
        "bytes": num_bytes,
        "first_token_s": first_token_s,
        "others": others,
    }


class _Processors:
    """Which part of the processors others use, from its making on."""

    def __init__(self) -> None:
        self.busy_s, self.own_s, self.begin_s = _busy_s(), time.process_time(), time.monotonic()

    def others(self) -> float:
        seconds = (time.monotonic() - self.begin_s) * (os.cpu_count() or 1)
        own_s = time.process_time() - self.own_s
        return max(_busy_s() - self.busy_s - own_s, 0.0) / seconds


def _busy_s() -> float:
    """Processor time of all processors since the start, idle and waiting for disks left out."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    ticks = [int(each) for each in fields]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _wait_for_quiet(most_s: float) -> None:
    end_s = time.monotonic() + most_s
    while time.monotonic() < end_s:
        processors = _Processors()
        time.sleep(3)
        if processors.others() < 0.05:
            return


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    runs = [each for each in runs if each["others"] <= MAX_OTHERS] or runs
    result = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    errors = [each["predicted_tokens_per_s"] / each["measured_tokens_per_s"] - 1 for each in runs]
    return result | {"error": statistics.median(errors), "worst_error": max(errors, key=abs)}


def _print(result: dict[str, dict[str, float]]) -> None:
    print("each pair: predicted, measured")
    print(
        f"{'placement':34} {'tokens/s':>15} {'error':>7} {'worst':>7} {'MB/token':>13} "
        f"{'first token s':>13} {'memory MB':>13} {'others':>6}"
    )
    for name, found in result.items():
        pairs = [
            " ".join(f"{found[f'{what}_{key}'] / unit:.{digits}f}" for what in WHAT)
            for key, unit, digits in COLUMNS
        ]
        print(
            f"{name:34} {pairs[0]:>15} {100 * found['error']:>+6.0f}% "
            f"{100 * found['worst_error']:>+6.0f}% {pairs[1]:>13} {pairs[2]:>13} {pairs[3]:>13} "
            f"{100 * found['others']:>5.0f}%"
        )


if __name__ == "__main__":
    sys.exit(main())
