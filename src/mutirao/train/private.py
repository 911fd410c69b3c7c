"""DP-SGD: training that hides whether any one unit (a patient, or a record) took part.

Each step takes every unit with probability q, independently; a unit's gradient is the sum
over its records, scaled down to a global norm of at most C; Gaussian noise of standard
deviation σ C is added to the sum over units, and the result is divided by the expected
number of units, never by the real one, which is a secret. A step that happens to take no
unit is a step all the same. What AdamW makes of the noisy gradient is post-processing
(Abadi et al. 2016, arXiv:1607.00133; units of several records as in McMahan et al. 2018,
arXiv:1710.06963). Here are sampling, clipping, noise and the loop; ``unit_gradients`` makes the
gradients, and ``accountant`` says what the steps cost.

Meant for few trainable parameters, such as LoRA's: a unit's gradient is held whole.
Private is the changed model alone. What else there is to see here (losses, times, the
number of units taken, an error's text) is not covered by ε and must stay at the site.

All randomness that privacy rests on comes from the operating system's generator, byte by
byte. PyTorch's own is not cryptographic, and its CPU generator keeps 32 bits of a seed
(2.13), few enough to try them all. Gradients are clipped, added and blurred in float64 and
then rounded to the parameters' type, which leaves no low bits to read the sum from (the
attack is Mironov 2012, ACM CCS, "On significance of the least significant bits for
differential privacy"); it is not a proof, which would need discrete noise (Canonne, Kamath,
Steinke 2020, arXiv:2004.00010).

Not here: data parallelism, adaptive clipping, noise that is correlated over steps. Federated
rounds use it where the plan asks for privacy (``federated.site.local_round``), and tell neither
losses nor counts then.

Shapes: B records, T tokens, P values of all trainable parameters.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mutirao.data.tokenization import Example
from mutirao.errors import DataError, InputError, PrivacyBudgetError
from mutirao.models.batching import pad_sequences
from mutirao.models.causal import masked_loss_sum
from mutirao.train.accountant import PrivacyBudget
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.loop import learning_rate_at, loss_mask
from mutirao.train.unit_gradients import (
    RecordLoss,
    count_values,
    trainable_parameters,
    unit_gradients,
)

R = TypeVar("R")

RandomBytes: TypeAlias = Callable[[int], bytes]
"""Draws so many random bytes."""


@dataclass(frozen=True)
class PrivateResult:
    """What one call did; all but the model itself is for the site's own eyes."""

    num_steps: int
    """Optimizer steps."""
    num_ignored: int
    """Times that a unit counted as nothing because its gradient was not finite: an error
    would have told that the unit is there."""
    optimizer_state: dict[str, Any]
    """State of AdamW, to go on from; made from noisy gradients alone, and so as private."""


def train_private(
    model: nn.Module,
    units: Sequence[Sequence[R]],
    record_loss: RecordLoss[R],
    config: TrainConfig,
    private: PrivateConfig,
    *,
    budget: PrivacyBudget,
    num_steps: int,
    start_step: int = 0,
    total_steps: int | None = None,
    optimizer_state: dict[str, Any] | None = None,
    on_spend: Callable[[PrivacyBudget], None] | None = None,
    draw_bytes: RandomBytes = secrets.token_bytes,
) -> PrivateResult:
    """Change the trainable parameters of ``model`` by noisy steps over sampled units.

    Args:
        model: parameters with ``requires_grad`` are trained.
        units: the records of each unit; see ``group_units``.
        record_loss: the records' summed loss; see ``example_loss``.
        config: learning rates, betas and weight decay; a step counts as ``tokens_per_step``
            tokens of the schedule, since the real number is a secret. ``max_gradient_norm``
            has no meaning here.
        private: how units are sampled, clipped and blurred.
        budget: pays for each step before the step looks at a unit.
        num_steps: steps of this call.
        start_step: position in the whole run, for the learning rate.
        total_steps: length of the whole run; default, up to the end of this call.
        optimizer_state: state of an earlier private call to go on from.
        on_spend: called when a step is paid for and not yet done: the place to keep the
            budget on disk, so that a step repeated after a crash counts twice, as it must.
        draw_bytes: FOR TESTS ALONE anything but the operating system's generator.

    Raises:
        PrivacyBudgetError: the budget does not last for ``num_steps``; nothing was spent.
        InputError: the model has layers that mix records, trained buffers, buffers that
            change, or nothing to train; or see ``unit_gradients``.
        ShapeError: see ``unit_gradients``.
    """
    parameters = trainable_parameters(model)
    q, sigma = private.sampling_probability, private.noise_multiplier
    _check_budget(budget, private, num_steps)
    if draw_bytes is not secrets.token_bytes:
        logging.getLogger(__name__).warning(
            "noise and sampling come from a foreign generator: this training is NOT private"
        )
    optimizer = torch.optim.AdamW(
        parameters, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    total_tokens = (total_steps or start_step + num_steps) * config.tokens_per_step
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    num_ignored = 0
    model.train()
    for step in range(start_step + 1, start_step + num_steps + 1):
        budget.spend(q, sigma)
        if on_spend is not None:
            on_spend(budget)
        chosen = [units[index] for index in sample_units(len(units), q, draw_bytes)]
        gradients = unit_gradients(model, chosen, record_loss, private)
        mean_P, ignored = noisy_mean(gradients, count_values(parameters), private, draw_bytes)
        num_ignored += ignored
        rate = learning_rate_at(config, step * config.tokens_per_step, total_tokens)
        for group in optimizer.param_groups:
            group["lr"] = rate
        _set_gradients(parameters, mean_P)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _check_buffers(model, buffers)
    model.eval()
    return PrivateResult(num_steps, num_ignored, optimizer.state_dict())


def group_units(records: Sequence[R], keys: Sequence[str]) -> list[tuple[R, ...]]:
    """Put records of one unit together, units in order of their first record.

    Args:
        records: what is learned from.
        keys: per record whose it is, for example a patient's pseudonym; a record's own name
            makes every record a unit.

    Raises:
        DataError: a record has no key, or there are not as many keys as records.
    """
    if len(keys) != len(records):
        raise DataError(
            f"{len(records)} records came with {len(keys)} unit keys (expected as many)"
        )
    units: dict[str, list[R]] = {}
    for number, (record, key) in enumerate(zip(records, keys, strict=True)):
        if not key:
            raise DataError(
                f"record {number} has no unit key; privacy per unit needs to know whose it is"
            )
        units.setdefault(key, []).append(record)
    return [tuple(unit) for unit in units.values()]


def example_loss(pad_id: int, *, autocast: bool = True) -> RecordLoss[Example]:
    """Return the loss of causal models: summed over the learned tokens of examples, in nats.

    Args:
        pad_id: token that fills batches; never learned.
        autocast: compute in bfloat16 where that is safe, as ``loop`` does.
    """

    def loss_sum(model: nn.Module, examples: Sequence[Example]) -> Tensor:
        ids_BT, attention_mask_BT = pad_sequences([example.ids for example in examples], pad_id)
        loss_mask_BT = loss_mask(examples, ids_BT)
        device_type = next(model.parameters()).device.type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=autocast):
            return masked_loss_sum(model, ids_BT, attention_mask_BT, loss_mask_BT)

    return loss_sum


def sample_units(num_units: int, probability: float, draw_bytes: RandomBytes) -> list[int]:
    """Return the indices of units taken, each independently with ``probability``.

    The probability is met to 2⁻⁵³.
    """
    bits = np.frombuffer(draw_bytes(8 * num_units), np.uint64)
    is_taken = _unit_interval(bits) < probability
    return [int(index) for index in np.flatnonzero(is_taken)]


def clip_gradient(gradient_P: Tensor, max_norm: float) -> Tensor | None:
    """Return the gradient scaled down to a norm of at most ``max_norm``; None if not finite."""
    norm = float(torch.linalg.vector_norm(gradient_P))
    if not np.isfinite(norm):
        return None
    return gradient_P * min(1.0, max_norm / norm) if norm > 0 else gradient_P


def noisy_mean(
    gradients: Iterable[Tensor], num_values: int, private: PrivateConfig, draw_bytes: RandomBytes
) -> tuple[Tensor, int]:
    """Clip, add up, blur, and divide by the expected number of units.

    Args:
        gradients: (P,) float64 of each unit taken; there may be none.
        num_values: P.
        private: clipping norm, noise and expected number.
        draw_bytes: source of the noise.

    Returns:
        (P,) float64, and how many gradients were left out because they were not finite.
    """
    sum_P, num_ignored = torch.zeros(num_values, dtype=torch.float64), 0
    for gradient_P in gradients:
        clipped_P = clip_gradient(gradient_P, private.max_unit_norm)
        if clipped_P is None:
            num_ignored += 1
        else:
            sum_P += clipped_P
    deviation = private.noise_multiplier * private.max_unit_norm
    sum_P += deviation * torch.from_numpy(normal_draws(num_values, draw_bytes))
    return sum_P / private.units_per_step, num_ignored


def normal_draws(num: int, draw_bytes: RandomBytes) -> NDArray[np.float64]:
    """Return standard normal numbers, made of random bytes (Box and Muller 1958).

    64 bits give the radius, so that it ends at 9.5 standard deviations, beyond which lie
    2e-21 of the numbers.
    """
    half = (num + 1) // 2
    bits = np.frombuffer(draw_bytes(16 * half), np.uint64)
    radius = np.sqrt(-2 * np.log((bits[:half] + 0.5) * 2.0**-64))
    angle = 2 * np.pi * _unit_interval(bits[half:])
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:num]


def fixed_bytes_for_tests_only(seed: int) -> RandomBytes:
    """Return a source of the same bytes every time: WITH IT THERE IS NO PRIVACY AT ALL.

    Whoever knows or guesses the seed subtracts the noise. For tests and for nothing else.
    """
    return np.random.default_rng(seed).bytes


def _unit_interval(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return numbers from 0 to below 1, of 53 bits each."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _check_budget(budget: PrivacyBudget, private: PrivateConfig, num_steps: int) -> None:
    q, sigma = private.sampling_probability, private.noise_multiplier
    remaining = budget.remaining_steps(q, sigma)
    if remaining < num_steps:
        raise PrivacyBudgetError(
            f"{num_steps} steps with q={q:g} and noise multiplier {sigma:g} do not fit into "
            f"epsilon={budget.epsilon:g} at delta={budget.delta:g} (at most {remaining} more); "
            "take fewer steps or more noise"
        )


def _check_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name not in before or not torch.equal(buffer, before[name]):
            raise InputError(
                f"buffer {name} changes while training, without noise; throw this model away "
                "and freeze the buffer"
            )


def _set_gradients(parameters: Sequence[nn.Parameter], gradient_P: Tensor) -> None:
    pieces = torch.split(gradient_P, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.reshape(parameter.shape).to(parameter)
