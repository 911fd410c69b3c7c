"""Forms that a law of degradation may have, each linear in its parameters once logs are taken.

A form says of a query which parameters its log δ adds up, with which coefficients, and what it
adds beside them that is not fitted. ``FORMS`` has those that compete:

    kumar               C D^γD / N^γN exp(-b/γ)
    ouyang              C D^γD / N^γN b^-γP
    chen                C D^γD / N^γN (log2 G)^γG, C for each number of bits
    step_squared        C D^γD / N^γN (2^(b-1) - 1)^-2: error goes with the squared step
    noise               C D^γD / N^γN times the format's relative noise power
    per_cell            C for each (method, group, bits), exponents in common
    per_cell_exponents  the same with exponents for each cell, drawn towards common ones
    shannon             C D^γD / N^γN 2^-2R, R the bits of a weight with its share of a scale: a
                        Gaussian's distortion at that rate (Cover and Thomas 2006, chapter 10)
    interaction         per_cell_exponents by method, γD falling with log N by k: for ``mixed``
    loss                the same with the model's own loss in place of log D: for ``mixed``
    largest             the δ of the largest fitted model, whatever is asked
    *_published         the published law, C refitted
    *_published_fixed   the published law as it is

C is one for each method, since methods differ in how much they lose, unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, OutOfRangeError
from mutirao.precision.law import CHEN_W4A4, CHEN_W4A16, KUMAR, OUYANG
from mutirao.precision.rows import Measurement, Query

Terms = dict[str, float]


@dataclass(frozen=True)
class Prior:
    """What is known of a parameter beforehand: a normal distribution."""

    parameter: str
    mean: float
    sd: float

    def __post_init__(self) -> None:
        if not self.sd > 0:
            raise InputError(f"sd={self.sd} of prior {self.parameter} must be above 0")


def _no_offset(query: Query) -> float:
    return 0.0


def _all_rows(rows: Sequence[Measurement]) -> list[Measurement]:
    return list(rows)


@dataclass(frozen=True)
class Form:
    """log δ = Σ coefficient · parameter + offset."""

    name: str
    terms: Callable[[Query], Terms]
    """Coefficients by parameter."""
    offset: Callable[[Query], float] = _no_offset
    """What is known, in log nats."""
    pooled: tuple[str, ...] = ()
    """Starts of names of parameters that are drawn towards zero."""
    select: Callable[[Sequence[Measurement]], list[Measurement]] = _all_rows
    """The rows that are fitted."""

    def coefficients(self, query: Query, parameters: Iterable[str]) -> NDArray[np.float64]:
        """Return (P,) the coefficients of fitted parameters, by their names.

        Raises:
            OutOfRangeError: the query needs a parameter that was not fitted.
            InputError: the form needs something that the query does not tell.
        """
        terms, names = self.terms(query), list(parameters)
        if unknown := terms.keys() - set(names):
            raise OutOfRangeError(
                f"{query.cell} was not calibrated: the form {self.name} has no "
                f"{', '.join(sorted(unknown))} (expected a way of rounding that was measured)"
            )
        return np.array([terms.get(name, 0.0) for name in names])


def _constant(query: Query) -> Terms:
    return {f"log_c[{query.method}]": 1.0}


def _constant_by_bits(query: Query) -> Terms:
    return {f"log_c[{query.method}/{query.bits:g}]": 1.0}


def _constant_by_cell(query: Query) -> Terms:
    return {f"log_c[{query.cell}]": 1.0}


def _exponents(query: Query, suffix: str = "") -> Terms:
    return {
        f"gamma_d{suffix}": math.log(query.num_tokens),
        f"gamma_n{suffix}": -math.log(query.num_params),
    }


def _nothing(query: Query) -> Terms:
    return {}


def _log_log_group(query: Query) -> float:
    return math.log(math.log2(query.shared_weights))


def _log_step_squared(query: Query) -> float:
    if query.bits <= 1:
        raise InputError(f"step_squared needs more than 1 bit (got bits={query.bits:g})")
    return -2 * math.log(2 ** (query.bits - 1) - 1)


def _log_noise(query: Query) -> float:
    if query.noise is None or query.noise <= 0:
        raise InputError(f"the form noise needs the noise of {query.cell}, above 0")
    return math.log(query.noise)


_SCALE_BITS = 16
"""Of a scale, in the form shannon."""
CENTER = Query(num_params=442_368, num_tokens=2**21.5, bits=4, method="rtn")
"""Where logs of N and D are counted from in forms with an interaction: the middle of the rows that
they were made for. Priors of their exponents hold there."""
CENTER_LOSS = 1.5
"""Nats."""


def _log_distortion(query: Query) -> float:
    return -2 * math.log(2) * (query.bits + _SCALE_BITS / query.shared_weights)


def _log_size(query: Query) -> float:
    return math.log(query.num_params / CENTER.num_params)


def _log_length(query: Query) -> float:
    return math.log(query.num_tokens / CENTER.num_tokens)


def _separate(query: Query, name: str, driver: float) -> Terms:
    """Exponents by method, and how far each cell's stray from them."""
    terms = _constant_by_cell(query)
    for start, suffix in (("", query.method), ("cell_", query.cell)):
        terms[f"{start}{name}[{suffix}]"] = driver
        terms[f"{start}gamma_n[{suffix}]"] = -_log_size(query)
    return terms


def _interaction(query: Query) -> Terms:
    return _separate(query, "gamma_d", _log_length(query)) | {
        "k": -_log_length(query) * _log_size(query)
    }


def _loss(query: Query) -> Terms:
    if query.loss is None:
        raise InputError(f"the form loss needs the loss of the model before {query.cell}")
    return _separate(query, "slope", CENTER_LOSS - query.loss)


def _log_kumar(query: Query) -> float:
    return math.log(KUMAR.degradation(query.num_params, query.num_tokens, query.bits))


def _log_ouyang(query: Query) -> float:
    return math.log(OUYANG.degradation(query.num_params, query.num_tokens, query.bits))


def _log_chen(query: Query) -> float:
    return math.log(
        CHEN_W4A16.degradation(query.num_params, query.num_tokens, query.shared_weights)
    )


def _log_chen_at_its_bits(query: Query) -> float:
    if query.bits != CHEN_W4A16.bits:
        raise InputError(
            f"chen_published_fixed is a law at {CHEN_W4A16.bits} bits (got bits={query.bits:g})"
        )
    return _log_chen(query)


def _largest_rows(rows: Sequence[Measurement]) -> list[Measurement]:
    """Rows of the largest N, and of those the largest D, in each cell."""
    largest: dict[str, tuple[float, float]] = {}
    for row in rows:
        size = row.query.num_params, row.query.num_tokens
        largest[row.query.cell] = max(largest.get(row.query.cell, size), size)
    return [
        row
        for row in rows
        if (row.query.num_params, row.query.num_tokens) == largest[row.query.cell]
    ]


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("kumar", lambda q: _constant(q) | _exponents(q) | {"bit_rate": -q.bits}),
        Form("ouyang", lambda q: _constant(q) | _exponents(q) | {"gamma_bits": -math.log(q.bits)}),
        Form(
            "chen",
            lambda q: _constant_by_bits(q) | _exponents(q) | {"gamma_group": _log_log_group(q)},
        ),
        Form("step_squared", lambda q: _constant(q) | _exponents(q), _log_step_squared),
        Form("noise", lambda q: _constant(q) | _exponents(q), _log_noise),
        Form("shannon", lambda q: _constant(q) | _exponents(q), _log_distortion),
        Form("interaction", _interaction, pooled=("cell_",)),
        Form("loss", _loss, pooled=("cell_",)),
        Form("per_cell", lambda q: _constant_by_cell(q) | _exponents(q)),
        Form(
            "per_cell_exponents",
            lambda q: _constant_by_cell(q) | _exponents(q) | _exponents(q, f"[{q.cell}]"),
            pooled=("gamma_d[", "gamma_n["),
        ),
        Form("largest", _constant_by_cell, select=_largest_rows),
        Form("kumar_published", _constant, _log_kumar),
        Form("ouyang_published", _constant, _log_ouyang),
        Form("chen_published", _constant_by_bits, _log_chen),
        Form("kumar_published_fixed", _nothing, _log_kumar),
        Form("ouyang_published_fixed", _nothing, _log_ouyang),
        Form("chen_published_fixed", _nothing, _log_chen_at_its_bits),
    )
}
"""Forms by name; a new one is one more entry."""


def find_form(name: str) -> Form:
    """Return a form by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in FORMS:
        raise InputError(f"form {name!r} is not known (expected one of {', '.join(FORMS)})")
    return FORMS[name]


def published_priors(name: str) -> tuple[Prior, ...]:
    """Return priors of the exponents that a form shares with published fits.

    Mean and standard deviation are those of the fits: three for γD and γN, two for γG.

    Raises:
        InputError: there is no form of that name.
    """
    published = {
        "gamma_d": [law.gamma_d for law in (KUMAR, OUYANG, CHEN_W4A16)],
        "gamma_n": [law.gamma_n for law in (KUMAR, OUYANG, CHEN_W4A16)],
        "gamma_group": [law.gamma_group for law in (CHEN_W4A16, CHEN_W4A4)],
    }
    example = Query(1e9, 1e9, 4, "rtn", group_size=128, noise=0.01)
    terms = find_form(name).terms(example)
    return tuple(
        Prior(parameter, mean(values), stdev(values))
        for parameter, values in published.items()
        if parameter in terms
    )
