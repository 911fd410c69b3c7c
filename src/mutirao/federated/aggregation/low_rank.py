"""The mean of low-rank updates: which rules are exact, and by how much the others are not.

A site's LoRA adapter changes a layer's weight by scale · B A. What sites should get is the mean
of these products, and the product of the means is something else:

    separate_means   FedIT (Zhang et al. 2023, arXiv:2305.05644): B and A averaged apart; inexact
    ffa              FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): one A for all; exact
    stacked          FLoRA (Wang et al. 2024, arXiv:2409.05976): factors side by side; exact,
                     ranks may differ
    fedex            FedEx-LoRA (Singhal et al. 2024, arXiv:2410.09432): the separate means, and
                     what they lack as a second pair of factors; exact

Sums are made in float64. Nothing here is as large as a layer's weight (O × I), unless ranks add
up to as much: norms and singular values come from QR of the factors. (Gram matrices would do,
but squares halve the digits: an error below 1e-8 could not be told from none.) Not here: names
and rounds (``low_rank_rounds``), HetLoRA's pruning, Fed-SB.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, ShapeError, UpdateError

FLOAT32_EPSILON = 2.0**-23
"""Relative step of float32: a product that is sent in it is not known better than that."""

Matrix = NDArray[np.floating[Any]]
Carry = Callable[[str, Matrix], Matrix]
"""What becomes of factor 'A' or 'B' on its way to the sites."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank change of one layer's weight: scale · B A."""

    b: Matrix
    """(O, R) up-projection."""
    a: Matrix
    """(R, I) down-projection."""
    scale: float = 1.0
    """For an adapter alpha / R."""

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ShapeError(
                f"factors of shapes {self.b.shape} and {self.a.shape} have no product "
                "(expected (O, R) and (R, I))"
            )

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.b.shape[1])

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(O, I) of the layer's weight."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def scaled(self, factor: float) -> Factors:
        """Return the same product times a number, in float64, with scale 1."""
        return Factors(self.b.astype(np.float64) * (factor * self.scale), _wide(self.a))

    def to_float32(self) -> Factors:
        """Return factors as they travel, rounded once, with scale 1.

        Raises:
            UpdateError: a value is too large for float32.
        """
        return Factors(to_float32(self.scaled(1.0).b), to_float32(self.a))


@dataclass(frozen=True, eq=False)
class Recompressed:
    """A product in as few columns as it needs."""

    factors: Factors
    """B and A of equal norms, column by column orthogonal."""
    error: float
    """Frobenius norm of what was left out, by that of the product (or of ``reference``)."""

    @property
    def rank(self) -> int:
        """Columns that were kept."""
        return self.factors.rank


def separate_means(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return mean(scale B) and mean(A), each by itself: not the mean of the products.

    Where ranks differ, the smaller are filled up with zeros, as HetLoRA does.
    """
    shares = _check(factors, weights)
    rank = max(each.rank for each in factors)
    outputs, inputs = factors[0].weight_shape
    b_OR, a_RI = np.zeros((outputs, rank)), np.zeros((rank, inputs))
    for share, each in zip(shares, factors, strict=True):
        b_OR[:, : each.rank] += each.scaled(share).b
        a_RI[: each.rank] += share * _wide(each.a)
    return Factors(b_OR, a_RI)


def ffa(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return the mean of scale · B beside the one A that all share.

    Raises:
        InputError: the sites have more than one A.
    """
    shares = _check(factors, weights)
    first = factors[0].a
    if not all(np.array_equal(each.a, first) for each in factors):
        raise InputError(
            "the mean of B alone needs one A at all sites, and these differ; train with "
            "lora.freeze_a = true, or aggregate by 'stacked'"
        )
    parts = (each.scaled(share).b for share, each in zip(shares, factors, strict=True))
    return Factors(sum(parts, np.zeros(factors[0].b.shape)), _wide(first))


def stacked(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return weighted B side by side and A one below the other: the mean of products itself.

    Ranks may differ; the result's is their sum.
    """
    shares = _check(factors, weights)
    return concatenate([each.scaled(s) for s, each in zip(shares, factors, strict=True)])


def fedex(
    factors: Sequence[Factors], weights: Sequence[float], *, carry: Carry | None = None
) -> tuple[Factors, Factors]:
    """Return separate means, and the factors of what they lack of the mean of products.

    Args:
        factors: of all sites, of one rank and scale.
        weights: of the sites.
        carry: what becomes of a mean factor, called with 'B' or 'A' and its values; the residual
            makes up for that too. Left out, means are rounded to float32.

    Returns:
        The means, with the sites' scale, and the residual, of rank (sites − 1) · R at most but
        for what ``carry`` lost.

    Raises:
        InputError: ranks or scales differ.
    """
    if len({(each.rank, each.scale) for each in factors}) > 1:
        ranks = ", ".join(str(each.rank) for each in factors)
        raise InputError(
            f"FedEx-LoRA goes on from mean factors, which needs one rank and scale at all sites "
            f"(got ranks {ranks}); use aggregation 'stacked'"
        )
    exact = stacked(factors, weights)
    carry = carry or (lambda _, values: to_float32(values))
    plain = separate_means([Factors(each.b, each.a) for each in factors], weights)
    means = Factors(carry("B", plain.b), carry("A", plain.a), factors[0].scale)
    residual = recompress(concatenate([exact, means.scaled(-1.0)]), reference=product_norm(exact))
    return means, residual.factors


def mean_product(weighted: Iterable[tuple[Factors, float]]) -> Recompressed:
    """Return the mean of products in as few columns as it needs; takes one site at a time.

    Memory is bounded by the layer, not by the number of sites: when ranks add up to twice what a
    matrix of its size can have, they are recompressed.

    Args:
        weighted: factors and weight of each site. Their order makes a difference in rounding
            only; the same order gives the same bits from the same build of NumPy.

    Raises:
        UpdateError: there is none, or a weight is not positive.
        ShapeError: they belong to layers of other sizes.
    """
    parts: list[Factors] = []
    total = 0.0
    for each, weight in weighted:
        _check_weight(weight)
        if parts and each.weight_shape != parts[0].weight_shape:
            raise _odd_shapes([parts[0], each])
        total += weight
        parts.append(each.scaled(weight))
        if sum(part.rank for part in parts) > 2 * min(each.weight_shape):
            parts = [recompress(concatenate(parts), tolerance=0.0).factors]
    if not parts:
        raise UpdateError("no site sent an update in this round")
    return recompress(concatenate(parts).scaled(1 / total))


def recompress(
    factors: Factors,
    *,
    tolerance: float = FLOAT32_EPSILON,
    max_rank: int | None = None,
    reference: float | None = None,
) -> Recompressed:
    """Return the same product with as few columns as it needs.

    Thin QR of both factors, then the SVD of the small matrix between. B and A share the singular
    values evenly, so rounding them to float32 costs the product about one part in 10⁷, however
    much the columns that came in cancelled each other.

    Args:
        factors: of any rank.
        tolerance: relative Frobenius norm that may be left out; 0 leaves out exact zeros alone.
        max_rank: keep no more columns than this, whatever it costs; the best approximation of
            that rank (Eckart and Young 1936).
        reference: norm that tolerance and error are relative to; None for the product's own.
    """
    wide = factors.scaled(1.0)
    if not wide.rank:
        return Recompressed(wide, 0.0)
    q_b_OK, r_b_KR = np.linalg.qr(wide.b)
    q_a_IL, r_a_LR = np.linalg.qr(wide.a.T)
    u_KS, values_S, v_SL = np.linalg.svd(r_b_KR @ r_a_LR.T, full_matrices=False)
    size = float(np.linalg.norm(values_S))
    norm = size if reference is None else reference
    # tails[k] is what is lost when k columns are kept
    tails = np.append(np.sqrt(np.cumsum(values_S[::-1] ** 2))[::-1], 0.0)
    rank = (
        int(np.argmax(tails <= tolerance * norm)) if tolerance else int(np.count_nonzero(values_S))
    )
    rank = min(rank, max_rank) if max_rank is not None else rank
    roots_S = np.sqrt(values_S[:rank])
    error = float(tails[rank]) / norm if norm else (math.inf if tails[rank] else 0.0)
    result = Factors(
        (q_b_OK @ u_KS[:, :rank]) * roots_S, roots_S[:, None] * (v_SL[:rank] @ q_a_IL.T)
    )
    return Recompressed(result, error)


def concatenate(parts: Sequence[Factors]) -> Factors:
    """Return one pair of factors whose product is the sum of the parts' products.

    Raises:
        ShapeError: they belong to layers of other sizes.
    """
    if len({each.weight_shape for each in parts}) != 1:
        raise _odd_shapes(parts)
    scaled = [each.scaled(1.0) for each in parts]
    return Factors(
        np.concatenate([each.b for each in scaled], axis=1),
        np.concatenate([each.a for each in scaled], axis=0),
    )


def product_norm(factors: Factors) -> float:
    """Return the Frobenius norm of scale · B A without making it."""
    if not factors.rank:
        return 0.0
    wide = factors.scaled(1.0)
    return float(np.linalg.norm(np.linalg.qr(wide.b).R @ np.linalg.qr(wide.a.T).R.T))


def relative_error(
    result: Factors | Sequence[Factors], factors: Sequence[Factors], weights: Sequence[float]
) -> float:
    """Return how far a result is from the mean of products, relative to it, in Frobenius norm.

    Args:
        result: of some rule; several pairs stand for the sum of their products.
        factors: of the sites.
        weights: of the sites.

    Returns:
        0 for no error, and infinity where the mean is zero and the result is not.
    """
    exact = stacked(factors, weights)
    parts = [result] if isinstance(result, Factors) else list(result)
    gap = product_norm(concatenate([*parts, exact.scaled(-1.0)]))
    norm = product_norm(exact)
    if norm:
        return gap / norm
    return math.inf if gap else 0.0


def to_float32(values: Matrix) -> NDArray[np.float32]:
    """Round to float32.

    Raises:
        UpdateError: a value is too large for it, or is not finite.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise UpdateError("this round's updates lead to values too large for float32")
    return rounded


def _wide(values: Matrix) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _check(factors: Sequence[Factors], weights: Sequence[float]) -> list[float]:
    """Return the weights as shares of their sum."""
    if not factors:
        raise UpdateError("no site sent an update in this round")
    if len(factors) != len(weights):
        raise InputError(f"{len(factors)} sites have {len(weights)} weights (expected as many)")
    if len({each.weight_shape for each in factors}) != 1:
        raise _odd_shapes(factors)
    for weight in weights:
        _check_weight(weight)
    total = float(sum(weights))
    return [weight / total for weight in weights]


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise UpdateError(f"a site sent the weight {weight} (expected more than 0)")


def _odd_shapes(factors: Sequence[Factors]) -> ShapeError:
    shapes = sorted({each.weight_shape for each in factors})
    return ShapeError(f"factors of weights of shapes {shapes} have no mean (expected one shape)")
