"""The precision law against runs that it never saw: first what it foretells, then how well.

    python benchmarks/precision_law.py predict   # before the held-out runs are trained; commit it
    python benchmarks/precision_law.py judge     # afterwards
    python benchmarks/precision_law.py predict --round 2   # and judge: the second blind test

Both read the rows of ``make bench-precision``. What counts is in ``precision.settled``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_precision import read_rows
from precision.family import SIZES
from precision.picture import draw
from precision.settled import (
    BASELINES,
    BITS,
    BUDGETS,
    FITTED_SIZES,
    FITTED_TOKENS,
    ROUNDS,
    Round,
    fit,
    query,
    share_of_bytes,
)

from mutirao.errors import InputError
from mutirao.precision.comparison import compare_forms
from mutirao.precision.fit import Predictor
from mutirao.precision.regression import FitConfig
from mutirao.precision.rows import Measurement, Query, select_significant

DATA = Path(__file__).parents[1] / "docs" / "benchmarks" / "data" / "precision"
QUICK = FitConfig(num_resamples=20)
"""Where only the central estimate counts."""
Fits = dict[str, Predictor]


def main() -> None:
    """Foretell or judge."""
    options = _options()
    rows = [row for path in sorted(options.rows.glob("*.jsonl")) for row in read_rows(path)]
    settled = ROUNDS[options.round]
    fitted = settled.fitted(rows)
    predictions = options.out / f"predictions{settled.suffix}.json"
    if options.step == "predict":
        _write(predictions, _predict(settled, fitted, settled.development(rows)))
    else:
        before = json.loads(predictions.read_text(encoding="utf-8"))
        judged = _judge(settled, fitted, settled.held_out(rows), before)
        _write(options.out / f"judgement{settled.suffix}.json", judged)
        figure = options.figure or options.out.parents[1] / f"precision{settled.suffix}.svg"
        draw(fitted, judged, figure)


def _predict(
    settled: Round, fitted: list[Measurement], development: list[Measurement]
) -> dict[str, Any]:
    fits = _fit_all(settled, fitted)
    validated = _validate(settled, fitted)
    developed = _develop(settled, fits, development)
    errors = {
        name: statistics.fmean([error, *([developed[name][0]] if developed else [])])
        for name, error in validated.items()
    }
    chosen = min(errors.keys() - set(settled.reported), key=lambda name: errors[name])
    cells = [
        {"method": method, "group": group, "bits": bits}
        for method in ("rtn", "gptq")
        for group in ("channel", "g32")
        for bits in BITS
        if any(_is_cell(row.query, method, group, bits) for row in fitted)
    ]
    predictions = []
    for size in settled.held_out_sizes:
        for tokens in settled.held_out_tokens:
            for cell in cells:
                asked = query(
                    {
                        **cell,
                        "size": size,
                        "num_tokens": tokens,
                        "num_parameters": SIZES[size].num_parameters,
                    }
                )
                predictions.append(
                    {
                        **cell,
                        "size": size,
                        "num_tokens": tokens,
                        **_foretold(settled, fits, asked),
                    }
                )
    return {
        "fitted_runs": sorted({row.run for row in fitted}),
        "fitted_rows": len(fitted),
        "validation_median_errors": validated,
        **({"development_median_error_and_coverage": developed} if developed else {}),
        "chosen": chosen,
        "parameters": {name: fit.parameters for name, fit in fits.items()},
        "standard_errors": {name: fit.standard_errors() for name, fit in fits.items()},
        "predictions": predictions,
    }


def _is_cell(asked: Query, method: str, group: str, bits: int) -> bool:
    group_size = None if group == "channel" else 32
    return (asked.method, asked.group_size, asked.bits) == (method, group_size, bits)


def _foretold(settled: Round, fits: Fits, asked: Query) -> dict[str, Any]:
    found = {}
    for name, form in fits.items():
        try:
            predicted = form.predict(asked, extrapolate_factor=settled.extrapolate_factor)
        except InputError:
            continue  # this cell had no significant row, or the checkpoint's loss is asked for
        found[name] = [predicted.mean, predicted.low, predicted.high]
    return {"mean_low_high": found}


def _validate(settled: Round, fitted: list[Measurement]) -> dict[str, float]:
    """Return each candidate's median error on each size's longest runs, from all other rows."""
    found: dict[str, list[float]] = {}
    for size in FITTED_SIZES:
        outer = [
            row
            for row in fitted
            if row.query.num_params == SIZES[size].num_parameters
            and row.query.num_tokens == max(FITTED_TOKENS)
        ]
        inner = [row for row in fitted if row not in outer]
        for form in (*settled.candidates, *settled.reported):
            fitted_form = fit(form, inner, QUICK)
            errors = found.setdefault(fitted_form.form.name, [])
            for row in outer:
                if row.degradation < 5 * row.standard_error:
                    continue
                predicted = fitted_form.predict(
                    row.query, extrapolate_factor=settled.extrapolate_factor
                )
                errors.append(abs(predicted.mean / row.degradation - 1))
    return {name: statistics.median(errors) for name, errors in found.items()}


def _develop(
    settled: Round, fits: Fits, development: list[Measurement]
) -> dict[str, tuple[float, float]]:
    """Return each form's median error on development, and the share within its intervals."""
    rows, _ = select_significant(development, 5)
    if not rows:
        return {}
    found = compare_forms(
        list(fits.values()), rows, extrapolate_factor=settled.extrapolate_factor, num_resamples=1
    )
    return {each.name: (each.median_error, each.coverage) for each in found.scores}


def _fit_all(settled: Round, fitted: list[Measurement]) -> Fits:
    forms = (*settled.candidates, *settled.reported, *BASELINES)
    fits = [fit(form, fitted) for form in forms]
    return {each.form.name: each for each in fits}


def _judge(
    settled: Round,
    fitted: list[Measurement],
    held_out: list[Measurement],
    before: dict[str, Any],
) -> dict[str, Any]:
    fits = _fit_all(settled, fitted)
    known = {_cell(row.query) for row in fitted if row.degradation >= 5 * row.standard_error}
    rows = [row for row in held_out if _cell(row.query) in known]
    found = compare_forms(list(fits.values()), rows, extrapolate_factor=settled.extrapolate_factor)
    chosen = before["chosen"]
    return {
        "chosen": chosen,
        "num_rows": found.num_rows,
        "num_dropped": found.num_dropped,
        "num_not_fitted": len(held_out) - len(rows),
        "num_runs": found.num_runs,
        "scores": [vars(each) for each in found.scores],
        "against_chosen": [
            vars(each) for each in found.differences if chosen in (each.first, each.second)
        ],
        "is_as_foretold": _is_as_foretold(settled, fits[chosen], rows, before),
        "budgets": {name: _budgets(settled, fit, rows) for name, fit in fits.items()},
        "rows": [
            {
                "run": row.run,
                "cell": row.query.cell,
                "delta": row.degradation,
                "standard_error": row.standard_error,
                "predicted": vars(
                    fits[chosen].predict(
                        row.query,
                        extrapolate_factor=settled.extrapolate_factor,
                        relative_error=abs(row.relative_error),
                    )
                ),
            }
            for row in rows
        ],
    }


def _cell(asked: Query) -> str:
    return asked.cell


def _is_as_foretold(
    settled: Round,
    fit: Predictor,
    rows: Sequence[Measurement],
    before: dict[str, Any],
) -> bool:
    """Say whether the fit still says what was committed."""
    committed = {
        (each["method"], None if each["group"] == "channel" else 32, each["bits"]): each
        for each in before["predictions"]
    }
    for row in rows:
        kept = committed[row.query.method, row.query.group_size, int(row.query.bits)]
        mean = kept["mean_low_high"][before["chosen"]][0]
        now = fit.predict(row.query, extrapolate_factor=settled.extrapolate_factor).mean
        if abs(now / mean - 1) > 1e-6:
            return False
    return True


def _budgets(settled: Round, fit: Predictor, rows: Sequence[Measurement]) -> dict[str, Any]:
    """Return in how many budgets the number of bits with the least predicted rise is right."""
    sizes = {SIZES[name].num_parameters: name for name in settled.held_out_sizes}

    def foretold(row: Measurement) -> float:
        return fit.predict(row.query, extrapolate_factor=settled.extrapolate_factor).mean

    def measured(row: Measurement) -> float:
        return row.degradation

    right, right_cells, cases = 0, 0, []
    for run in sorted({row.run for row in rows}):
        for tokens in settled.held_out_tokens:
            for budget in BUDGETS:
                fitting = [
                    row
                    for row in rows
                    if row.run == run
                    and row.query.num_tokens == tokens
                    and share_of_bytes(row.query, sizes[int(row.query.num_params)]) <= budget
                ]
                if not fitting:
                    continue
                best, said = _least(fitting, measured), _least(fitting, foretold)
                right += best.query.bits == said.query.bits
                right_cells += best.query.cell == said.query.cell
                cases.append([run, tokens, budget, said.query.cell, best.query.cell])
    return {"right": right, "right_cells": right_cells, "cases": len(cases), "said_and_best": cases}


def _least(rows: list[Measurement], key: Callable[[Measurement], float]) -> Measurement:
    return min(rows, key=key)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("predict", "judge"))
    parser.add_argument("--rows", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--round", type=int, choices=tuple(ROUNDS), default=1)
    parser.add_argument("--figure", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
