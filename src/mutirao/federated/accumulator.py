"""The fold: replies are added one at a time, in memory that does not grow with the sites.

Two accumulators. ``FixedPointAccumulator`` adds integers, whose sum does not depend on who
came first: any order of arrival gives the same bits, on any machine. Its step is a power of
two, chosen so that all sites at the clip, with the largest weight, still fit into 63 bits.
``OrderedAccumulator`` adds floats in the order of the sites' names, and says whose turn it is;
its result is that of ``strategy.mean_update``, without all updates in memory at once.

A reply counts whole or not at all: it is checked before anything of it is added. Weights are
training tokens, or 1 for equal sites. Rules that compare single updates are in ``robust``.

Memory per value: 8 bytes (4 in float32), beside the reply that is being added and the mean, of
4 bytes each. Not wired into runs yet: they hold all updates of a round until its end. Not here:
masks (secure aggregation has a modulus and a step of its own), and keeping a half-done round;
it is done again from the sites' journals.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, UpdateError
from mutirao.federated.codec.blocks import stretches
from mutirao.federated.codec.shapes import Shapes, Tensors, check_tensors

SUM_BITS = 63
"""Bits of an int64's magnitude."""
CLIP_BITS = 24
"""At least so many bits between a step and the clip, as a float32 has."""

W = TypeVar("W", int, float)


@dataclass(frozen=True)
class FixedPointSum:
    """A step for values up to a clip, such that no sum can overflow an int64.

    With num_sites * max_weight < 2^b and clip < 2^e, a step of 2^-(63 - b - e) keeps every sum
    below (2^b - 1) * 2^(63 - b) < 2^63, rounding included.
    """

    clip: float
    """Largest magnitude of a value, finite, > 0."""
    num_sites: int
    """Most replies in a sum, >= 1."""
    max_weight: int = 1
    """Largest weight of a reply; 1 for equal weights, else training tokens."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise InputError(f"clip={self.clip} is not supported (expected more than 0)")
        if self.num_sites < 1 or self.max_weight < 1:
            raise InputError(
                f"num_sites={self.num_sites} with max_weight={self.max_weight} is not supported "
                "(expected at least 1 of each)"
            )
        if self._weight_bits > SUM_BITS - CLIP_BITS:
            raise InputError(
                f"num_sites={self.num_sites} with max_weight={self.max_weight} leaves fewer than "
                f"{CLIP_BITS} bits for a value (expected a product below "
                f"{2 ** (SUM_BITS - CLIP_BITS)}); weigh in thousands of tokens, or equally"
            )

    @property
    def fraction_bits(self) -> int:
        """The step is two to the power of minus this; the error of a mean is half a step."""
        return SUM_BITS - self._weight_bits - math.frexp(self.clip)[1]

    @property
    def _weight_bits(self) -> int:
        return (self.num_sites * self.max_weight).bit_length()

    def to_integers(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return values within the clip as whole steps, to nearest, ties to even."""
        return np.rint(np.ldexp(values.astype(np.float64), self.fraction_bits)).astype(np.int64)

    def to_mean(self, sums: NDArray[np.int64], total_weight: int) -> NDArray[np.float32]:
        """Return sums of weighted steps as their mean."""
        mean = np.ldexp(sums.astype(np.float64) / total_weight, -self.fraction_bits)
        return mean.astype(np.float32)


class FixedPointAccumulator:
    """A weighted mean of updates, the same to the last bit in whatever order they come."""

    def __init__(
        self, shapes: Shapes, sites: Collection[str], *, clip: float, max_weight: int = 1
    ) -> None:
        """Start at zero.

        Args:
            shapes: of the update's tensors.
            sites: names of all that may send one.
            clip: largest magnitude that a value may have; beyond it a reply is refused.
            max_weight: largest weight of a reply; 1 for equal weights, else training tokens.

        Raises:
            InputError: clip, number of sites or largest weight leave no safe step.
        """
        self.fixed_point = FixedPointSum(clip, len(set(sites)), max_weight)
        self._shapes = dict(shapes)
        self._waiting = set(sites)
        self._weights: dict[str, int] = {}
        self._sums = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}

    @property
    def weights(self) -> dict[str, int]:
        """Weight of each reply that was added, by site."""
        return dict(sorted(self._weights.items()))

    def add(self, site: str, tensors: Tensors, weight: int = 1) -> None:
        """Add one site's update.

        Args:
            site: its name.
            tensors: decoded, all of them.
            weight: 1 for equal weights, else training tokens.

        Raises:
            UpdateError: the site is not awaited, or its update or weight is not as agreed;
                nothing of it was added.
        """
        if site not in self._waiting:
            raise UpdateError(f"an update came in the name of {site[:64]!r}, which is not awaited")
        if not 1 <= weight <= self.fixed_point.max_weight:
            raise UpdateError(
                f"site {site} sent the weight {weight} (expected 1 to "
                f"{self.fixed_point.max_weight})"
            )
        check_tensors(tensors, self._shapes, f"site {site}")
        _check_clip(tensors, self.fixed_point.clip, site)
        for name, sums in self._sums.items():
            values_N, sums_N = tensors[name].reshape(-1), sums.reshape(-1)
            for part in stretches(sums_N.size):
                sums_N[part] += self.fixed_point.to_integers(values_N[part]) * np.int64(weight)
        self._waiting.remove(site)
        self._weights[site] = weight

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """Return the weighted mean of what was added.

        Raises:
            UpdateError: nothing was.
        """
        total = _total(self._weights)
        means = {name: np.empty(shape, np.float32) for name, shape in self._shapes.items()}
        for name, sums in self._sums.items():
            sums_N, mean_N = sums.reshape(-1), means[name].reshape(-1)
            for part in stretches(sums_N.size):
                mean_N[part] = self.fixed_point.to_mean(sums_N[part], total)
        return means

    @property
    def sha256(self) -> str:
        """Hash of sums, step and weights: the same whoever came first."""
        head = [self.fixed_point.fraction_bits, self.weights]
        return _hash(self._sums, head)


class OrderedAccumulator:
    """A weighted mean of updates in floats, added in the order of the sites' names.

    Replies of other sites wait where they lie, with the transport, until it is their turn.
    """

    def __init__(
        self,
        shapes: Shapes,
        sites: Collection[str],
        *,
        dtype: Literal["float32", "float64"] = "float64",
    ) -> None:
        """Start at zero.

        Args:
            shapes: of the update's tensors.
            sites: names of all that may send one.
            dtype: of the sums.
        """
        self._shapes = dict(shapes)
        self._waiting = sorted(set(sites), reverse=True)
        self._weights: dict[str, float] = {}
        self._sums = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}

    @property
    def next_site(self) -> str | None:
        """Whose turn it is; None after the last."""
        return self._waiting[-1] if self._waiting else None

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reply that was added, by site."""
        return dict(self._weights)

    def add(self, site: str, tensors: Tensors, weight: float = 1.0) -> None:
        """Add the update of the site whose turn it is.

        Args:
            site: its name.
            tensors: decoded, all of them.
            weight: 1 for equal weights, else training tokens.

        Raises:
            UpdateError: it is another's turn, or update or weight are not as agreed; nothing
                of it was added.
        """
        self._check_turn(site)
        if not (math.isfinite(weight) and weight > 0):
            raise UpdateError(f"site {site} sent the weight {weight} (expected more than 0)")
        check_tensors(tensors, self._shapes, f"site {site}")
        for name, sums in self._sums.items():
            values_N, sums_N = tensors[name].reshape(-1), sums.reshape(-1)
            with np.errstate(over="ignore"):  # told by ``mean``
                for part in stretches(sums_N.size):
                    sums_N[part] += values_N[part].astype(sums.dtype) * sums.dtype.type(weight)
        self._waiting.pop()
        self._weights[site] = weight

    def skip(self, site: str) -> None:
        """Go on without the site whose turn it is, because it was lost.

        Raises:
            UpdateError: it is another's turn.
        """
        self._check_turn(site)
        self._waiting.pop()

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Return the weighted mean of what was added.

        Raises:
            UpdateError: nothing was, or the sums are too large for their type.
        """
        total = _total(self._weights)
        means = {name: sums.astype(np.float64) / total for name, sums in self._sums.items()}
        for name, mean in means.items():
            if not np.isfinite(mean).all():
                raise UpdateError(f"the sum of tensor {name!r} is too large for its type")
        return means

    @property
    def sha256(self) -> str:
        """Hash of sums and weights."""
        return _hash(self._sums, [self.weights])

    def _check_turn(self, site: str) -> None:
        if site != self.next_site:
            raise UpdateError(
                f"an update came in the name of {site[:64]!r} (the next is "
                f"{self.next_site or 'nobody: all were added'})"
            )


def _check_clip(tensors: Tensors, clip: float, site: str) -> None:
    for name, values in tensors.items():
        largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
        if largest > clip:
            raise UpdateError(
                f"site {site} sent tensor {name!r} with a value of magnitude {largest:g} "
                f"(expected at most {clip:g}, the agreed clip)"
            )


def _total(weights: Mapping[str, W]) -> W:
    if not weights:
        raise UpdateError("no site sent an update in this round")
    return sum(weights.values())


def _hash(sums: Mapping[str, NDArray[Any]], head: list[Any]) -> str:
    digest = hashlib.sha256(repr(head).encode())
    for name in sorted(sums):
        array = sums[name]
        digest.update(repr((name, array.shape, array.dtype.str)).encode())
        values_N = array.reshape(-1)
        for part in stretches(values_N.size):
            digest.update(values_N[part].astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
