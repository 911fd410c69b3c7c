"""Predicted beside measured speed, for several placements of one model.

    python benchmarks/bench_plan.py MODEL [--threads 2] [--tokens 24] [--rounds 3] [--json FILE]

MODEL is a GGUF file, a folder, or a weight store. Each placement runs in a process of its own,
in rounds interleaved with the others; the machine is probed right before each run, because a
virtual disk's speed changes by the minute. A placement with drafts runs cycles of a fixed number
of drafts and one check, so that its time does not depend on what text it writes. Where another
program uses the processor (see the load that is printed), the figures mean little.
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

from mutirao.inference.cost_model import expected_tokens, predict
from mutirao.inference.memory_use import memory_needed
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.placement import multiplied, only_looked_up, pin, split
from mutirao.inference.probe import measure
from mutirao.inference.program import compile_program
from mutirao.inference.weight_store import WeightStore

PROMPT_TOKENS = 128
CONTEXT = 512
ACCEPTANCE = 0.8
"""Of drafted tokens, to turn the time of a cycle into tokens per second; any value does."""

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=24, help="full passes in a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_run(arguments)))
        return 0
    store = WeightStore.open_or_build(arguments.model)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for number in range(arguments.rounds):
        print(f"round {number + 1}, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
        for name in CASES:
            command = [sys.executable, __file__, str(store.directory), "--case", name]
            command += ["--threads", str(arguments.threads), "--tokens", str(arguments.tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0:
                runs[name].append(json.loads(done.stdout))
    result = {name: _medians(found) for name, found in runs.items() if found}
    _print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, float]:
    """Probe, predict and measure one placement."""
    how, share, draft_length, changes = CASES[arguments.case]
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
    measured = _measured(store, placement, draft_length, arguments.tokens)
    yielded = expected_tokens(ACCEPTANCE, draft_length)
    return {
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "measured_tokens_per_s": yielded / measured["cycle_s"],
        "predicted_bytes_per_token": predicted.bytes_per_token,
        "measured_bytes_per_token": measured["bytes"] / yielded,
        "predicted_first_token_s": predicted.time_to_first_token_s,
        "measured_first_token_s": measured["first_token_s"],
        "predicted_memory": float(memory_needed(store.spec, store.tensors, placement).total),
        "measured_memory": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "load": os.getloadavg()[0],
        "probe_spread": machine.spread,
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
        seconds, first = [], backend.bytes_read
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
    cycle_s = sum(seconds) / num_cycles
    return {"cycle_s": cycle_s, "bytes": num_bytes, "first_token_s": first_token_s}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    result = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    errors = [each["predicted_tokens_per_s"] / each["measured_tokens_per_s"] - 1 for each in runs]
    return result | {"error": statistics.median(errors), "worst_error": max(errors, key=abs)}


def _print(result: dict[str, dict[str, float]]) -> None:
    print(
        f"{'placement':34} {'tokens/s':>15} {'error':>7} {'worst':>7} {'MB/token':>13} "
        f"{'first token s':>13} {'memory MB':>13} {'load':>5}"
    )
    print(f"{'':34} {'predicted, measured':>15}")
    for name, found in result.items():
        pairs = [
            f"{found[f'predicted_{key}'] / unit:.{digits}f} {found[f'measured_{key}'] / unit:.{digits}f}"
            for key, unit, digits in (
                ("tokens_per_s", 1, 2),
                ("bytes_per_token", 1e6, 0),
                ("first_token_s", 1, 2),
                ("memory", 1e6, 0),
            )
        ]
        print(
            f"{name:34} {pairs[0]:>15} {100 * found['error']:>+6.0f}% "
            f"{100 * found['worst_error']:>+6.0f}% {pairs[1]:>13} {pairs[2]:>13} {pairs[3]:>13} "
            f"{found['load']:>5.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
