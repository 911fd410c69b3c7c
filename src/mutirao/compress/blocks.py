"""A decoder taken block by block: its linear layers, and what comes into them.

Methods that look at data need, of each linear layer, the Gram matrix of its inputs. Blocks are
visited in order, and each sees what the blocks before it make of the text after they were
changed, so that later ones can make up for earlier ones.

Shapes: W windows, T tokens, D channels, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.errors import FormatError
from mutirao.models.head import split_model

Visit = Callable[[str, nn.Module, Mapping[str, Tensor]], None]
"""Called with a block's name, the block, and the Gram matrix of the inputs of each of its linear
layers by the layer's name within the block; layers with the same input share the matrix."""


def decoder_blocks(model: Any) -> dict[str, nn.Module]:
    """Return a decoder's blocks by name, in the order in which text passes through them.

    Raises:
        FormatError: the model has none, or has weights in layers other than ``nn.Linear``.
    """
    decoder, _ = split_model(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise FormatError(
            f"models of type {model.config.model_type!r} are not supported (expected a decoder "
            "whose blocks are in a list named 'layers', as Llama's are)"
        )
    names = {id(module): name for name, module in model.named_modules()}
    blocks = {names[id(layer)]: layer for layer in layers}
    for name, block in blocks.items():
        for inner, module in block.named_modules():
            if not isinstance(module, nn.Linear) and any(
                each.dim() > 1 for each in module.parameters(recurse=False)
            ):
                raise FormatError(
                    f"{name}.{inner} is a {type(module).__name__}, which is not supported "
                    "(expected all of a block's matrices in nn.Linear)"
                )
    return blocks


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of all blocks by name; the output head is not among them.

    Raises:
        FormatError: see ``decoder_blocks``.
    """
    return {
        f"{prefix}.{name}": module
        for prefix, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


@contextmanager
def replaced_layers(model: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let other modules stand in for layers, by name; afterwards the model has its own back."""
    own = {name: model.get_submodule(name) for name in others}
    try:
        for name, other in others.items():
            model.set_submodule(name, other)
        yield
    finally:
        for name, layer in own.items():
            model.set_submodule(name, layer)


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Let hooks be there for a while, and take them away afterwards."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def walk_blocks(model: Any, ids_WT: Tensor, visit: Visit, *, windows_per_pass: int = 4) -> None:
    """Visit each block with what comes into its layers; ``visit`` may change the block.

    Args:
        model: a transformers causal model.
        ids_WT: (W, T) token ids of calibration text.
        visit: see ``Visit``.
        windows_per_pass: bounds memory; changes results by rounding only.

    Raises:
        FormatError: see ``decoder_blocks``.
    """
    blocks = decoder_blocks(model)
    passes = [enter(model, blocks, ids) for ids in torch.split(ids_WT, windows_per_pass)]
    for name, block in blocks.items():
        visit(name, block, observe(name, block, passes))
        for one in passes:
            one.states = one.through(name, block)


@dataclass
class Pass:
    """Windows on their way: the states between blocks, and what else each block is called with.

    Blocks of different kinds (Gemma 3's, with a sliding window or without) are called with other
    masks and positions.
    """

    states: Tensor
    """(W, T, D) that the next block takes."""
    others: dict[str, dict[str, Any]]
    """By the block's name."""

    def through(self, name: str, block: nn.Module) -> Tensor:
        """Return what a block, or another in its place, makes of the states."""
        result = block(self.states, **self.others[name])
        states: Tensor = result[0] if isinstance(result, tuple) else result
        return states


def enter(model: Any, blocks: Mapping[str, nn.Module], ids_WT: Tensor) -> Pass:
    """Return windows as they come to the first block."""
    one = Pass(torch.empty(0), {})
    names = {id(block): name for name, block in blocks.items()}

    def catch(block: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> None:
        others = dict(others)
        states = args[0] if args else others.pop("hidden_states")
        if not one.others:
            one.states = states
        one.others[names[id(block)]] = others

    decoder, _ = split_model(model)
    device = next(decoder.parameters()).device
    with hooked(
        block.register_forward_pre_hook(catch, with_kwargs=True) for block in blocks.values()
    ):
        decoder(input_ids=ids_WT.to(device), use_cache=False)
    return one


def observe(name: str, block: nn.Module, passes: list[Pass]) -> dict[str, Tensor]:
    """Return the mean of x x^T over all tokens, for the input x of each linear layer."""
    layers = {name: each for name, each in block.named_modules() if isinstance(each, nn.Linear)}
    grams: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    latest: dict[int, tuple[Tensor, str]] = {}
    num_tokens = 0

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = latest.get(id(inputs[0]))
            if seen is not None and seen[0] is inputs[0]:
                same_as[name] = seen[1]
                return
            latest[id(inputs[0])] = (inputs[0], name)  # kept, so that its id stays its own
            x_NI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if name in grams:
                grams[name].addmm_(x_NI.T, x_NI)
            else:
                grams[name] = x_NI.T @ x_NI

        return add

    with hooked(layer.register_forward_pre_hook(hook(each)) for each, layer in layers.items()):
        for one in passes:
            one.through(name, block)
            num_tokens += one.states.shape[0] * one.states.shape[1]
            latest.clear()
    for gram in grams.values():
        gram /= num_tokens
    return grams | {name: grams[other] for name, other in same_as.items()}
