"""DP-SGD: training that hides whether any one unit (a patient, or a record) took part.

Each step takes every unit with probability q, independently; a unit's gradient is the sum
over its records, scaled down to a global norm of at most C; Gaussian noise of standard
deviation σ C is added to the sum over units, and the result is divided by the expected
number of units, never by the real one, which is a secret. A step that happens to take no
unit is a step all the same. What AdamW makes of the noisy gradient is post-processing
(Abadi et al. 2016, arXiv:1607.00133; units of several records as in McMahan et al. 2018,
arXiv:1710.06963). ``accountant`` says what the steps cost.

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

Not here: data parallelism, adaptive clipping, noise that is correlated over steps. Nothing
of it is wired into federated runs or recipes yet: rounds there train without noise, records
carry no unit key, and a site's answer holds losses and counts that no ε covers.

Shapes: B records, T tokens, I inputs, O outputs, P values of all trainable parameters.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mutirao.config import Config
from mutirao.data.tokenization import Example
from mutirao.errors import DataError, InputError, ShapeError
from mutirao.models.batching import pad_sequences
from mutirao.models.causal import masked_loss_sum
from mutirao.train.accountant import PrivacyBudget
from mutirao.train.config import TrainConfig
from mutirao.train.loop import _loss_mask, learning_rate_at

R = TypeVar("R")

RecordLoss: TypeAlias = Callable[[nn.Module, Sequence[R]], Tensor]
"""Sums the losses of records. Each record's loss must depend on that record alone, and in
every layer row b of the input must belong to record b."""

RandomBytes: TypeAlias = Callable[[int], bytes]
"""Draws so many random bytes."""


class PrivateConfig(Config):
    """How units are sampled, clipped and blurred."""

    num_units: int = Field(ge=1)
    """Number of units as it may be known to all, rounded if need be. Sampling and scale follow
    from it, however many units there really are, so that the real number stays a secret."""
    units_per_step: float = Field(gt=0)
    """Expected number of units in a step, at most num_units."""
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    """Standard deviation of the noise, as a multiple of max_unit_norm; 0 gives no privacy."""
    max_unit_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Global norm that a unit's gradient is scaled down to; the gradient is of the loss summed
    over the unit's learned tokens, in nats."""
    records_per_pass: int = Field(default=16, ge=1)
    """Most records in one forward pass; bounds memory, changes results by rounding only."""
    is_vectorized: bool = False
    """Pass several units at once, where all that is trained are weights and biases of linear
    layers, and take their gradients apart afterwards."""

    @property
    def sampling_probability(self) -> float:
        """Probability that a unit takes part in a step."""
        return self.units_per_step / self.num_units

    @model_validator(mode="after")
    def _check_probability(self) -> PrivateConfig:
        if self.units_per_step > self.num_units:
            raise ValueError(
                f"units_per_step={self.units_per_step:g} is not accepted (expected at most "
                f"num_units={self.num_units})"
            )
        return self


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
        InputError: the budget does not last for ``num_steps`` (nothing was spent), or the
            model has layers that mix records, trained buffers or nothing to train.
        ShapeError: see ``unit_gradients``.
    """
    parameters = _trainable(model)
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
        mean_P, ignored = noisy_mean(gradients, _num_values(parameters), private, draw_bytes)
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
        loss_mask_BT = _loss_mask(examples, ids_BT)
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


def unit_gradients(
    model: nn.Module,
    units: Iterable[Sequence[R]],
    record_loss: RecordLoss[R],
    private: PrivateConfig,
) -> Iterator[Tensor]:
    """Give the gradient of each unit's summed loss, unclipped, one unit after the other.

    One backward pass per unit, or per ``records_per_pass`` of its records, whatever the
    model. With ``is_vectorized``, units that fit together into a pass share one; the same
    up to rounding, which then depends a little on the neighbours.

    Returns:
        (P,) float64 on the CPU, in the order of the model's trainable parameters.

    Raises:
        InputError: ``is_vectorized``, and something else than linear layers is trained.
        ShapeError: ``is_vectorized``, and the rows of a layer's input are not the records.
    """
    parameters = _trainable(model)
    if not private.is_vectorized:
        for unit in units:
            yield _gradient(model, parameters, unit, record_loss, private.records_per_pass)
        return
    layers = _linear_layers(model, parameters)
    for together in _pack(units, private.records_per_pass):
        if len(together) > 1:
            yield from _gradients_together(model, parameters, layers, together, record_loss)
        else:
            yield _gradient(model, parameters, together[0], record_loss, private.records_per_pass)


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


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return what is trained, if it can be trained privately."""
    for name, module in model.named_modules():
        keeps_statistics = isinstance(module, _NormBase) and module.track_running_stats
        if isinstance(module, _BatchNorm) or keeps_statistics:
            raise InputError(
                f"layer {name} ({type(module).__name__}) mixes records, so that clipping bounds "
                "nobody's influence; use layer or group normalization"
            )
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise InputError(f"buffer {name} is trained; make it a parameter or freeze it")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the model has nothing to train; attach an adapter first")
    return parameters


def _check_budget(budget: PrivacyBudget, private: PrivateConfig, num_steps: int) -> None:
    q, sigma = private.sampling_probability, private.noise_multiplier
    remaining = budget.remaining_steps(q, sigma)
    if remaining < num_steps:
        raise InputError(
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


def _num_values(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _set_gradients(parameters: Sequence[nn.Parameter], gradient_P: Tensor) -> None:
    pieces = torch.split(gradient_P, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.reshape(parameter.shape).to(parameter)


def _flatten(gradients: Iterable[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """(P,) float64 on the CPU; None stands for zeros."""
    return torch.cat(
        [
            torch.zeros(parameter.numel(), dtype=torch.float64)
            if gradient is None
            else gradient.detach().to("cpu", torch.float64).reshape(-1)
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
    )


def _gradient(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    unit: Sequence[R],
    record_loss: RecordLoss[R],
    records_per_pass: int,
) -> Tensor:
    """(P,) float64 gradient of one unit, by backward passes."""
    gradient_P = torch.zeros(_num_values(parameters), dtype=torch.float64)
    for start in range(0, len(unit), records_per_pass):
        loss = record_loss(model, unit[start : start + records_per_pass])
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradient_P += _flatten(gradients, parameters)
    return gradient_P


def _pack(units: Iterable[Sequence[R]], max_records: int) -> Iterator[list[Sequence[R]]]:
    """Put neighbouring units together, up to ``max_records``; a larger unit stays alone."""
    together: list[Sequence[R]] = []
    num_records = 0
    for unit in units:
        if together and num_records + len(unit) > max_records:
            yield together
            together, num_records = [], 0
        together.append(unit)
        num_records += len(unit)
    if together:
        yield together


def _linear_layers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Linear]:
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and any(parameter.requires_grad for parameter in module.parameters())
    ]
    covered = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if any(id(parameter) not in covered for parameter in parameters):
        raise InputError(
            "is_vectorized=true is not accepted for this model: something else than linear "
            "layers is trained; set is_vectorized=false"
        )
    return layers


@dataclass(frozen=True)
class _Call:
    """One use of a linear layer."""

    layer: nn.Linear
    input: Tensor
    """(B, ..., I), outside the graph."""
    output: Tensor
    """(B, ..., O), within the graph."""


@contextmanager
def _recorded(layers: Sequence[nn.Linear]) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append(_Call(layer, inputs[0].detach(), output))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _gradients_together(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    layers: Sequence[nn.Linear],
    units: Sequence[Sequence[R]],
    record_loss: RecordLoss[R],
) -> Iterator[Tensor]:
    """(P,) float64 gradient of each unit, from one pass over all of them.

    A linear layer's weight gradient is the sum over rows of slope ⊗ input (Goodfellow 2015,
    arXiv:1510.01799), so that each unit's rows give its own.
    """
    records = [record for unit in units for record in unit]
    with _recorded(layers) as calls:
        loss = record_loss(model, records)
    if any(len(call.input) != len(records) for call in calls):
        raise ShapeError(
            f"a layer's input does not have one row for each of {len(records)} records; set "
            "is_vectorized=false"
        )
    outputs = [call.output for call in calls]
    slopes: Sequence[Tensor | None] = [None] * len(outputs)
    if outputs and loss.requires_grad:
        slopes = torch.autograd.grad(loss, outputs, allow_unused=True)
    first = 0
    for unit in units:
        rows = slice(first, first + len(unit))
        first += len(unit)
        gradients: dict[int, Tensor] = {}
        for call, slope_BTO in zip(calls, slopes, strict=True):
            if slope_BTO is not None:
                _add_layer_gradient(gradients, call, slope_BTO[rows], call.input[rows])
        yield _flatten((gradients.get(id(parameter)) for parameter in parameters), parameters)


def _add_layer_gradient(
    gradients: dict[int, Tensor], call: _Call, slope_BTO: Tensor, input_BTI: Tensor
) -> None:
    """Add the gradients of one use of a layer to those by parameter."""
    dtype = call.layer.weight.dtype
    slope_NO = slope_BTO.reshape(-1, slope_BTO.shape[-1]).to(dtype)
    input_NI = input_BTI.reshape(-1, input_BTI.shape[-1]).to(dtype)
    for parameter, gradient in (
        (call.layer.weight, slope_NO.T @ input_NI),
        (call.layer.bias, slope_NO.sum(dim=0)),
    ):
        if parameter is not None and parameter.requires_grad:
            gradients[id(parameter)] = gradients.get(id(parameter), 0) + gradient
