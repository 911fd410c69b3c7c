"""One run: a fresh process, cold, under its limit; what came of it as one record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.cgroup import MemoryLimit
from inference.machine import CPUTimes, make_cold, wait_for_quiet
from inference.peers import CONTEXT_TOKENS, NUM_THREADS, Budget, Materials, Peer

START_S = 120.0
"""Longest time to load a model, in seconds. Cold and without a limit the slowest peer took 33 s
(AirLLM, 2026-11-22); one that takes four times as long lacks memory."""
STEP_S = 60.0
"""Longest time for the tokens of a prompt that come after its time is over; an assumption."""
PREPARE_S = 3600.0
"""Longest time for what is made once."""


@dataclass(frozen=True)
class Settings:
    """What is the same for all runs."""

    prompts: dict[str, list[int]]
    stop_ids: list[int]
    max_tokens: int
    can_limit: bool
    quiet_s: float
    """Longest wait for the machine to be quiet."""


@dataclass(frozen=True)
class _Ended:
    """How a process ended."""

    status: int
    timed_out: bool
    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    output: str
    errors: str


def measure(
    peer: Peer, budget: Budget, extra_bytes: int, materials: Materials, settings: Settings
) -> dict[str, Any]:
    """Run a peer once.

    Returns:
        The record: ``outcome`` is ok, oom, timeout or error; ``run`` is the runner's own JSON.
    """
    weights = peer.weights(materials, budget)
    assert weights is not None
    files = [file for file in peer.files(materials, budget) if file.is_file()]
    base = budget.limit_bytes(materials.model.stat().st_size)
    limit_bytes = None if base is None else base + extra_bytes
    others = wait_for_quiet(settings.quiet_s)
    is_cold = make_cold(files)
    limit = MemoryLimit(limit_bytes) if settings.can_limit else None
    try:
        before = CPUTimes.now()
        ended = _run(peer, budget, limit_bytes, limit, materials, settings)
        after = CPUTimes.now()
        num_oom_kills = limit.num_oom_kills() if limit else 0
        peak_bytes = limit.peak_bytes() if limit else None
    finally:
        if limit:
            limit.close()
    run = _parse(ended.output)
    cores = os.cpu_count() or 1
    busy_s = max(0.0, after.busy_s - before.busy_s - ended.cpu_s)
    return {
        "outcome": _outcome(ended, num_oom_kills, run),
        "limit_bytes": limit_bytes,
        "extra_bytes": extra_bytes,
        "is_cold": is_cold,
        "peak_bytes": peak_bytes,
        "max_rss_bytes": ended.max_rss_bytes,
        "wall_s": round(ended.wall_s, 2),
        "cpu_s": round(ended.cpu_s, 2),
        "others_before": others,
        "others_share": round(busy_s / ended.wall_s / cores, 3),
        "stolen_share": round((after.stolen_s - before.stolen_s) / ended.wall_s / cores, 3),
        "weights": weights.name,
        "weights_bytes": sum(file.stat().st_size for file in files),
        "error": "" if run and not num_oom_kills else ended.errors[-800:],
        "run": run,
    }


def prepare(peer: Peer, materials: Materials, settings: Settings) -> str:
    """Let a peer make once what it keeps (a store, shards); return its error, '' if none."""
    budget = Budget(0.75)
    ended = _run(peer, budget, None, None, materials, settings, dict(peer.prepare))
    return ended.errors[-800:] if ended.status else ""


def _run(
    peer: Peer,
    budget: Budget,
    limit_bytes: int | None,
    limit: MemoryLimit | None,
    materials: Materials,
    settings: Settings,
    more_options: dict[str, Any] | None = None,
) -> _Ended:
    options = {**peer.options(materials, budget), **(more_options or {})}
    if limit and peer.enters_limit_itself:
        options["limit_procs"] = str(limit.procs)
    task = {
        "model": str(peer.weights(materials, budget)),
        "prompts": list(settings.prompts.values()),
        "stop_ids": settings.stop_ids,
        "max_tokens": settings.max_tokens,
        "seconds_per_prompt": peer.seconds_per_prompt,
        "threads": NUM_THREADS,
        "context_tokens": CONTEXT_TOKENS,
        "memory_bytes": limit_bytes,
        "options": options,
        "started": time.monotonic(),
    }
    runner = str(Path(__file__).with_name(peer.runner))
    command = [str(peer.python(materials)), "-X", "utf8", runner, json.dumps(task)]
    seconds = len(settings.prompts) * (peer.seconds_per_prompt + STEP_S)
    procs = limit.procs if limit and not peer.enters_limit_itself else None
    return _supervise(command, procs, START_S if limit else PREPARE_S, seconds)


def _supervise(command: list[str], procs: Path | None, start_s: float, run_s: float) -> _Ended:
    """Run a command, in a control group if one is given.

    Args:
        command: prints something when it is ready.
        procs: takes its process id; None: no control group.
        start_s: longest time until it is ready.
        run_s: longest time from then on.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
            preexec_fn=(lambda: _enter(procs)) if procs else None,
        )
        timed_out = is_ready = False
        deadline = started + start_s
        try:
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                if not is_ready and os.fstat(output.fileno()).st_size:
                    is_ready, deadline = True, time.monotonic() + run_s
                if time.monotonic() > deadline:
                    timed_out = True
                    _kill(process.pid)
                time.sleep(0.05)
        except BaseException:
            _kill(process.pid)
            raise
        _kill(process.pid)  # whatever it has left behind
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        usage = ended[2]
        output.seek(0)
        errors.seek(0)
        return _Ended(
            status=process.returncode,
            timed_out=timed_out,
            wall_s=time.monotonic() - started,
            cpu_s=usage.ru_utime + usage.ru_stime,
            max_rss_bytes=usage.ru_maxrss * 1024,
            output=output.read().decode(errors="replace"),
            errors=errors.read().decode(errors="replace"),
        )


def _kill(process_group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)


def _enter(procs: Path) -> None:
    procs.write_text(str(os.getpid()))


def _parse(output: str) -> dict[str, Any] | None:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        return None
    with suppress(ValueError):
        run: dict[str, Any] = json.loads(lines[-1])
        return run
    return None


def _outcome(ended: _Ended, num_oom_kills: int, run: dict[str, Any] | None) -> str:
    if num_oom_kills:
        return "oom"
    if ended.timed_out:
        return "timeout"
    return "ok" if ended.status == 0 and run else "error"
