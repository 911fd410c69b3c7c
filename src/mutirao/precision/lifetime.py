"""What a model costs over its life: training once, then every request, in money and in energy.

Training takes 6 N D operations and a token of inference 2 N (Kaplan et al. 2020, arXiv:2001.08361,
section 2.1), counted as operations of 16 bits; fewer bits count in proportion, or not at all where
the hardware is no faster for them. Hours follow from an accelerator's speed and use, money and
energy from hours. All prices and rates are given by the caller: none are facts of ours.

Left out: attention over long contexts, prompts that are cached, the memory that inference may be
bound by (lower ``inference_utilization``), failed experiments, staff, and the hardware's making.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import Field

from mutirao.config import Config
from mutirao.errors import InputError

FULL_BITS = 16.0
"""Bits of the operations that rates are given in."""
_SECONDS_PER_HOUR = 3600.0
_WATTS_PER_KILOWATT = 1000.0


class Accelerator(Config):
    """A processor, its rates and its price, as the caller has them."""

    peak_flops_per_s: float = Field(gt=0)
    """Operations of 16 bits per second, at most."""
    training_utilization: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that training reaches (assumption)."""
    inference_utilization: float = Field(default=0.2, gt=0, le=1)
    """Share of the peak that inference reaches (assumption; single requests reach far less)."""
    bits_exponent: float = Field(default=1.0, ge=0, le=1)
    """How time follows bits: 1 in proportion (assumption), 0 not at all."""
    power_w: float = Field(ge=0)
    """Electrical power of one accelerator with its share of the host, in watts."""
    pue: float = Field(default=1.2, ge=1)
    """Power usage effectiveness: energy of the building over that of the machines (assumption)."""
    price_per_hour: float = Field(ge=0)
    """Money for one accelerator-hour, energy included."""


class Usage(Config):
    """What a model is asked for in its life."""

    num_requests: float = Field(ge=0)
    """Requests, all told."""
    tokens_per_request: float = Field(gt=0)
    """Tokens of a request, those read and those written."""


@dataclass(frozen=True)
class Candidate:
    """A model that could be trained and served."""

    name: str
    num_params: float
    """N; with experts, those that a token passes through."""
    num_tokens: float
    """D."""
    training_bits: float = FULL_BITS
    inference_bits: float = FULL_BITS
    loss: float | None = None
    """Predicted nats per token, if known; shown beside the cost."""

    def __post_init__(self) -> None:
        for field in ("num_params", "num_tokens", "training_bits", "inference_bits"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise InputError(
                    f"{self.name}.{field}={value} is not accepted (expected a number above 0)"
                )


@dataclass(frozen=True)
class LifetimeCost:
    """A bill: a part that is paid once, and a part for each request."""

    name: str
    training_cost: float
    """Money."""
    cost_per_request: float
    """Money."""
    num_requests: float
    training_energy_kwh: float = 0.0
    energy_per_request_kwh: float = 0.0
    training_flops: float = 0.0
    """Operations of 16 bits."""
    flops_per_request: float = 0.0
    loss: float | None = None

    @property
    def inference_cost(self) -> float:
        """Money for all requests."""
        return self.cost_per_request * self.num_requests

    @property
    def total_cost(self) -> float:
        """Money for training and all requests."""
        return self.training_cost + self.inference_cost

    @property
    def total_energy_kwh(self) -> float:
        """Energy of training and all requests."""
        return self.training_energy_kwh + self.energy_per_request_kwh * self.num_requests

    @property
    def requests_per_training(self) -> float:
        """Requests that cost as much as training did; infinite where a request is free."""
        return self.training_cost / self.cost_per_request if self.cost_per_request else math.inf


def count_training_flops(num_params: float, num_tokens: float, bits: float = FULL_BITS) -> float:
    """Return 6 N D bits/16."""
    return 6 * num_params * num_tokens * bits / FULL_BITS


def count_inference_flops(num_params: float, num_tokens: float, bits: float = FULL_BITS) -> float:
    """Return 2 N bits/16 for each token."""
    return 2 * num_params * num_tokens * bits / FULL_BITS


def lifetime_cost(candidate: Candidate, usage: Usage, accelerator: Accelerator) -> LifetimeCost:
    """Return what a model costs, in money, energy and operations."""
    training_flops = count_training_flops(
        candidate.num_params,
        candidate.num_tokens,
        _counted_bits(candidate.training_bits, accelerator),
    )
    request_flops = count_inference_flops(
        candidate.num_params,
        usage.tokens_per_request,
        _counted_bits(candidate.inference_bits, accelerator),
    )
    rate = accelerator.peak_flops_per_s * _SECONDS_PER_HOUR
    training_hours = training_flops / (rate * accelerator.training_utilization)
    request_hours = request_flops / (rate * accelerator.inference_utilization)
    power_kw = accelerator.power_w / _WATTS_PER_KILOWATT * accelerator.pue
    return LifetimeCost(
        name=candidate.name,
        training_cost=training_hours * accelerator.price_per_hour,
        cost_per_request=request_hours * accelerator.price_per_hour,
        num_requests=usage.num_requests,
        training_energy_kwh=training_hours * power_kw,
        energy_per_request_kwh=request_hours * power_kw,
        training_flops=training_flops,
        flops_per_request=request_flops,
        loss=candidate.loss,
    )


def compare_candidates(
    candidates: Sequence[Candidate], usage: Usage, accelerator: Accelerator
) -> tuple[LifetimeCost, ...]:
    """Return what each candidate costs over the same use, cheapest first."""
    costs = [lifetime_cost(each, usage, accelerator) for each in candidates]
    return tuple(sorted(costs, key=lambda cost: cost.total_cost))


def break_even_requests(first: LifetimeCost, second: LifetimeCost) -> float | None:
    """Return the number of requests at which two models have cost the same.

    Below it the one that is cheaper to train is cheaper, above it the one that is cheaper to ask.

    Returns:
        A number of requests, at least 0; None where one is never dearer than the other, or both
        cost the same in either part.
    """
    training_gap = second.training_cost - first.training_cost
    request_gap = first.cost_per_request - second.cost_per_request
    if request_gap == 0:
        return None
    requests = training_gap / request_gap
    return requests if requests >= 0 else None


def cheapest_by_requests(costs: Sequence[LifetimeCost]) -> tuple[tuple[float, str], ...]:
    """Return which model is cheapest from how many requests on.

    Args:
        costs: at least one.

    Returns:
        (requests, name) in ascending order, the first at 0 requests.
    """
    crossings = {
        number
        for index, first in enumerate(costs)
        for second in costs[index + 1 :]
        if (number := break_even_requests(first, second)) is not None
    }
    edges = sorted({0.0, *crossings})
    middles = [(low + high) / 2 for low, high in pairwise(edges)] + [2 * edges[-1] + 1]
    found: list[tuple[float, str]] = []
    for edge, middle in zip(edges, middles, strict=True):
        best = min(costs, key=lambda cost: cost.training_cost + middle * cost.cost_per_request)
        if not found or found[-1][1] != best.name:
            found.append((edge, best.name))
    return tuple(found)


def _counted_bits(bits: float, accelerator: Accelerator) -> float:
    """Bits that an operation counts as, on hardware that may gain little from few."""
    return float(FULL_BITS * (bits / FULL_BITS) ** accelerator.bits_exponent)
