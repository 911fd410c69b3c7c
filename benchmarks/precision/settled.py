"""What was settled before the held-out runs were trained: split, forms, metric.

Nothing here may be changed once ``docs/benchmarks/data/precision/predictions.json`` is committed.

Fitted: sizes 64, 96 and 128, decayed checkpoints of 2 and 4 million bytes, all seeds. Those of 1
million are left out: 100 of their 256 steps warm up, and rises grow otherwise from there.
Held out: size 192 (2.2 times the largest N), 8 million bytes (twice the largest D), all seeds.

The form that stands for this project is chosen on the fitted runs alone: of each size the runs of 4
million bytes are foretold from all other rows, and the form with the least median error over all of
them is taken; priors of exponents are those of published fits.

Metric: median of |predicted - measured| / measured over the held-out rows whose rise is five
standard errors or more; share of them within their 95 % intervals; and of the budgets of bytes, the
share in which the cell with the least predicted rise has the number of bits of the cell with the
least measured one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mutirao.precision.fit import FittedForm, fit_form
from mutirao.precision.forms import Form, Prior, find_form, published_priors
from mutirao.precision.number_formats import integer_format
from mutirao.precision.rows import Measurement, Query
from precision.family import SIZES
from precision.text import VOCABULARY

FITTED_SIZES = ("64", "96", "128")
FITTED_TOKENS = (2_097_152, 4_194_304)
HELD_OUT_SIZES = ("192",)
HELD_OUT_TOKENS = (8_388_608,)
EXTRAPOLATE_FACTOR = 2.5
BITS = (2, 3, 4, 5)


def _by_method(asked: Query) -> dict[str, float]:
    """Terms of per_cell with exponents for each method: GPTQ's rises grow faster with tokens, and
    fall faster with size, than those of rounding to nearest, in the fitted runs."""
    terms = find_form("per_cell").terms(asked)
    return {
        f"{name}[{asked.method}]" if name.startswith("gamma") else name: value
        for name, value in terms.items()
    }


BY_METHOD = Form("per_cell_by_method", _by_method)
CANDIDATES: tuple[str | Form, ...] = (
    "kumar",
    "ouyang",
    "chen",
    "step_squared",
    "noise",
    "per_cell",
    "per_cell_exponents",
    BY_METHOD,
)
"""Forms that may stand for the project; all but the one that is chosen are baselines."""
BASELINES: tuple[str | Form, ...] = (
    "largest",
    "kumar_published",
    "ouyang_published",
    "chen_published",
    "kumar_published_fixed",
    "ouyang_published_fixed",
)
BUDGETS = (0.25, 0.3, 0.4, 0.5, 0.6)
"""Of the bytes in bfloat16."""


def query(row: dict[str, Any]) -> Query:
    """Return what a row asks."""
    group_size = None if row["group"] == "channel" else 32
    bits, width = int(row["bits"]), SIZES[row["size"]].width
    kind = integer_format(bits, group_size=group_size)
    return Query(
        num_params=row["num_parameters"],
        num_tokens=row["num_tokens"],
        bits=bits,
        method=row["method"],
        group_size=group_size,
        row_size=width,
        noise=kind.relative_noise(width),
    )


def measurements(
    rows: Iterable[dict[str, Any]], sizes: Sequence[str], tokens: Sequence[int]
) -> list[Measurement]:
    """Return the decayed rows of some sizes and numbers of tokens."""
    return [
        Measurement(query(row), row["delta"], row["standard_error"], row["run"])
        for row in rows
        if row["is_decayed"]
        and not row["train_bits"]
        and row["size"] in sizes
        and row["num_tokens"] in tokens
        and row["bits"] in BITS
    ]


def share_of_bytes(asked: Query, size: str) -> float:
    """Return the bytes of a model rounded so, embedding in bfloat16, over those in bfloat16."""
    kept = VOCABULARY * SIZES[size].width
    kind = integer_format(int(asked.bits), group_size=asked.group_size)
    rounded = SIZES[size].num_parameters * kind.bits_per_weight(SIZES[size].width)
    return (16 * kept + rounded) / (16 * (kept + SIZES[size].num_parameters))


def fit(form: str | Form, rows: Sequence[Measurement]) -> FittedForm:
    """Fit a form with published priors of its exponents."""
    if form is BY_METHOD:
        priors = tuple(
            Prior(f"{each.parameter}[{method}]", each.mean, each.sd)
            for each in published_priors("per_cell")
            for method in ("rtn", "gptq")
        )
        return fit_form(form, rows, priors=priors)
    return fit_form(form, rows, priors=published_priors(str(form)))
