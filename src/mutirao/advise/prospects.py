"""What lies beyond this checkpoint: more training, other sizes, training for few bits, the bill.

None of it was measured on this model. The rise of this model is carried along by exponents from
published fits; its interval and their spread give the intervals of the critical number of tokens
and of what other sizes cost. The loss of models of other sizes and of longer training is Kumar et
al.'s, whose constants count as exact: they are published without errors. The bill is arithmetic on
the numbers and prices that were told; only its smaller model is by Kumar's law. Each answer says
so.

References:
    Kumar et al. 2024, arXiv:2411.04330, and ``precision.law``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mutirao.advise.choosing import Z_95, Candidate
from mutirao.advise.config import Outlook
from mutirao.precision.fit import Prediction
from mutirao.precision.forms import Prior, published_priors
from mutirao.precision.law import APPLE_QAT, KUMAR
from mutirao.precision.lifetime import Candidate as Served
from mutirao.precision.lifetime import LifetimeCost, Usage, break_even_requests, lifetime_cost

KNOWN_SIZES = (1e7, 2e9)
"""Weights for which Kumar et al.'s loss is asked: fitted from 30M to 220M, checked to 1.7 billion;
down to 10M is an assumption."""


@dataclass(frozen=True)
class MoreTraining:
    """Whether more tokens would still lower the loss after rounding."""

    critical_tokens: Prediction
    """D_crit; more tokens than these raise it."""
    would_hurt: bool | None
    """None where the interval holds the tokens that the model was trained on."""


@dataclass(frozen=True)
class OtherSize:
    """A model of another size in about the same bytes."""

    size: float
    """Over this one's."""
    bits: float
    change: float
    """Of the loss after rounding, in nats, against this model with the chosen bits: above zero it
    would be worse."""
    low: float
    """Lower end of the change's 95 % interval: that of the rise, carried along by exponents within
    the spread of published fits. Kumar's loss of both sizes counts as exact, and so does the rise's
    going with the squared step from bits to bits."""
    high: float
    """Its upper end."""


@dataclass(frozen=True)
class Bill:
    """What the model costs over its life, as it is and with the chosen bits.

    It has no interval: the first two are arithmetic on sizes, tokens, requests and prices that were
    told, and do not hang on the rise. The smaller one takes the number of tokens for which Kumar's
    law, whose constants are published without errors, has the same loss.
    """

    original: LifetimeCost
    chosen: LifetimeCost
    smaller: LifetimeCost | None
    """Half as large and trained to the same loss, in 16 bits; None where no number of tokens takes
    it there."""
    break_even_requests: float | None
    """From which the smaller one is cheaper than this one in 16 bits."""


@dataclass(frozen=True)
class Prospects:
    """All answers; None where something was not told."""

    more_training: MoreTraining | None
    other_sizes: tuple[OtherSize, ...]
    qat_share: float | None
    """Of the training tokens, to spend with rounding on."""
    bill: Bill | None
    notes: tuple[str, ...]


def look_ahead(chosen: Candidate, num_rounded: int, outlook: Outlook) -> Prospects:
    """Answer what can be answered.

    Args:
        chosen: the way that is recommended.
        num_rounded: N, weights in the blocks.
        outlook: what is known of the model.
    """
    notes = [
        "Losses of other sizes and of longer training are by Kumar et al. 2024 (30M to 220M "
        "weights, 1.5 to 26 billion tokens); exponents that carry the rise along are the mean of "
        "three published fits. Nothing of it was measured on this model."
    ]
    tokens = outlook.training_tokens
    if not KNOWN_SIZES[0] <= num_rounded <= KNOWN_SIZES[1]:
        notes = [
            f"With {num_rounded:,} weights in its blocks the model is too far from those of "
            "published laws (30M to 220M, checked to 1.7 billion): nothing is said of other sizes "
            "or of more training."
        ]
        return Prospects(None, (), None, _bill(chosen, num_rounded, outlook), tuple(notes))
    if tokens is None:
        notes.append(
            "How many tokens the model was trained on was not told (--training-tokens): nothing is "
            "said on more training, on training for few bits, or on the bill."
        )
    elif chosen.rise.low <= 0:
        notes.append(
            "The rise is not clear of zero: nothing is said on whether more training would hurt."
        )
    if not outlook.is_decayed:
        notes.append(
            "The learning rate had not decayed: rounding tends to cost more after it has "
            "(arXiv:2510.06213); advise again on the final checkpoint."
        )
    tokens_per_byte = 0.0 if tokens is None else 8 * tokens / (num_rounded * chosen.way.bits)
    return Prospects(
        None if tokens is None or chosen.rise.low <= 0 else _more_training(chosen.rise, tokens),
        _other_sizes(chosen, num_rounded),
        APPLE_QAT.share(num_rounded, tokens, chosen.way.bits)
        if tokens is not None and tokens_per_byte > math.e
        else None,
        _bill(chosen, num_rounded, outlook),
        tuple(notes),
    )


def _more_training(rise: Prediction, tokens: float) -> MoreTraining:
    """Return D where the loss's fall by training equals the rise of what rounding costs.

    β B D^-β = γ δ₀ (D/D₀)^γ, δ₀ at D₀; so log D = (log(β B D₀^γ) - log(γ δ₀)) / (γ + β).
    """
    prior = _exponent("gamma_d")
    base = KUMAR.base

    def critical(nats: float, gamma: float) -> float:
        over = math.log(base.beta * base.b) + gamma * math.log(tokens)
        return math.exp((over - math.log(gamma * nats)) / (gamma + base.beta))

    rises = (rise.mean, rise.low, rise.high)
    corners = [critical(nats, gamma) for nats in rises for gamma in _ends(prior)]
    found = Prediction(critical(rises[0], prior.mean), min(corners), max(corners))
    would_hurt = None
    if not found.low <= tokens <= found.high:
        would_hurt = tokens > found.high
    return MoreTraining(found, would_hurt)


def _other_sizes(chosen: Candidate, num_rounded: int) -> tuple[OtherSize, ...]:
    """Return a model half as large at twice the bits and one twice as large at half of them."""
    prior, rise = _exponent("gamma_n"), chosen.rise
    base = KUMAR.base
    now = base.a * num_rounded**-base.alpha
    found = []
    for size in (0.5, 2.0):
        bits = min(chosen.way.bits / size, 16.0)
        if bits < 2:
            continue
        # The rise follows the squared step from the bits that were measured.
        step = (2.0 ** (chosen.way.bits - 1) - 0.5) / (2.0 ** (bits - 1) - 0.5)
        factors = [step**2 * size**-gamma - 1 for gamma in (prior.mean, *_ends(prior))]
        larger = now * (size**-base.alpha - 1)
        corners = [larger + nats * each for nats in (rise.low, rise.high) for each in factors]
        change = larger + rise.mean * factors[0]
        found.append(OtherSize(size, bits, change, min(corners), max(corners)))
    return tuple(found)


def _bill(chosen: Candidate, num_rounded: int, outlook: Outlook) -> Bill | None:
    if outlook.training_tokens is None or outlook.num_requests is None:
        return None
    usage = Usage(num_requests=outlook.num_requests, tokens_per_request=outlook.tokens_per_request)
    tokens = outlook.training_tokens
    original, rounded = (
        lifetime_cost(each, usage, outlook.accelerator)
        for each in (
            Served("this model, 16 bits", num_rounded, tokens),
            Served(str(chosen.way), num_rounded, tokens, inference_bits=chosen.way.bits),
        )
    )
    longer = _tokens_to_match(num_rounded, tokens)
    if longer is None:
        return Bill(original, rounded, None, None)
    half = Served("half as large, 16 bits", num_rounded / 2, longer)
    smaller = lifetime_cost(half, usage, outlook.accelerator)
    return Bill(original, rounded, smaller, break_even_requests(original, smaller))


def _tokens_to_match(num_rounded: float, tokens: float) -> float | None:
    """Return the tokens that take a model half as large to the same loss; None for none."""
    if not KNOWN_SIZES[0] <= num_rounded <= KNOWN_SIZES[1]:
        return None
    base = KUMAR.base
    left = base.loss(num_rounded, tokens) - base.e - base.a * (num_rounded / 2) ** -base.alpha
    return (base.b / left) ** (1 / base.beta) if left > 0 else None


def _ends(prior: Prior) -> tuple[float, float]:
    """Return both ends of an exponent's 95 % interval, above zero as in all published fits."""
    low, high = (prior.mean + sign * Z_95 * prior.sd for sign in (-1, 1))
    return max(low, 0.02), max(high, 0.02)


def _exponent(name: str) -> Prior:
    return next(each for each in published_priors("per_cell") if each.parameter == name)
