"""The fold: a round's updates become their mean, one tensor of one site in memory at a time.

Updates lie in files (``updates``). For each tensor the sites are taken in the order of their
names and added in float64, so that neither who came first nor how many sites there are changes
bits or memory. Robust rules look at all sites' values of a coordinate: one tensor's decoded
values go to a file without a name, and come back a stretch of all sites at a time.

    mean, separate           weighted by tokens, or equally
    median, trimmed_mean     of each value; weights do not count
    krum, multi_krum         two passes: distances of all pairs, then the mean of the selected
    fedex, stacked           not here: ``low_rank_rounds`` looks at pairs of tensors

Not here: the outer step (``coordinator.next_state``) and secure aggregation, whose mean comes
from a sum (``coordinator.secure_round``).

Shapes: S sites, N values of a tensor, K of a stretch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, UpdateError
from mutirao.federated.aggregation.robust import (
    Rule,
    check_krum,
    krum_scores_of,
    median_rule,
    trimmed_rule,
)
from mutirao.federated.aggregation.updates import Decode, sum_products, sum_squares
from mutirao.federated.codec import Shapes
from mutirao.federated.codec.blocks import STRETCH, stretches


@dataclass(frozen=True)
class RoundUpdates:
    """The accepted updates of a round."""

    shapes: Shapes
    """Of the trained tensors, by name."""
    weights: Mapping[str, float]
    """Weight of each site, by name; > 0."""
    decode: Decode
    """Gives one tensor of one site."""
    scratch: Path | None = None
    """Folder for files without a name, of one tensor of all sites; None for the system's."""

    @property
    def sites(self) -> list[str]:
        """Names of the sites, sorted: the order in which they are added."""
        return sorted(self.weights)

    def without(self, *left_out: str) -> RoundUpdates:
        """Return the same without some sites."""
        kept = {site: weight for site, weight in self.weights.items() if site not in left_out}
        return replace(self, weights=kept)


Mean = Callable[[str], NDArray[np.float64]]
"""Gives one tensor of a round's mean update, by name."""


def combine(updates: RoundUpdates, aggregation: str, *, num_faulty: int = 1) -> Mean:
    """Return what gives a round's mean update, a tensor at a time.

    Args:
        updates: of the round.
        aggregation: a name of ``FederatedConfig.aggregation``.
        num_faulty: faulty sites that a robust rule bears.

    Raises:
        InputError: there is no such rule, or it cannot bear so many faulty sites.
        UpdateError: there is no update, or a weight is not positive.
    """
    _check_weights(updates)
    num_sites = len(updates.sites)
    match aggregation:
        case "mean" | "separate":
            return lambda name: weighted_mean(updates, name)
        case "median":
            return lambda name: _by_columns(updates, name, median_rule)
        case "trimmed_mean":
            rule = trimmed_rule(num_sites, num_faulty)
            return lambda name: _by_columns(updates, name, rule)
        case "krum" | "multi_krum":
            selected = _select(updates, num_faulty, multiple=aggregation == "multi_krum")
            return lambda name: weighted_mean(selected, name)
    raise InputError(
        f"federated.aggregation={aggregation} does not go tensor by tensor (expected mean, "
        "separate, median, trimmed_mean, krum or multi_krum)"
    )


def weighted_mean(updates: RoundUpdates, name: str) -> NDArray[np.float64]:
    """Return the weighted mean of one tensor over the sites, in the order of their names."""
    total = np.zeros(updates.shapes[name], np.float64)
    total_N = total.reshape(-1)
    for site in updates.sites:
        values_N = updates.decode(site, name).reshape(-1)
        weight = np.float64(updates.weights[site])
        for part in stretches(total_N.size):
            total_N[part] += weight * values_N[part].astype(np.float64)
        del values_N  # before the next site's is made
    total /= _sum_weights(updates)
    return total


class Directions:
    """Each update's norm, and its cosine to the round's mean, gathered tensor by tensor."""

    def __init__(self, updates: RoundUpdates) -> None:
        self._updates = updates
        self._squares = dict.fromkeys(updates.sites, 0.0)
        self._products = dict.fromkeys(updates.sites, 0.0)
        self._mean_squares = 0.0

    def add(self, name: str, mean: NDArray[np.float64]) -> None:
        """Take in one tensor; every site's is decoded once more."""
        self._mean_squares += sum_squares(mean)
        for site in self._updates.sites:
            values = self._updates.decode(site, name)
            self._squares[site] += sum_squares(values)
            self._products[site] += sum_products(values, mean)
            del values

    @property
    def norms(self) -> dict[str, float]:
        """L2 norm of each update, by site."""
        return {site: math.sqrt(squares) for site, squares in self._squares.items()}

    @property
    def cosines(self) -> dict[str, float | None]:
        """Cosine of each update to the mean, by site; None where one of them is zero."""
        length = math.sqrt(self._mean_squares)
        return {
            site: self._products[site] / (norm * length) if norm * length > 0 else None
            for site, norm in self.norms.items()
        }


def _check_weights(updates: RoundUpdates) -> None:
    if not updates.weights:
        raise UpdateError("no site sent an update in this round")
    for site, weight in sorted(updates.weights.items()):
        if not (math.isfinite(weight) and weight > 0):
            raise UpdateError(f"site {site} sent the weight {weight} (expected more than 0)")


def _sum_weights(updates: RoundUpdates) -> float:
    total = 0.0
    for site in updates.sites:
        total += updates.weights[site]
    return total


def _by_columns(updates: RoundUpdates, name: str, rule: Rule) -> NDArray[np.float64]:
    """Apply a rule to all sites' values of each coordinate of one tensor."""
    result = np.empty(updates.shapes[name], np.float64)
    result_N = result.reshape(-1)
    with _side_by_side(updates, name) as columns:
        for part, values_SK in columns:
            result_N[part] = rule(values_SK)
    return result


@contextmanager
def _side_by_side(
    updates: RoundUpdates, name: str
) -> Iterator[Iterable[tuple[slice, NDArray[np.float64]]]]:
    """Decode a tensor of every site to a file; give stretches of all sites beside each other."""
    size = math.prod(updates.shapes[name])
    with tempfile.TemporaryFile(dir=updates.scratch) as file:
        for site in updates.sites:
            file.write(np.ascontiguousarray(updates.decode(site, name)).data)
        file.flush()
        yield _columns(file, len(updates.sites), size)


def _columns(
    file: BinaryIO, num_sites: int, size: int
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    length = max(1, STRETCH // num_sites)  # so that memory does not grow with the sites
    for start in range(0, size, length):
        part = slice(start, min(start + length, size))
        rows = []
        for row in range(num_sites):
            file.seek(4 * (row * size + part.start))
            rows.append(np.frombuffer(file.read(4 * (part.stop - part.start)), np.float32))
        yield part, np.stack(rows).astype(np.float64)


def _select(updates: RoundUpdates, num_faulty: int, *, multiple: bool) -> RoundUpdates:
    """Return the updates that Krum keeps, with equal weights."""
    check_krum(len(updates.sites), num_faulty)
    distances = pair_distances(updates)
    scores = krum_scores_of(updates.sites, distances, num_faulty)
    num_selected = len(scores) - num_faulty if multiple else 1
    best = sorted(scores, key=lambda site: (scores[site], site))[:num_selected]
    return replace(updates, weights=dict.fromkeys(best, 1.0))


def pair_distances(updates: RoundUpdates) -> NDArray[np.float64]:
    """Return the squared distance of every two updates: (S, S), in the order of names."""
    num_sites = len(updates.sites)
    distances = np.zeros((num_sites, num_sites))
    for name in sorted(updates.shapes):
        with _side_by_side(updates, name) as columns:
            for _, values_SK in columns:
                _add_distances(distances, values_SK)
    return distances


def _add_distances(distances: NDArray[np.float64], values_SK: NDArray[np.float64]) -> None:
    for row in range(values_SK.shape[0]):
        for column in range(row):
            distance = float(np.square(values_SK[row] - values_SK[column]).sum())
            distances[row, column] += distance
            distances[column, row] += distance
