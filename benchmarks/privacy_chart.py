"""The figure and the table of the privacy benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from privacy_settings import CONDITIONS, POSITIONS, SITES

COLOURS = {
    "untrained": "#9aa7b4",
    "overfitted": "#5a1f5f",
    "plain": "#b8326a",
    "secure-aggregated": "#d9691e",
    "clipped": "#7a5cb0",
    "dp-high": "#2f6db3",
    "dp-low": "#3c8f5a",
}


def label_of(result: dict[str, Any], name: str) -> str:
    claimed = result["conditions"][name]["claimed_epsilon"]
    return f"DP, ε = {claimed:.1f}" if claimed else name


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels: exposure, membership, tokens, audited ε."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 7.4), layout="constrained")
        FigureCanvasSVG(figure)
        (canaries, members), (tokens, audit) = figure.subplots(2, 2)
        for name, row in result["conditions"].items():
            server, colour = row["positions"]["server"], COLOURS[name]
            counts = [str(each["num_repetitions"]) for each in server["exposure"]]
            bits = [each["mean_bits"] for each in server["exposure"]]
            canaries.plot(counts, bits, "o-", color=colour, label=label_of(result, name))
            for place, position in enumerate(POSITIONS):
                found = row["positions"][position]["membership"]
                x = place + 0.12 * (CONDITIONS.index(name) - 3)
                ends = [[found["auc"] - found["auc_low"]], [found["auc_high"] - found["auc"]]]
                members.errorbar([x], [found["auc"]], ends, fmt="o", color=colour)
        canaries.set(title="canaries, seen by the server", ylabel="mean exposure, bits")
        canaries.set_xlabel("repetitions of the canary")
        members.set(title="membership", ylabel="AUC, 95 % interval")
        members.set_xticks(range(len(POSITIONS)), POSITIONS)
        members.axhline(0.5, color="#9aa7b4", linewidth=0.8)
        draw_bars(tokens, audit, result)
        figure.legend(
            *canaries.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_bars(tokens: Any, audit: Any, result: dict[str, Any]) -> None:
    names = [name for name in result["conditions"] if name != "untrained"]
    for place, name in enumerate(names):
        row, colour = result["conditions"][name], COLOURS[name]
        found = row["tokens"]["attribution"]
        ends = [[found["accuracy"] - found["low"]], [found["high"] - found["accuracy"]]]
        tokens.bar([place], [found["accuracy"]], yerr=ends, color=colour)
        audit.bar([place], [row["positions"]["server"]["audit"]["epsilon"]], color=colour)
        if row["claimed_epsilon"]:
            audit.plot([place], [row["claimed_epsilon"]], "_", color="black", markersize=24)
    tokens.axhline(1 / len(SITES), color="#9aa7b4", linewidth=0.8)
    tokens.set(title="which site had a token, seen by the server", ylabel="accuracy")
    audit.set(title="audited ε (bar) and claimed ε (dash)", ylabel="ε, nats")
    for axes in (tokens, audit):
        axes.set_xticks(range(len(names)), [label_of(result, name) for name in names], rotation=15)


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['num_parameters']:,} parameters, {result['seconds']:.0f} s")
    for name, row in result["conditions"].items():
        print(f"{label_of(result, name)}: perplexity {row['perplexity']['all']:.1f}")
        if "tokens" in row:
            attribution, presence = row["tokens"]["attribution"], row["tokens"]["presence"]
            print(
                f"  tokens: AUC {presence['auc']:.2f}, site named right "
                f"{attribution['accuracy']:.0%} (chance {attribution['chance']:.0%})"
            )
        for position, found in row["positions"].items():
            member = found["membership"]
            bits = " ".join(
                f"{each['num_repetitions']}x{each['mean_bits']:.1f}/{each['share_first']:.0%}"
                for each in found["exposure"]
            )
            rates = " ".join(
                f"TPR@{each['asked_false_positive_rate']:.1%} {each['rate']:.1%}"
                for each in member["rates"]
            )
            print(
                f"  {position}: exposure {bits}; AUC {member['auc']:.3f} "
                f"({member['auc_low']:.3f}-{member['auc_high']:.3f}) {rates}; "
                f"eps > {found['audit']['epsilon']:.2f}"
            )
    for name, row in result["many_runs_small_model"].items():
        if isinstance(row, dict):
            print(
                f"many runs, {name}: eps > {row['epsilon']:.2f}, claimed {row['claimed_epsilon']}"
            )
