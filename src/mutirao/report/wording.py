"""Numbers and names as people read them: signs, digits, units, plain words."""

from __future__ import annotations

import math

from mutirao.evaluate.losses import Difference
from mutirao.report.summary import ALONE, Baseline, RunSummary, is_clear

MINUS = "−"
STAGE_WORDS = {
    "model": "base model",
    "silos": "silos",
    "data": "prepare text",
    "base": "measure base",
    "federated": "train together",
    "alone": "train alone",
    "merge": "merge",
    "evaluation": "measure all",
    "compress": "compress",
    "answer": "ask",
}
"""What each stage does, in two words."""
SMALL_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def signed(value: float, decimals: int = 3) -> str:
    """Return a number with its sign, minus as a real minus; '0.000' has none."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def plus_minus(difference: Difference | None) -> str:
    """Return 'mean ± standard error', with a fourth digit where the error is that small."""
    if difference is None:
        return "–"
    error = difference.standard_error
    decimals = 4 if error < 0.001 else 3
    shown = f"{error:.{decimals}f}" if math.isfinite(error) else "unknown"
    return f"{signed(difference.mean, decimals)} ± {shown}"


def percent(share: float) -> str:
    """Return a share from 0 to 1 as a whole percentage."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def ratio(value: float | None) -> str:
    """Return a ratio with two significant digits."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def model_words(label: str) -> str:
    """Return a model's label as words: 'alone-clinic' is 'clinic alone'."""
    return f"{label.removeprefix(ALONE)} alone" if label.startswith(ALONE) else label


def baseline_words(baseline: Baseline | None) -> str:
    """Return the base model's name, or 'a base model'."""
    return baseline.short_name if baseline is not None else "a base model"


def headline(summary: RunSummary) -> str:
    """Return what happened, in one sentence."""
    num = len(summary.silos)
    who = SMALL_NUMBERS[num] if 0 < num < len(SMALL_NUMBERS) else str(num or "Several")
    who += " silo" if num == 1 else " silos"
    model = baseline_words(summary.baseline)
    difference = summary.mean_difference
    if difference is None:
        done = f"{len(summary.rounds)} rounds are done" if summary.rounds else "it is under way"
        return f"{who} set out to train {model} together without pooling their text; {done}."
    if not is_clear(difference):
        verdict = "the result predicts their held-out text no differently, within the uncertainty"
    elif difference.mean < 0:
        share = percent(1 - math.exp(difference.mean))
        verdict = f"the result predicts their held-out text better: {share} lower perplexity"
    else:
        share = percent(math.exp(difference.mean) - 1)
        verdict = f"the result predicts their held-out text worse: {share} higher perplexity"
    return f"{who} trained {model} together without pooling their text, and {verdict}."
