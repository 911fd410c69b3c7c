"""Outer optimizers: how the sites' mean update moves the global parameters.

A mean update points where the sites went; the pseudo-gradient of the papers is its negative, so
that what is subtracted there is added here. Every rule is a small frozen configuration with
``start`` and ``step``; neither changes what it is given. All that is carried from round to round
is an ``OuterState``: float32 arrays by name and the number of steps, which a journal keeps as
they are. Sums are made in float64 and rounded once, so a run that is resumed from a kept state
goes on bit for bit.

    FedAvg     McMahan et al. 2017, arXiv:1602.05629 (with an outer learning rate)
    Nesterov   DiLoCo, Douillard et al. 2023, arXiv:2311.08105; as in torch.optim.SGD
    FedMom     Huo et al. 2020, arXiv:2002.02090: Nesterov's two sequences. With a constant
               learning rate it is the same as ``Nesterov``; when the rate changes between
               rounds, the momentum keeps the rate it was made with
    FedAdam    Reddi et al. 2021, arXiv:2003.00295, algorithm 2

Runs step one tensor at a time (``coordinator.next_state``), which gives the same bits as all at
once: no rule looks at two tensors together.

Not here: FedYogi, FedAdagrad, schedules of the outer learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mutirao.config import Config
from mutirao.errors import UpdateError
from mutirao.federated.codec.shapes import Tensors, check_tensors, shapes_of

Means = Mapping[str, NDArray[np.floating[Any]]]
"""A mean update, float32 or float64, by name."""


@dataclass(frozen=True)
class OuterState:
    """What an outer optimizer remembers."""

    step: int = 0
    """Steps that were made."""
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By ``kind/tensor``, for example ``momentum/lora_B``; empty where nothing is kept."""

    def of(self, kind: str, name: str) -> NDArray[np.float64]:
        """Return one kept array, in float64."""
        return self.arrays[f"{kind}/{name}"].astype(np.float64)


class OuterOptimizer(Protocol):
    """What every rule can do."""

    def start(self, parameters: Tensors) -> OuterState:
        """Return the state before the first step."""
        ...

    def step(
        self, parameters: Tensors, mean: Means, state: OuterState
    ) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
        """Return the parameters and the state after one step.

        Args:
            parameters: global, before the round; unchanged.
            mean: the sites' mean update, of the same names and shapes.
            state: after the step before, or of ``start``; unchanged.

        Raises:
            UpdateError: mean or state do not fit the parameters, or the step leads out of
                float32; then nothing must be kept.
        """
        ...


class FedAvg(Config):
    """Add the mean update, times a learning rate."""

    rule: Literal["fedavg"] = "fedavg"
    """Name of this rule."""
    learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Outer learning rate; 1 takes the mean of the sites' parameters."""

    def start(self, parameters: Tensors) -> OuterState:
        return OuterState()

    def step(
        self, parameters: Tensors, mean: Means, state: OuterState
    ) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
        _check(parameters, mean, state, kinds=())
        new = {
            name: old.astype(np.float64) + self.learning_rate * mean[name]
            for name, old in parameters.items()
        }
        return _finish(new, {}, state)


class Nesterov(Config):
    """SGD with Nesterov momentum on the pseudo-gradient."""

    rule: Literal["nesterov"] = "nesterov"
    """Name of this rule."""
    learning_rate: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    """Outer learning rate (DiLoCo: 0.7)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Part of the momentum that is kept in each round (DiLoCo: 0.9)."""

    def start(self, parameters: Tensors) -> OuterState:
        return OuterState(arrays=_zeros(parameters, "momentum"))

    def step(
        self, parameters: Tensors, mean: Means, state: OuterState
    ) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
        _check(parameters, mean, state, kinds=("momentum",))
        new: dict[str, NDArray[np.float64]] = {}
        kept: dict[str, NDArray[np.float64]] = {}
        for name, old in parameters.items():
            momentum = self.momentum * state.of("momentum", name) + mean[name]
            direction = mean[name] + self.momentum * momentum
            new[name] = old.astype(np.float64) + self.learning_rate * direction
            kept[f"momentum/{name}"] = momentum
        return _finish(new, kept, state)


class FedMom(Config):
    """Nesterov's two sequences: go where FedAvg would, and on by a part of its last way."""

    rule: Literal["fedmom"] = "fedmom"
    """Name of this rule."""
    learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Outer learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Part of the way between two averages that is gone on with."""

    def start(self, parameters: Tensors) -> OuterState:
        kept = {f"average/{name}": np.array(each) for name, each in parameters.items()}
        return OuterState(arrays=kept)

    def step(
        self, parameters: Tensors, mean: Means, state: OuterState
    ) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
        _check(parameters, mean, state, kinds=("average",))
        new: dict[str, NDArray[np.float64]] = {}
        kept: dict[str, NDArray[np.float64]] = {}
        for name, old in parameters.items():
            average = old.astype(np.float64) + self.learning_rate * mean[name]
            new[name] = average + self.momentum * (average - state.of("average", name))
            kept[f"average/{name}"] = average
        return _finish(new, kept, state)


class FedAdam(Config):
    """Adam on the pseudo-gradient, without bias correction; second moments start at tau^2."""

    rule: Literal["fedadam"] = "fedadam"
    """Name of this rule."""
    learning_rate: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """Outer learning rate; the paper tunes it to the task."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (the paper: 0.9)."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment (the paper: 0.99)."""
    tau: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Adaptivity: added to the root of the second moment, in units of an update's values."""

    def start(self, parameters: Tensors) -> OuterState:
        second = {
            f"second/{name}": np.full_like(each, self.tau**2) for name, each in parameters.items()
        }
        return OuterState(arrays={**_zeros(parameters, "first"), **second})

    def step(
        self, parameters: Tensors, mean: Means, state: OuterState
    ) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
        _check(parameters, mean, state, kinds=("first", "second"))
        new: dict[str, NDArray[np.float64]] = {}
        kept: dict[str, NDArray[np.float64]] = {}
        for name, old in parameters.items():
            update = mean[name].astype(np.float64)
            first = self.beta1 * state.of("first", name) + (1 - self.beta1) * update
            second = self.beta2 * state.of("second", name) + (1 - self.beta2) * update**2
            step = first / (np.sqrt(second) + self.tau)
            new[name] = old.astype(np.float64) + self.learning_rate * step
            kept[f"first/{name}"], kept[f"second/{name}"] = first, second
        return _finish(new, kept, state)


def _zeros(parameters: Tensors, kind: str) -> dict[str, NDArray[np.float32]]:
    return {f"{kind}/{name}": np.zeros_like(each) for name, each in parameters.items()}


def _check(parameters: Tensors, mean: Means, state: OuterState, kinds: tuple[str, ...]) -> None:
    """Refuse a mean or a state that does not belong to these parameters."""
    shapes = shapes_of(parameters)
    if shapes_of(mean) != shapes:
        raise UpdateError(
            f"the mean update has other tensors than the {len(shapes)} global parameters; both "
            "must have the same names and shapes"
        )
    wanted = {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()}
    check_tensors(state.arrays, wanted, "the journal of the outer optimizer")


def _finish(
    parameters: Mapping[str, NDArray[np.float64]],
    arrays: Mapping[str, NDArray[np.float64]],
    state: OuterState,
) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
    """Round to float32, and refuse what does not fit in it."""
    new = {name: _to_float32(name, each) for name, each in parameters.items()}
    kept = {name: _to_float32(name, each) for name, each in arrays.items()}
    return new, OuterState(state.step + 1, kept)


def _to_float32(name: str, values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = np.asarray(values, np.float32)
    if not np.isfinite(rounded).all():
        raise UpdateError(f"this round's updates lead to values of {name!r} too large for float32")
    return rounded
