"""Rounds whose state is a sum of low-rank products: aggregation 'stacked' and 'fedex'.

What sites hold beside the frozen base model is a *history* for each adapted layer: factors
``<module>.history_B`` (O, R) and ``<module>.history_A`` (R, I), whose product is all that was
learned in earlier rounds. A round adds columns to it and changes none, so all sides stay the same
to the bit without any arithmetic; when there are more than twice as many as the layer can use,
the coordinator recompresses and sends the history whole.

    stacked   the state is the history alone. Each round trains a fresh adapter: A from seed and
              round (``start_adapter``), B zero. Ranks may differ from site to site; the first
              rows of A are the same.
    fedex     the state is history and adapter. Sites go on from the mean factors, and what these
              lack of the mean of products goes into the history.

In both a site sends its trained adapter minus the one it started from, which the coordinator
knows: codes then round what A moved, not A itself. The coordinator's state is what the sites
hold; what a download in less than float32 loses of a round's product is lost for that round, and
does not come back. There is no step size other than 1 and no momentum: a history can only be
added to.

Knows nothing of parcels and files; the tensors it is given may be read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, ShapeError, UpdateError
from mutirao.federated.aggregation.low_rank import (
    Factors,
    Recompressed,
    concatenate,
    fedex,
    mean_product,
    recompress,
    to_float32,
)
from mutirao.federated.aggregation.low_rank_state import factor_names, history_tensors, split_state
from mutirao.federated.aggregation.outer import FedAvg
from mutirao.federated.codec.shapes import Tensors
from mutirao.federated.plan import FederatedConfig

LOW_RANK_RULES = ("stacked", "fedex")
"""Values of ``aggregation`` whose rounds are made here; 'separate' is a plain mean of tensors."""
MAX_FULL_RANKS = 2
"""How often the history may hold a layer's full rank before it is recompressed; an assumption:
at 1 a history of full rank would be sent whole in every round."""

Values = Mapping[str, NDArray[np.floating[Any]]]
CarryTensor = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
"""What a change of a tensor becomes on its way: ``decode(encode(change))``."""


@dataclass(frozen=True, eq=False)
class LowRankStep:
    """What leads from one state to the next."""

    form: Literal["change", "whole"]
    """'change': columns for the history, and for 'fedex' a change of the adapter; 'whole': the
    next state itself."""
    tensors: dict[str, NDArray[np.float32]]
    """What is sent, before it is encoded."""
    ranks: dict[str, int]
    """Columns of the history in ``tensors``, by module; they travel with it (``state.ranks``)."""


class Trained(Mapping[str, NDArray[np.float64]]):
    """A site's trained adapter: where it started plus its update, one tensor at a time."""

    def __init__(self, start: Tensors, update: Tensors) -> None:
        self._start, self._update = start, update

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        update, start = self._update[name], self._start[name]
        if update.shape != start.shape:
            raise UpdateError(
                f"tensor {name!r} of a site has shape {update.shape} (expected {start.shape})"
            )
        return start.astype(np.float64) + update

    def __iter__(self) -> Iterator[str]:
        return iter(self._update)

    def __len__(self) -> int:
        return len(self._update)


def check_low_rank(federated: FederatedConfig) -> None:
    """Refuse settings that have no meaning for these rounds.

    Raises:
        InputError: with the setting, and what to write instead.
    """
    rule = federated.aggregation
    if rule not in LOW_RANK_RULES:
        return
    if federated.outer != FedAvg(learning_rate=1.0):
        raise InputError(
            f"federated.outer={federated.outer.rule} with aggregation={rule} is not supported: a "
            "sum of products can be added to, not stepped along (expected rule 'fedavg' with "
            "learning_rate 1)"
        )
    if federated.download.is_sparse:
        raise InputError(
            f"federated.download.keep_one_in={federated.download.keep_one_in} with aggregation="
            f"{rule} is not supported: single values of factors mean nothing (expected 1)"
        )
    if rule == "stacked" and federated.keeps_optimizer:
        raise InputError(
            "federated.keeps_optimizer=true with aggregation=stacked is not supported: each "
            "round trains a fresh adapter, to which earlier moments do not belong (expected false)"
        )


def round_product(
    adapters: Mapping[str, Values], weights: Mapping[str, float], scales: Mapping[str, float]
) -> dict[str, Recompressed]:
    """Return the mean over sites of scale · B A for each adapted layer, in float64.

    Args:
        adapters: trained tensors by site; read one layer and site at a time, in the order of
            names, so that a mapping may fetch them when asked.
        weights: by site.
        scales: alpha / rank, by site.

    Returns:
        By module.

    Raises:
        UpdateError: there is no site, or one lacks a tensor or sends one of another layer's size.
    """
    if not adapters:
        raise UpdateError("no site sent an update in this round")
    modules = {site: factor_names(adapters[site]) for site in sorted(adapters)}
    first, expected = next(iter(modules.items()))
    for site, names in modules.items():
        if names != expected:
            odd = sorted(set(names.items()) ^ set(expected.items()))[0][0]
            raise UpdateError(f"sites {first} and {site} adapt different layers, such as {odd!r}")

    def take(module: str) -> Iterator[tuple[Factors, float]]:
        for site in modules:
            name_b, name_a = expected[module]
            values = adapters[site]
            yield Factors(values[name_b], values[name_a], scales[site]), weights[site]

    try:
        return {module: mean_product(take(module)) for module in expected}
    except ShapeError as error:
        raise UpdateError(f"the sites' adapters do not fit together: {error}") from None


def stacked_step(state: Tensors, product: Mapping[str, Recompressed]) -> LowRankStep:
    """Return the step of 'stacked': the round's product goes into the history."""
    return _grow(state, {module: each.factors for module, each in product.items()}, {}, {})


def fedex_step(
    state: Tensors,
    adapters: Mapping[str, Values],
    weights: Mapping[str, float],
    scale: float,
    *,
    carry: CarryTensor | None = None,
) -> LowRankStep:
    """Return the step of 'fedex': mean factors as a change, and their residual as history.

    Args:
        state: what all sites hold.
        adapters: trained tensors by site.
        weights: by site.
        scale: alpha / rank, the same at all sites.
        carry: what the codec makes of the change of a factor; the residual makes up for it.
            None where changes travel in float32.

    Raises:
        UpdateError: tensors are missing or do not fit together.
    """
    if not adapters:
        raise UpdateError("no site sent an update in this round")
    sites = sorted(adapters)
    changes: dict[str, NDArray[np.float32]] = {}
    landed: dict[str, NDArray[np.float32]] = {}
    residuals: dict[str, Factors] = {}
    for module, names in factor_names(state).items():
        by_letter = dict(zip("BA", names, strict=True))

        def land(
            letter: str, mean: NDArray[Any], by: Mapping[str, str] = by_letter
        ) -> NDArray[Any]:
            """Return the mean factor as the sites will hold it."""
            name = by[letter]
            changes[name] = to_float32(mean - state[name].astype(np.float64))
            arrived = carry(name, changes[name]) if carry else changes[name]
            landed[name] = np.asarray(state[name] + arrived, np.float32)
            return landed[name]

        try:
            pairs = [Factors(adapters[s][names[0]], adapters[s][names[1]], scale) for s in sites]
            _, residuals[module] = fedex(pairs, [weights[site] for site in sites], carry=land)
        except KeyError as error:
            raise UpdateError(f"a site sent no tensor {error}") from None
        except (InputError, ValueError) as error:
            raise UpdateError(f"the sites' adapters do not fit together: {error}") from None
    return _grow(state, residuals, changes, landed)


def _grow(
    state: Tensors,
    more: Mapping[str, Factors],
    changes: Mapping[str, NDArray[np.float32]],
    landed: Mapping[str, NDArray[np.float32]],
) -> LowRankStep:
    """Return a step that appends to the history, or replaces it where it would be too long."""
    _, history = split_state(state)
    if not any(
        module in history and history[module].rank + each.rank > _most_columns(each)
        for module, each in more.items()
    ):
        tensors = history_tensors({m: f.to_float32() for m, f in more.items() if f.rank})
        ranks = {module: each.rank for module, each in more.items() if each.rank}
        return LowRankStep("change", dict(sorted({**changes, **tensors}.items())), ranks)
    parts = {m: [f[m] for f in (history, more) if m in f] for m in {*history, *more}}
    sums = {m: recompress(concatenate(each)).factors.to_float32() for m, each in parts.items()}
    sums = {module: each for module, each in sums.items() if each.rank}
    whole = {**landed, **history_tensors(sums)}
    return LowRankStep("whole", dict(sorted(whole.items())), {m: f.rank for m, f in sums.items()})


def _most_columns(factors: Factors) -> int:
    return MAX_FULL_RANKS * min(factors.weight_shape)
