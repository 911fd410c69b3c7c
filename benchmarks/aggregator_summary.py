"""From single runs to the figures that are told: medians, slopes, what sites cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

FIGURES = ("peak_bytes", "peak_anonymous_bytes", "wall_s", "down_bytes", "up_bytes")
FIGURES += ("loopback_bytes",)
PEERS = ("mutirao", "flower", "nvflare", "nvflare-offload")


def summarize(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return medians of each case, and what is compared.

    Args:
        records: of single runs; those that did not finish are counted, and have no figures.
    """
    cases: dict[str, Any] = {}
    for record in records:
        case = cases.setdefault(record["case"], {"runs": []})
        case["runs"].append(record)
    for name, case in cases.items():
        cases[name] = _case(case["runs"])
    return {
        "cases": cases,
        "bytes_per_parameter": {peer: _slopes(cases, peer) for peer in PEERS},
        "many_over_few_sites": {peer: _sites(cases, peer) for peer in PEERS},
        "recovery": _recovery(cases),
    }


def _case(runs: list[dict[str, Any]]) -> dict[str, Any]:
    told = ("peer", "size", "num_sites", "num_rounds", "upload", "disturbed", "num_parameters")
    result = {key: runs[0].get(key) for key in told}
    result["outcomes"] = [run["outcome"] for run in runs]
    good = [run for run in runs if run["outcome"] == "finished"]
    for figure in FIGURES:
        values = [run[figure] for run in good if run.get(figure) is not None]
        if values:
            result[figure] = {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
            }
    for key in ("recovery", "sha256"):
        if runs[-1].get(key) is not None:
            result[key] = runs[-1][key]
    return result


def _plain(cases: dict[str, Any], peer: str, **wanted: Any) -> list[dict[str, Any]]:
    """Return a peer's undisturbed cases that have a peak, by size."""
    found = [
        case
        for case in cases.values()
        if case["peer"] == peer
        and not case["disturbed"]
        and case["num_rounds"] < 3
        and "peak_bytes" in case
        and all(case[key] == value for key, value in wanted.items())
    ]
    return sorted(found, key=lambda case: (case["num_parameters"], case["num_sites"]))


def _slopes(cases: dict[str, Any], peer: str) -> dict[str, float]:
    """Return bytes per parameter between each two sizes that follow, with four sites."""
    found = _plain(cases, peer, num_sites=4)
    upload = "bf16" if peer == "mutirao" else "fp32"
    found = [case for case in found if case["upload"] == upload]
    result = {}
    for small, large in pairwise(found):
        more = large["peak_bytes"]["median"] - small["peak_bytes"]["median"]
        parameters = large["num_parameters"] - small["num_parameters"]
        result[f"{small['size']} to {large['size']}"] = round(more / parameters, 2)
    return result


def _sites(cases: dict[str, Any], peer: str) -> dict[str, float]:
    """Return the peak with 32 sites over that with 4."""
    found = {}
    for many in _plain(cases, peer, num_sites=32):
        for few in _plain(cases, peer, size=many["size"], upload=many["upload"], num_sites=4):
            ratio = many["peak_bytes"]["median"] / few["peak_bytes"]["median"]
            found[many["size"]] = round(ratio, 3)
    return found


def _recovery(cases: dict[str, Any]) -> dict[str, Any]:
    result = {
        case["peer"]: dict(case["recovery"]) for case in cases.values() if case.get("recovery")
    }
    undisturbed = cases.get("ours undisturbed", {}).get("sha256")
    killed = cases.get("ours killed", {}).get("sha256")
    if "mutirao" in result:
        result["mutirao"]["same_hash_as_undisturbed"] = killed is not None and (
            killed == undisturbed
        )
    return result


def table(summary: dict[str, Any]) -> str:
    """Return the cases as lines for a terminal."""
    lines = [
        f"{'case':26} {'peak MB':>9} {'no files':>9} {'wall s':>7} {'down MB':>9} {'up MB':>9}"
    ]
    for name, case in summary["cases"].items():
        if "peak_bytes" not in case:
            lines.append(f"{name:26} {', '.join(case['outcomes'])}")
            continue
        numbers = [
            case[figure]["median"] / unit
            for figure, unit in (
                ("peak_bytes", 1e6),
                ("peak_anonymous_bytes", 1e6),
                ("wall_s", 1),
                ("down_bytes", 1e6),
                ("up_bytes", 1e6),
            )
        ]
        lines.append(
            f"{name:26} {numbers[0]:9.0f} {numbers[1]:9.0f} {numbers[2]:7.1f} "
            f"{numbers[3]:9.1f} {numbers[4]:9.1f}"
        )
    for key in ("bytes_per_parameter", "many_over_few_sites", "recovery"):
        lines += [f"{key}:", *(f"  {name}: {what}" for name, what in summary[key].items())]
    return "\n".join(lines)
