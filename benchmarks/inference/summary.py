"""From the records of single runs to medians, ratios and a table."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from inference.peers import PEERS

FIRST_TOKENS = 50
MIN_STEADY_TOKENS = 20
BASELINES = ("llama.cpp", "llama.cpp-tuned", "llama.cpp-ngram", "accelerate", "airllm", "smaller")

Record = dict[str, Any]


def steady_start(num_tokens: int) -> int:
    """Return from which token on a run counts as steady.

    The 50th, where at least 20 more came; otherwise the middle of what came.
    """
    if num_tokens >= FIRST_TOKENS + MIN_STEADY_TOKENS:
        return FIRST_TOKENS - 1
    return max(0, (num_tokens - 1) // 2)


def figures(record: Record) -> dict[str, float | None]:
    """Return one run's figures, its prompts taken together (sums over sums).

    Bytes are per token and from the process's own account; ``device_bytes_per_token`` is the
    whole device's, other processes' reads included.
    """
    run = record["run"]
    first: list[tuple[float, float]] = []
    steady: list[tuple[float, float, float, float]] = []
    for prompt in run["prompts"]:
        seconds = prompt["seconds"]
        if len(seconds) < 2:
            continue
        end = min(FIRST_TOKENS, len(seconds)) - 1
        first.append((end, seconds[end] - seconds[0]))
        start, last = steady_start(len(seconds)), len(seconds) - 1
        read = prompt["read_bytes"][last] - prompt["read_bytes"][start]
        device = prompt["device_bytes"][last] - prompt["device_bytes"][start]
        steady.append((last - start, seconds[last] - seconds[start], read, device))
    num, duration, read, device = map(sum, zip(*steady, strict=True)) if steady else [0] * 4
    answered = [prompt for prompt in run["prompts"] if prompt["seconds"]]
    return {
        "tokens_per_s": _ratio(num, duration),
        "first_tokens_per_s": _ratio(sum(n for n, _ in first), sum(s for _, s in first)),
        "time_to_first_token_s": statistics.median(p["seconds"][0] for p in answered),
        "cold_start_s": answered[0]["started_s"] + answered[0]["seconds"][0],
        "bytes_per_token": _ratio(read, num),
        "device_bytes_per_token": _ratio(device, num),
        "num_tokens": sum(len(prompt["ids"]) for prompt in run["prompts"]),
        "peak_bytes": record["peak_bytes"],
        "others_share": record["others_share"],
    }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def summarize(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Return, by peer and budget, the median, lowest and highest of each figure.

    Returns:
        ``{peer: {budget: {"outcomes": {...}, "extra_bytes": ..., FIGURE: {median, lowest,
        highest}}}}``; figures are missing where no run succeeded.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["peer"], record["budget"]].append(record)
    summary: dict[str, dict[str, Any]] = defaultdict(dict)
    for (peer, budget), group in groups.items():
        good = [record for record in group if record["outcome"] == "ok"]
        outcomes = [record["outcome"] for record in group]
        cell: dict[str, Any] = {
            "outcomes": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
            "limit_bytes": (good or group)[-1]["limit_bytes"],
            "extra_bytes": (good or group)[-1]["extra_bytes"],
            "weights": group[-1]["weights"],
            "weights_bytes": group[-1]["weights_bytes"],
        }
        rows = [figures(record) for record in good]
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows if row[name] is not None]
            if values:
                cell[name] = _spread(values)
        summary[peer][budget] = cell
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = (statistics.median(values), min(values), max(values))
    return dict(
        zip(("median", "lowest", "highest"), (float(f"{x:.4g}") for x in spread), strict=True)
    )


def same_tokens(records: Iterable[Record], peers: Sequence[str]) -> dict[str, Any]:
    """Compare the greedy tokens of our engine's runs with those of its all-resident run.

    Returns:
        ``reference``: a hash of the all-resident run's token ids and how many they are;
        ``runs``: for each peer and budget whether every run gave exactly these. Empty where
        there is no all-resident run.
    """
    records = [
        record for record in records if record["peer"] in peers and record["outcome"] == "ok"
    ]
    reference = [r for r in records if r["budget"] == "none" and r["peer"] == peers[0]]
    if not reference:
        return {}
    expected = token_ids(reference[0])
    runs: dict[str, bool] = {}
    for record in records:
        key = f"{record['peer']} at {record['budget']}"
        runs[key] = runs.get(key, True) and token_ids(record) == expected
    return {
        "reference": {"sha256": hash_ids(expected), "num_tokens": [len(ids) for ids in expected]},
        "runs": runs,
        "all": all(runs.values()),
    }


def token_ids(record: Record) -> list[list[int]]:
    """Return the generated token ids of each prompt of a run."""
    return [prompt["ids"] for prompt in record["run"]["prompts"]]


def hash_ids(ids: list[list[int]]) -> str:
    """Return a sha256 of token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def ratios(summary: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return our median tokens/s over each peer's, by our line and budget."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours in ("ours", "ours-speculation", "ours-bfloat16"):
        for budget, cell in summary.get(ours, {}).items():
            if "tokens_per_s" not in cell:
                continue
            mine = cell["tokens_per_s"]["median"]
            found.setdefault(ours, {})[budget] = {
                peer: round(mine / other["tokens_per_s"]["median"], 2)
                for peer in BASELINES
                if "tokens_per_s" in (other := summary.get(peer, {}).get(budget, {}))
            }
    return found


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Return the summary as a Markdown table, ready for docs/benchmarks."""
    lines = [
        "| engine | budget | limit | tokens/s, steady | first 50 | first token | MB read per "
        "token | peak | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for peer in PEERS:
        cells = summary.get(peer.name, {})
        for budget in sorted(cells, key=_budget_order):
            lines.append(_row(peer.label, budget, cells[budget]))
    return "\n".join(lines)


def _budget_order(budget: str) -> float:
    return -float("inf") if budget == "none" else -float(budget)


def _row(label: str, budget: str, cell: dict[str, Any]) -> str:
    limit = "none" if cell["limit_bytes"] is None else f"{cell['limit_bytes'] / 1e6:.0f} MB"
    if cell["extra_bytes"]:
        limit += f" (with {cell['extra_bytes'] / 1e6:.0f} MB more)"
    share = "no limit" if budget == "none" else f"{budget} × + 250 MB"
    failed = {name: num for name, num in cell["outcomes"].items() if name != "ok"}
    return " | ".join(
        [
            f"| {label}",
            share,
            limit,
            _with_spread(cell.get("tokens_per_s")),
            _number(cell.get("first_tokens_per_s")),
            _number(cell.get("time_to_first_token_s"), " s"),
            _number(cell.get("bytes_per_token"), scale=1e-6),
            _number(cell.get("peak_bytes"), " MB", scale=1e-6),
            (", ".join(f"{num} {name}" for name, num in failed.items()) or "no") + " |",
        ]
    )


def _number(spread: dict[str, float] | None, unit: str = "", scale: float = 1.0) -> str:
    return "–" if spread is None else f"{_short(spread['median'] * scale)}{unit}"


def _with_spread(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "–"
    return f"{_short(spread['median'])} ({_short(spread['lowest'])}–{_short(spread['highest'])})"


def _short(value: float) -> str:
    """Three figures at most, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
