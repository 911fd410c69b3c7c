"""What a law is fitted to: one measured degradation a row, and the range that rows span."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mutirao.errors import InputError, OutOfRangeError


@dataclass(frozen=True)
class Query:
    """A model, and a way of rounding it, of which the degradation is asked."""

    num_params: float
    """N."""
    num_tokens: float
    """D, trained on before rounding."""
    bits: float
    """Of a weight's code; for other formats than integers, their equivalent bits."""
    method: str
    """How it is rounded, for example 'rtn' or 'gptq'."""
    group_size: int | None = None
    """Weights that share a scale; None for a whole row."""
    row_size: int | None = None
    """Weights in a row, where ``group_size`` is None and a form asks for it."""
    noise: float | None = None
    """Relative noise power of the format, where a form asks for it."""
    loss: float | None = None
    """Of the model before rounding, in nats, where a form asks for it."""

    def __post_init__(self) -> None:
        for name in ("num_params", "num_tokens", "bits"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value} is not accepted (expected a number above 0)")

    @property
    def cell(self) -> str:
        """The way of rounding, as one name."""
        return f"{self.method}/{self.group_size or 'row'}/{self.bits:g}"

    @property
    def shared_weights(self) -> int:
        """Weights that share a scale.

        Raises:
            InputError: a whole row shares it, and its size is not told.
        """
        size = self.group_size or self.row_size
        if size is None:
            raise InputError(f"{self.cell} needs row_size, the weights in a row")
        return size


@dataclass(frozen=True)
class Measurement:
    """A degradation that was measured."""

    query: Query
    degradation: float
    """δ: loss after rounding minus loss before, on the same tokens, in nats."""
    standard_error: float
    """Of δ, by evaluation alone, in nats."""
    run: str
    """The training run; measurements of one run stand and fall together."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.degradation) and self.standard_error >= 0):
            raise InputError(
                f"degradation={self.degradation} with standard_error={self.standard_error} of run "
                f"{self.run} is not accepted (expected a finite number and an error of at least 0)"
            )

    @property
    def relative_error(self) -> float:
        """The standard error as a share of δ."""
        return self.standard_error / self.degradation


def select_significant(
    rows: Iterable[Measurement], min_significance: float
) -> tuple[list[Measurement], int]:
    """Return the rows with δ of at least so many standard errors, and how many were dropped.

    A smaller δ has no logarithm worth fitting. Dropping those that came out small by chance
    biases what is left upwards, by little if few are dropped: hence the count.
    """
    rows = list(rows)
    kept = [
        row
        for row in rows
        if row.degradation > 0 and row.degradation >= min_significance * row.standard_error
    ]
    return kept, len(rows) - len(kept)


@dataclass(frozen=True)
class CalibratedRange:
    """What the rows of a fit span; nothing is known outside of it."""

    num_params: tuple[float, float]
    num_tokens: tuple[float, float]
    bits: tuple[float, float]
    group_sizes: frozenset[int | None]
    methods: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[Measurement]) -> CalibratedRange:
        """Return the range of some rows."""
        queries = [row.query for row in rows]

        def span(values: list[float]) -> tuple[float, float]:
            return min(values), max(values)

        return cls(
            num_params=span([each.num_params for each in queries]),
            num_tokens=span([each.num_tokens for each in queries]),
            bits=span([each.bits for each in queries]),
            group_sizes=frozenset(each.group_size for each in queries),
            methods=frozenset(each.method for each in queries),
        )

    def check(self, query: Query, extrapolate_factor: float = 1.0) -> None:
        """Refuse a query that lies outside.

        Args:
            query: what is asked.
            extrapolate_factor: how many times past either end N and D may lie, at least 1. Bits,
                group sizes and methods are never extrapolated.

        Raises:
            OutOfRangeError: it lies outside; the message says what is inside.
            InputError: the factor is below 1.
        """
        if not extrapolate_factor >= 1:
            raise InputError(
                f"extrapolate_factor={extrapolate_factor} is not accepted (expected at least 1)"
            )
        reach = extrapolate_factor * (1 + 1e-9)
        for name, (low, high), by in (
            ("num_params", self.num_params, reach),
            ("num_tokens", self.num_tokens, reach),
            ("bits", self.bits, 1 + 1e-9),
        ):
            value = getattr(query, name)
            if not low / by <= value <= high * by:
                hint = (
                    "" if name == "bits" else f", times a factor {extrapolate_factor:g} either way"
                )
                raise OutOfRangeError(
                    f"{name}={value:g} was not calibrated (expected {low:g} to {high:g}{hint}); "
                    "measure nearer to it" + ("" if hint == "" else ", or allow a larger factor")
                )
        if query.group_size not in self.group_sizes:
            raise OutOfRangeError(
                f"group_size={query.group_size or 'row'} was not calibrated (expected one of "
                f"{_listed(size or 'row' for size in self.group_sizes)})"
            )
        if query.method not in self.methods:
            raise OutOfRangeError(
                f"method={query.method} was not calibrated (expected one of "
                f"{_listed(self.methods)})"
            )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))
