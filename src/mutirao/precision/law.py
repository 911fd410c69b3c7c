"""Published laws of loss against parameters, tokens and bits, with their published constants.

Loss is in nats per token, N counts parameters, D tokens, both raw. The base is a law of
Chinchilla's kind, L = A N^-α + B D^-β + E. Training in few bits lowers the parameters that count,
N_eff; rounding afterwards adds a degradation δ, which grows with D.

A trap: Kumar et al. print the factor of N_eff as 1 - exp(-P/γ), and list an offset n that the
formula does not show. Here it is 1 - exp(-P/γ + n). Only with that sign does maximising the product
of factors over P give the paper's 7 to 8 bits (7.0; without offsets 3.5); and it makes N_eff
negative at 3-bit activations, where the paper saw divergence. That the offset b in δ has the same
sign is likely, and not proven.

Number formats that are no integers enter by ``NumberFormat.equivalent_bits``: the laws were
measured on integers, so this is an assumption.

Constants hold for the models and methods they were fitted to; exponents transfer roughly,
constants do not. Left out: Sun et al.'s law of floating-point types, whose constants we do not know
and do not invent; dependence on the learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

from mutirao.errors import InputError
from mutirao.precision.lifetime import FULL_BITS
from mutirao.precision.number_formats import NumberFormat

Bits = float | NumberFormat
"""Bits of an integer, or a format, which stands for its equivalent bits (an assumption)."""

SEARCH_BITS = (0.5, 32.0)
"""Where the best training precision is looked for."""


def count_bits(precision: Bits) -> float:
    """Return bits as they are, or a format's equivalent integer bits.

    Raises:
        InputError: bits are not above zero.
    """
    bits = precision.equivalent_bits() if isinstance(precision, NumberFormat) else float(precision)
    if not bits > 0:
        raise InputError(f"bits={bits:g} is not accepted (expected above 0)")
    return bits


@dataclass(frozen=True)
class TrainingPrecision:
    """Bits that a model was trained in; None where nothing was rounded."""

    weights: Bits | None = None
    activations: Bits | None = None
    kv_cache: Bits | None = None

    @property
    def parts(self) -> tuple[Bits | None, ...]:
        """The three in the order of a law's constants."""
        return self.weights, self.activations, self.kv_cache


UNROUNDED = TrainingPrecision()


@dataclass(frozen=True)
class BaseLaw:
    """L = A N^-α + B D^-β + E."""

    a: float
    alpha: float
    b: float
    beta: float
    e: float

    def loss(self, num_params: float, num_tokens: float) -> float:
        """Return nats per token; infinite for a model without effective parameters."""
        if num_params <= 0:
            return math.inf
        return float(self.a * num_params**-self.alpha + self.b * num_tokens**-self.beta + self.e)


@dataclass(frozen=True)
class KumarLaw:
    """Loss after training in some bits and rounding to others.

    δ = C (D^γD / N_eff^γN) exp(-P/γ + b) Π[1 - exp(-C_x (P_x - P))], N_eff = N Π[1 - exp(-P_x/γ_x
    + n_x)], over weights, activations and KV cache x. The paper's table has no C_x.
    """

    base: BaseLaw
    gammas: tuple[float, float, float]
    """γ_x in bits: weights, activations, KV cache."""
    offsets: tuple[float, float, float]
    """n_x, in the same order."""
    c: float
    gamma_d: float
    gamma_n: float
    gamma_post: float
    """γ of rounding after training, in bits."""
    offset_post: float
    """b."""
    citation: str

    def without_offsets(self) -> KumarLaw:
        """Return the law as its formulas are printed, with n and b left out."""
        return replace(self, offsets=(0.0, 0.0, 0.0), offset_post=0.0)

    def effective_share(self, training: TrainingPrecision) -> float:
        """Return N_eff / N: 1 where nothing is rounded, 0 where the law says training diverges."""
        share = 1.0
        for precision, gamma, offset in zip(training.parts, self.gammas, self.offsets, strict=True):
            if precision is not None:
                share *= max(0.0, -math.expm1(offset - count_bits(precision) / gamma))
        return share

    def effective_params(self, num_params: float, training: TrainingPrecision = UNROUNDED) -> float:
        """Return N_eff."""
        return num_params * self.effective_share(training)

    def degradation(
        self,
        num_params: float,
        num_tokens: float,
        bits: Bits,
        *,
        training: TrainingPrecision = UNROUNDED,
        robustness: tuple[float, float, float] | None = None,
    ) -> float:
        """Return δ in nats: what rounding weights to ``bits`` after training adds to the loss.

        Args:
            num_params: N.
            num_tokens: D.
            bits: of the weights after rounding.
            training: bits of training; they lower N to N_eff.
            robustness: C_x, per bit, in the order of ``gammas``: how soon training in few bits
                makes rounding harmless. Not published; None leaves the factor out.
        """
        bits = count_bits(bits)
        params = self.effective_params(num_params, training)
        if params <= 0:
            return math.inf
        scale = self.c * num_tokens**self.gamma_d / params**self.gamma_n
        factor = math.exp(self.offset_post - bits / self.gamma_post)
        for precision, rate in zip(training.parts, robustness or (), strict=False):
            if precision is not None:
                # Training in fewer bits than those rounded to leaves nothing to lose.
                factor *= max(0.0, -math.expm1(-rate * (count_bits(precision) - bits)))
        return float(scale * factor)

    def loss(
        self,
        num_params: float,
        num_tokens: float,
        *,
        training: TrainingPrecision = UNROUNDED,
        bits: Bits | None = None,
        robustness: tuple[float, float, float] | None = None,
    ) -> float:
        """Return nats per token; ``bits`` None where the trained model is not rounded again."""
        loss = self.base.loss(self.effective_params(num_params, training), num_tokens)
        if bits is None:
            return loss
        return loss + self.degradation(
            num_params, num_tokens, bits, training=training, robustness=robustness
        )

    def critical_tokens(self, num_params: float, bits: Bits) -> float:
        """Return D_crit, past which more training tokens raise the loss after rounding.

        It is where dL/dD = 0: D^(γD + β) = β B N^γN exp(P/γ - b) / (γD C).
        """
        exponent = count_bits(bits) / self.gamma_post - self.offset_post
        rise = self.base.beta * self.base.b * num_params**self.gamma_n * math.exp(exponent)
        return float((rise / (self.gamma_d * self.c)) ** (1 / (self.gamma_d + self.base.beta)))

    def optimal_training_bits(self) -> float:
        """Return P*, the bits to train weights, activations and KV cache in, if N is free too.

        Compute is 6 N D P/16, so N can grow as P shrinks; best is the largest N_eff/N per bit. It
        does not depend on compute.
        """
        return _minimize_bits(lambda bits: -self._share_at(bits) / bits)

    def optimal_training_bits_at_size(self, num_params: float, compute_flops: float) -> float:
        """Return P* where N is given and what fewer bits save goes into tokens.

        It grows with the logarithm of compute.

        Args:
            num_params: N, fixed.
            compute_flops: operations of 16 bits, 6 N D P/16.
        """

        def loss(bits: float) -> float:
            num_tokens = compute_flops * FULL_BITS / (6 * num_params * bits)
            return self.base.loss(num_params * self._share_at(bits), num_tokens)

        return _minimize_bits(loss)

    def _share_at(self, bits: float) -> float:
        return self.effective_share(TrainingPrecision(bits, bits, bits))


@dataclass(frozen=True)
class OuyangLaw:
    """δ = C D^γD / (N^γN P^γP): a power of the bits."""

    c: float
    gamma_d: float
    gamma_n: float
    gamma_bits: float
    citation: str

    def degradation(self, num_params: float, num_tokens: float, bits: Bits) -> float:
        """Return δ in nats."""
        scale = self.c * num_tokens**self.gamma_d / num_params**self.gamma_n
        return float(scale * count_bits(bits) ** -self.gamma_bits)


@dataclass(frozen=True)
class ChenLaw:
    """δ = k D^γD (log2 G)^γG / N^γN, of quantization-aware training in groups of G."""

    k: float
    gamma_d: float
    gamma_n: float
    gamma_group: float
    bits: int
    """Bits of the weights that it was fitted at."""
    citation: str

    def degradation(self, num_params: float, num_tokens: float, group_size: int) -> float:
        """Return δ in nats.

        Raises:
            InputError: a group has fewer than two weights.
        """
        if group_size < 2:
            raise InputError(f"group_size={group_size} is not accepted (expected at least 2)")
        scale = self.k * num_tokens**self.gamma_d / num_params**self.gamma_n
        return float(scale * math.log2(group_size) ** self.gamma_group)


@dataclass(frozen=True)
class QatShareLaw:
    """f* = exp(ln S - c / ln S) / S: the share of tokens to train with quantization on."""

    c: float
    citation: str

    def share(self, num_params: float, num_tokens: float, bits: float) -> float:
        """Return f*, between 0 and 1.

        Args:
            num_params: N.
            num_tokens: D, of the whole training.
            bits: of a weight; S = D / (N bits/8) is tokens per byte of the model.

        Raises:
            InputError: at most one token a byte, where the law is not defined.
        """
        tokens_per_byte = num_tokens / (num_params * bits / 8)
        if tokens_per_byte <= 1:
            raise InputError(
                f"{tokens_per_byte:.3g} tokens a byte are too few (expected more than 1): train "
                "on more tokens"
            )
        return math.exp(-self.c / math.log(tokens_per_byte))


KUMAR = KumarLaw(
    # α and β are tied in the paper's fit.
    base=BaseLaw(a=4.299e3, alpha=0.4965, b=1.806e4, beta=0.4965, e=2.7648),
    gammas=(2.6745, 2.2102, 0.9578),
    offsets=(0.3037, 1.4072, 2.4185),
    c=0.0598,
    gamma_d=0.5068,
    gamma_n=0.3439,
    gamma_post=0.5907,
    offset_post=1.1277,
    citation="Kumar et al. 2024, arXiv:2411.04330; 465 runs, 30M to 220M, GPTQ per channel",
)
OUYANG = OuyangLaw(
    c=0.017,
    gamma_d=0.5251,
    gamma_n=0.2261,
    gamma_bits=5.4967,
    citation="Ouyang et al. 2024, arXiv:2411.17691; over 1500 Pythia checkpoints",
)
CHEN_W4A16 = ChenLaw(
    k=0.2522,
    gamma_d=0.1610,
    gamma_n=0.3589,
    gamma_group=0.3533,
    bits=4,
    citation="Chen et al. 2025, arXiv:2505.14302; 268 runs, 74M to 595M, weights alone",
)
CHEN_W4A4 = ChenLaw(
    k=0.1582,
    gamma_d=0.0745,
    gamma_n=0.2186,
    gamma_group=0.7779,
    bits=4,
    citation="Chen et al. 2025, arXiv:2505.14302; 268 runs, 74M to 595M, with activations",
)
APPLE_QAT = QatShareLaw(
    c=6.7297,
    citation="Compute-optimal quantization-aware training 2025, arXiv:2509.22935; 757 runs",
)


def _minimize_bits(objective: Callable[[float], float]) -> float:
    """Return the bits with the least value: a grid first, for there are flat stretches."""
    grid = np.linspace(*SEARCH_BITS, 631)
    best = int(np.argmin([objective(bits) for bits in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(minimize_scalar(objective, bounds=bounds, method="bounded").x)
