"""Gradients per unit (a patient, or a record): of the unit's summed loss, unclipped.

Two ways to the same numbers, up to rounding. The slow one is a backward pass for each unit,
and takes any model. The vectorised one passes several units at once, and takes their
gradients apart where nothing but weights and biases of linear layers is trained, as with
LoRA. Also here: what a model must not have for a unit's gradient to be that unit's alone.

Left out: clipping, noise and sampling, which are ``private``. A unit's gradient is held
whole, which suits few trainable parameters.

Shapes: B records, T tokens, I inputs, O outputs, P values of all trainable parameters,
N rows of a layer's input, all records and tokens of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mutirao.errors import InputError, ShapeError
from mutirao.train.config import PrivateConfig

R = TypeVar("R")

RecordLoss: TypeAlias = Callable[[nn.Module, Sequence[R]], Tensor]
"""Sums the losses of records. Each record's loss must depend on that record alone, and in
every layer row b of the input must belong to record b."""


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
    parameters = trainable_parameters(model)
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


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the model's order.

    Raises:
        InputError: the model has layers that mix records, trained buffers or nothing to train.
    """
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


def count_values(parameters: Sequence[nn.Parameter]) -> int:
    """Return P, the number of values of all parameters."""
    return sum(parameter.numel() for parameter in parameters)


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
    gradient_P = torch.zeros(count_values(parameters), dtype=torch.float64)
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
