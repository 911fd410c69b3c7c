"""What was settled before the held-out runs were trained: split, forms, metric; two rounds.

Nothing here may be changed once a round's predictions (``docs/benchmarks/data/precision``) are
committed.

First round. Fitted: sizes 64, 96 and 128, decayed checkpoints of 2 and 4 million bytes, seeds 0 and
1. Those of 1 million are left out: 100 of their 256 steps warm up, and rises grow otherwise from
there.
Held out: size 192 (2.2 times the largest N), 8 million bytes (twice the largest D), all seeds.

The form that stands for this project is chosen on the fitted runs alone: of each size the runs of 4
million bytes are foretold from all other rows, and the form with the least median error over all of
them is taken; priors of exponents are those of published fits.

Metric: median of |predicted - measured| / measured over the held-out rows whose rise is five
standard errors or more; share of them within their 95 % intervals; and of the budgets of bytes, the
share in which the cell with the least predicted rise has the number of bits of the cell with the
least measured one.

Second round. Fitted: the same sizes and numbers of bytes, seeds 0, 1 and 2. Held out: size 256 (4
times the largest N), 8 million bytes. Size 192 at 8 million bytes, seen in the first round, helps
to choose the form (development) and is not fitted, so that N stays far from the fitted ones. Chosen
is the form with the least mean of two medians: that of the first round's rule, and that on
development. The form ``loss`` with the checkpoint's own loss is reported beside, as it needs the
checkpoint; what may be chosen foretells that loss. So is the curvature of ``precision.curvature``,
which fits nothing. Budgets are also judged by cell, not only by bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mutirao.precision.fit import Predictor, fit_form
from mutirao.precision.forms import Form, Prior, find_form, published_priors
from mutirao.precision.mixed import AveragedFit, MixedFit, fit_mixed
from mutirao.precision.number_formats import integer_format
from mutirao.precision.regression import FitConfig
from mutirao.precision.rows import Measurement, Query
from precision.family import SIZES
from precision.losses import fit_losses
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
FORETOLD_LOSS = "loss_foretold"
"""The form ``loss`` with losses that ``precision.losses`` foretells, of fitted rows too."""
AVERAGED = Form("averaged", find_form("interaction").terms)
"""The forms ``interaction`` and ``loss_foretold`` together."""
MEAN_PRIORS = {"gamma_d": (0.4, 0.5), "gamma_n": (0.31, 0.5), "slope": (0.0, 5.0), "k": (0.0, 0.06)}
"""Of the second round's forms, at the middle of the rows: means as published, and wide. That of k:
published exponents of D differ by 0.36 at most (Chen's 0.16, Ouyang's 0.53) over models from 30
million to 12 billion weights, six e-folds: 0.06 for each."""


@dataclass(frozen=True)
class Round:
    """One blind test."""

    number: int
    seeds: tuple[int, ...]
    """Of the fitted runs."""
    held_out_sizes: tuple[str, ...]
    held_out_tokens: tuple[int, ...]
    extrapolate_factor: float
    candidates: tuple[str | Form, ...]
    reported: tuple[str, ...] = ()
    """Forms that may not be chosen, since they need the checkpoint."""
    development_sizes: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """Of the names of its files."""
        return "" if self.number == 1 else f"-{self.number}"

    def fitted(self, rows: Iterable[dict[str, Any]]) -> list[Measurement]:
        """Return the rows that are fitted."""
        mine = (row for row in rows if row["seed"] in self.seeds)
        return measurements(mine, FITTED_SIZES, FITTED_TOKENS)

    def held_out(self, rows: Iterable[dict[str, Any]]) -> list[Measurement]:
        """Return the rows that are foretold."""
        return measurements(rows, self.held_out_sizes, self.held_out_tokens)

    def development(self, rows: Iterable[dict[str, Any]]) -> list[Measurement]:
        """Return the rows that help to choose."""
        return measurements(rows, self.development_sizes, HELD_OUT_TOKENS)


ROUNDS = {
    1: Round(1, (0, 1), HELD_OUT_SIZES, HELD_OUT_TOKENS, EXTRAPOLATE_FACTOR, CANDIDATES),
    2: Round(
        2,
        (0, 1, 2),
        ("256",),
        HELD_OUT_TOKENS,
        4.0,
        (*CANDIDATES, "shannon", "interaction", FORETOLD_LOSS, AVERAGED),
        reported=("loss",),
        development_sizes=("192",),
    ),
}
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
        loss=row.get("loss"),
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


def fit(
    form: str | Form, rows: Sequence[Measurement], config: FitConfig | None = None
) -> Predictor:
    """Fit a form with published priors of its exponents."""
    if form is AVERAGED:
        return AveragedFit(
            AVERAGED, (_fit_mixed("interaction", rows), _fit_mixed(FORETOLD_LOSS, rows))
        )
    if form in ("interaction", "loss", FORETOLD_LOSS):
        return _fit_mixed(str(form), rows)
    if form is BY_METHOD:
        priors = tuple(
            Prior(f"{each.parameter}[{method}]", each.mean, each.sd)
            for each in published_priors("per_cell")
            for method in ("rtn", "gptq")
        )
        return fit_form(form, rows, priors=priors, config=config)
    return fit_form(form, rows, priors=published_priors(str(form)), config=config)


def _fit_mixed(name: str, rows: Sequence[Measurement]) -> MixedFit:
    form = find_form("loss" if name == FORETOLD_LOSS else name)
    if name == FORETOLD_LOSS:
        losses, by_loss = fit_losses(rows), form.terms
        form = replace(form, name=name, terms=lambda q: by_loss(replace(q, loss=losses(q))))
    names = {name for row in rows for name in form.terms(row.query)}
    priors = [
        Prior(name, *MEAN_PRIORS[name.partition("[")[0]])
        for name in sorted(names)
        if name.partition("[")[0] in MEAN_PRIORS
    ]
    return fit_mixed(form, rows, priors=priors)
