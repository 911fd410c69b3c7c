"""Rows of finished settings as one table, and ours against the peers, paired by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mutirao.evaluate.losses import Difference, TextResult, paired_difference

Row = dict[str, Any]
ORIGINAL = "original"
OURS = "ours"
BITS_TOLERANCE = 0.01
"""A peer with so many more true bits per weight than ours still counts as having as many."""
STANDARD_ERRORS = 2.0
"""A difference above so many of them is worse."""


def difference(first: Row, second: Row) -> Difference:
    """Return the loss of one setting minus that of another, in nats per token, over windows."""
    return paired_difference(_result(first), _result(second))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return the finished rows with their figures, by true bits per weight, most first.

    Args:
        rows: of the original, of finished settings and of failed ones.
    """
    finished = [row for row in rows if row["state"] == "ok"]
    original = next(row for row in finished if row["name"] == ORIGINAL)
    found = []
    for row in finished:
        rise = difference(row, original)
        result = _result(row)
        figures = {
            "loss": result.loss,
            "perplexity": math.exp(result.loss),
            "rise": rise.mean,
            "rise_standard_error": rise.standard_error,
            "divergence": math.fsum(row["window_divergences"]) / result.num_tokens,
        }
        found.append(row | {name: round(value, 6) for name, value in figures.items()})
    return sorted(found, key=lambda row: (-math.floor(row["bits_per_weight"]), row["loss"]))


def compare(rows: Sequence[Row]) -> list[Row]:
    """Return every pair of ours and a peer that has at most as many bits, or is of its class.

    A class is the whole part of the true bits per weight. Peers of the class with more bits are
    there without a verdict.

    Args:
        rows: as ``summarize`` returns them.
    """
    pairs = []
    for ours in (row for row in rows if row["tool"] == OURS):
        for peer in (row for row in rows if row["tool"] not in (OURS, ORIGINAL)):
            has_more = peer["bits_per_weight"] > ours["bits_per_weight"] + BITS_TOLERANCE
            is_same = math.floor(peer["bits_per_weight"]) == math.floor(ours["bits_per_weight"])
            if has_more and not is_same:
                continue
            apart = difference(ours, peer)
            pair = {
                "ours": ours["name"],
                "peer": peer["name"],
                "bits_per_weight": ours["bits_per_weight"],
                "peer_bits_per_weight": peer["bits_per_weight"],
                "difference": round(apart.mean, 6),
                "standard_error": round(apart.standard_error, 6),
                "is_no_worse": None,
            }
            if not has_more:
                pair["is_no_worse"] = apart.mean <= STANDARD_ERRORS * apart.standard_error
            pairs.append(pair)
    return pairs


def markdown(rows: Sequence[Row], pairs: Sequence[Row], failed: Sequence[Row]) -> str:
    """Return all settings, the comparisons and what failed, as Markdown.

    Args:
        rows: as ``summarize`` returns them.
        pairs: as ``compare`` returns them.
        failed: rows of settings that failed.
    """
    lines = [
        "| setting | bits/weight | perplexity | rise, nats per token | KL | time | peak memory |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        "| ours | bits/weight | peers with at most as many | best of them (its bits) "
        "| ours minus it | no worse than any, 2 SE | better, with more bits |",
        "|---|---|---|---|---|---|---|",
        *(_verdict(row, pairs) for row in rows if row["tool"] == OURS),
    ]
    lines += ["", *(f"failed: {row['name']}: {row['reason']}" for row in failed)] if failed else []
    return "\n".join(lines)


def _line(row: Row) -> str:
    peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    seconds = f"{row['process_seconds']:.0f} s" if "process_seconds" in row else ""
    return (
        f"| {row['name']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.3f} "
        f"| {row['rise']:+.4f} ± {row['rise_standard_error']:.4f} | {row['divergence']:.4f} "
        f"| {seconds} | {peak} |"
    )


def _verdict(ours: Row, pairs: Sequence[Row]) -> str:
    own = [pair for pair in pairs if pair["ours"] == ours["name"]]
    judged = [pair for pair in own if pair["is_no_worse"] is not None]
    larger = [pair for pair in own if pair["is_no_worse"] is None and pair["difference"] > 0]
    better = ", ".join(f"{_of_peer(pair)} {_apart(pair)}" for pair in larger)
    head = f"| {ours['name']} | {ours['bits_per_weight']:.3f} | {len(judged)} "
    if not judged:
        return f"{head}| | | | {better} |"
    best = max(judged, key=lambda pair: float(pair["difference"]))
    worse = [_of_peer(pair) for pair in judged if not pair["is_no_worse"]]
    verdict = f"no: {', '.join(worse)}" if worse else "yes"
    return f"{head}| {_of_peer(best)} | {_apart(best)} | {verdict} | {better} |"


def _of_peer(pair: Row) -> str:
    return f"{pair['peer']} ({pair['peer_bits_per_weight']:.3f})"


def _apart(pair: Row) -> str:
    return f"{pair['difference']:+.4f} ± {pair['standard_error']:.4f}"


def _result(row: Row) -> TextResult:
    """Return a row's losses with windows as records."""
    sums = row["window_losses"]
    num_tokens = row["window_tokens"] * len(sums)
    return TextResult(
        loss=math.fsum(sums) / num_tokens,
        num_tokens=num_tokens,
        record_losses=tuple(sums),
        record_tokens=(row["window_tokens"],) * len(sums),
    )
