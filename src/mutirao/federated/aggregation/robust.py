"""Rules that compare single updates, and screens that name a site and what is wrong with it.

Coordinate-wise median and trimmed mean (Yin et al. 2018, arXiv:1803.01498), Krum and multi-Krum
(Blanchard et al. 2017, arXiv:1703.02757), and three screens for gross faults: values that are
not finite, norms out of proportion, updates that point against all others.

They guard against broken machines and clumsy faults. Somebody who knows the rule can stay inside
it: poisoned instructions cost a model its safety and robust rules won back 4 % at most (Ye et
al. 2024, arXiv:2406.10630). They cannot work under secure aggregation (``compatibility``), and
treat all sites alike: a weight is a claim, and a claim must not decide. Where sites' data differ
much, an honest site can look like a fault.

Runs use the rules through ``fold``, with updates in files; the functions here that take updates
want them in memory. Screens are for whoever looks at a round afterwards: a run refuses by itself
only what does not decode or exceeds ``federated.max_update_norm``, and records every update's
norm and its cosine to the mean.

Shapes: S sites, N values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mutirao.config import Config
from mutirao.errors import InputError, UpdateError
from mutirao.federated.codec.blocks import stretches
from mutirao.federated.codec.shapes import Tensors, check_tensors, is_finite, shapes_of

Rule = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Makes one value of each column: (S, N) -> (N,)."""
Updates = Mapping[str, Tensors]
"""Each site's update, by site; all of the same names and shapes."""


def coordinate_median(updates: Updates) -> dict[str, NDArray[np.float32]]:
    """Return the median of each value over the sites; of an even number, the middle of two.

    Raises:
        UpdateError: there is none, or they differ in names or shapes, or are not finite.
    """
    return _fold(updates, median_rule)


def trimmed_mean(updates: Updates, num_trimmed: int) -> dict[str, NDArray[np.float32]]:
    """Return the mean of each value without its largest and smallest over the sites.

    Args:
        updates: by site.
        num_trimmed: sites left out at each end; the number of faulty sites that it bears.

    Raises:
        InputError: nothing would be left.
        UpdateError: there is no update, or they differ in names or shapes, or are not finite.
    """
    return _fold(updates, trimmed_rule(len(updates), num_trimmed))


def median_rule(values_SN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each column."""
    return np.asarray(np.median(values_SN, axis=0), np.float64)


def trimmed_rule(num_sites: int, num_trimmed: int) -> Rule:
    """Return what gives the mean of each column without its largest and smallest values.

    Raises:
        InputError: nothing would be left.
    """
    if num_trimmed < 0 or 2 * num_trimmed >= num_sites:
        raise InputError(
            f"num_trimmed={num_trimmed} is not supported with {num_sites} sites (expected 0 "
            f"to {max(0, (num_sites - 1) // 2)})"
        )
    kept = slice(num_trimmed, num_sites - num_trimmed)
    return lambda values_SN: np.asarray(np.sort(values_SN, axis=0)[kept].mean(axis=0), np.float64)


def krum_scores(updates: Updates, num_faulty: int) -> dict[str, float]:
    """Return each site's score: its squared distances to the S - f - 2 nearest others, summed.

    Args:
        updates: by site.
        num_faulty: sites f that may be faulty; 2 f + 2 < S.

    Returns:
        By site; the lower, the more it lies among others.

    Raises:
        InputError: there are too few sites for so many faulty ones.
        UpdateError: updates differ in names or shapes, or are not finite.
    """
    check_krum(len(updates), num_faulty)
    sites = _check_updates(updates)
    distances = np.zeros((len(sites), len(sites)))
    for row, one in enumerate(sites):
        for column, other in enumerate(sites[:row]):
            distance = _squared_distance(updates[one], updates[other])
            distances[row, column] = distances[column, row] = distance
    return krum_scores_of(sites, distances, num_faulty)


def check_krum(num_sites: int, num_faulty: int) -> None:
    """Refuse too many faulty sites for Krum.

    Raises:
        InputError: there are too few sites for so many faulty ones.
    """
    if num_faulty < 0 or 2 * num_faulty + 2 >= num_sites:
        raise InputError(
            f"num_faulty={num_faulty} is not supported with {num_sites} sites (Krum wants "
            f"more than 2 x {num_faulty} + 2)"
        )


def krum_scores_of(
    sites: Sequence[str], distances_SS: NDArray[np.float64], num_faulty: int
) -> dict[str, float]:
    """Return Krum's scores from the squared distances of all pairs; see ``krum_scores``."""
    nearest = np.sort(distances_SS, axis=1)[:, 1 : len(sites) - num_faulty - 1]  # not to itself
    return dict(zip(sites, (float(row.sum()) for row in nearest), strict=True))


def select_krum(updates: Updates, num_faulty: int, num_selected: int = 1) -> list[str]:
    """Return the sites with the lowest scores, best first; of equals, the first by name.

    Args:
        updates: by site.
        num_faulty: sites f that may be faulty.
        num_selected: 1 for Krum, more for multi-Krum; at most S - f.

    Raises:
        InputError: the numbers do not fit the number of sites.
        UpdateError: updates differ in names or shapes, or are not finite.
    """
    scores = krum_scores(updates, num_faulty)
    if not 1 <= num_selected <= len(scores) - num_faulty:
        raise InputError(
            f"num_selected={num_selected} is not supported with {len(scores)} sites and "
            f"num_faulty={num_faulty} (expected 1 to {len(scores) - num_faulty})"
        )
    return sorted(scores, key=lambda site: (scores[site], site))[:num_selected]


def multi_krum(
    updates: Updates, num_faulty: int, num_selected: int = 1
) -> dict[str, NDArray[np.float32]]:
    """Return the plain mean of the selected sites' updates; with one, Krum itself.

    Args and errors are those of ``select_krum``.
    """
    selected = select_krum(updates, num_faulty, num_selected)
    return _fold({site: updates[site] for site in selected}, lambda each: each.mean(axis=0))


class ScreenConfig(Config):
    """What counts as a gross fault."""

    max_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest L2 norm of an update; null for no such bound."""
    max_norm_ratio: float | None = Field(default=10.0, gt=1, allow_inf_nan=False)
    """Largest norm, in medians of the sites' norms; null for none. 10 is an assumption."""
    min_cosine: float | None = Field(default=-0.2, ge=-1, lt=1)
    """Least cosine to the mean direction of the others; null for none. Updates of sites with
    unlike data are nearly at right angles, so it lies below zero; -0.2 is an assumption."""


@dataclass(frozen=True)
class Fault:
    """One site's gross fault."""

    site: str
    """Its name."""
    reason: str
    """One sentence: what came, what is accepted."""


def screen_updates(updates: Updates, config: ScreenConfig | None = None) -> list[Fault]:
    """Return the gross faults of a round, in the order of the sites' names.

    A site is named once, with its first fault: values not finite, then norm, then direction.
    Each screen looks at those that passed the one before. A norm is compared with others from
    three sites on, and a direction too, since of two that disagree neither is the faulty one.

    Args:
        updates: by site; all of the same names and shapes.
        config: what counts as a fault; the defaults where None.

    Raises:
        UpdateError: there is no update, or they differ in names or shapes.
    """
    config = config if config is not None else ScreenConfig()
    _check_shapes(updates)
    faults = _screen_finite(updates)
    faults += _screen_norms(_without(updates, faults), config)
    faults += _screen_directions(_without(updates, faults), config)
    return sorted(faults, key=lambda fault: fault.site)


def _screen_finite(updates: Updates) -> list[Fault]:
    faults = []
    for site in sorted(updates):
        bad = sorted(name for name, values in updates[site].items() if not is_finite(values))
        if bad:
            reason = f"site {site} sent tensor {bad[0]!r} with values that are not finite"
            faults.append(Fault(site, reason))
    return faults


def _screen_norms(updates: Updates, config: ScreenConfig) -> list[Fault]:
    norms = {site: math.sqrt(_dot(updates[site], updates[site])) for site in sorted(updates)}
    limit, why = math.inf, ""
    if config.max_norm is not None:
        limit, why = config.max_norm, "the agreed bound"
    median = float(np.median([*norms.values()])) if len(norms) >= 3 else 0.0
    if config.max_norm_ratio is not None and 0 < config.max_norm_ratio * median < limit:
        limit = config.max_norm_ratio * median
        why = f"{config.max_norm_ratio:g} times the sites' median norm"
    return [
        Fault(
            site, f"site {site} sent an update of norm {norm:g} (expected at most {limit:g}, {why})"
        )
        for site, norm in norms.items()
        if norm > limit
    ]


def _screen_directions(updates: Updates, config: ScreenConfig) -> list[Fault]:
    cosines = cosines_to_others(updates) if config.min_cosine is not None else {}
    return [
        Fault(
            site,
            f"site {site} sent an update that points against the others': cosine {cosine:.3f} to "
            f"their mean direction (expected at least {config.min_cosine:g})",
        )
        for site, cosine in cosines.items()
        if config.min_cosine is not None and cosine < config.min_cosine
    ]


def cosines_to_others(updates: Updates) -> dict[str, float]:
    """Return the cosine of each update to the mean direction of the others.

    Directions are of length 1, so a long update counts no more than a short one. Updates of
    zeros have none and are left out; with fewer than three others, nothing is returned.

    Args:
        updates: by site, finite; all of the same names and shapes.

    Returns:
        By site, in the order of names.
    """
    sites = sorted(updates)
    products = np.array([[_dot(updates[a], updates[b]) for b in sites] for a in sites])
    moving = [index for index in range(len(sites)) if products[index, index] > 0]
    if len(moving) < 3:
        return {}
    lengths = np.sqrt(np.diag(products)[moving])
    cosines_SS = products[np.ix_(moving, moving)] / np.outer(lengths, lengths)
    found = {}
    for row, index in enumerate(moving):
        others = np.delete(np.arange(len(moving)), row)
        length = math.sqrt(max(0.0, cosines_SS[np.ix_(others, others)].sum()))
        along = float(cosines_SS[row, others].sum())
        found[sites[index]] = along / length if length > 0 else 0.0
    return found


def _without(updates: Updates, faults: Sequence[Fault]) -> Updates:
    named = {fault.site for fault in faults}
    return {site: update for site, update in updates.items() if site not in named}


def _check_shapes(updates: Updates) -> list[str]:
    if not updates:
        raise UpdateError("no site sent an update in this round")
    sites = sorted(updates)
    first = shapes_of(updates[sites[0]])
    for site in sites[1:]:
        if shapes_of(updates[site]) != first:
            raise UpdateError(f"sites {sites[0]} and {site} sent tensors of other names or shapes")
    return sites


def _check_updates(updates: Updates) -> list[str]:
    sites = _check_shapes(updates)
    for site in sites:
        check_tensors(updates[site], shapes_of(updates[sites[0]]), f"site {site}")
    return sites


def _fold(updates: Updates, rule: Rule) -> dict[str, NDArray[np.float32]]:
    """Apply a rule to all sites' values of each coordinate, a stretch at a time."""
    sites = _check_updates(updates)
    result = {name: np.empty_like(each) for name, each in updates[sites[0]].items()}
    for name, room in result.items():
        flat_SN = [updates[site][name].reshape(-1) for site in sites]
        room_N = room.reshape(-1)
        for part in stretches(room_N.size):
            room_N[part] = rule(np.stack([each[part] for each in flat_SN]).astype(np.float64))
    return result


def _pairs(one: Tensors, other: Tensors) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """Stretches of two updates, in float64; in a fixed order, so that sums are the same."""
    for name in sorted(one):
        one_N, other_N = one[name].reshape(-1), other[name].reshape(-1)
        for part in stretches(one_N.size):
            yield one_N[part].astype(np.float64), other_N[part].astype(np.float64)


def _squared_distance(one: Tensors, other: Tensors) -> float:
    return math.fsum(float(np.square(a - b).sum()) for a, b in _pairs(one, other))


def _dot(one: Tensors, other: Tensors) -> float:
    return math.fsum(float((a * b).sum()) for a, b in _pairs(one, other))
