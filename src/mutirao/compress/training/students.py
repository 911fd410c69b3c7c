"""Smaller models cut out of a teacher: fewer blocks, fewer channels, with the teacher's weights.

Blocks are kept evenly spread, the first and the last among them (the start of DistilBERT: Sanh et
al. 2019, arXiv:1910.01108, section 3). Channels of the residual stream are kept where the teacher's
are largest on text (Muralidharan et al. 2024, arXiv:2407.14679). Heads and the inner width of
blocks stay as they are. A student is made from its mended configuration, as it will be
when it is loaded again.

Shapes: W windows, T tokens, D channels, K channels kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import decoder_blocks
from mutirao.errors import FormatError, InputError
from mutirao.models.head import split_model

NUM_WINDOWS_SEEN = 16
"""Windows on which channels are ranked. Assumption: their mean sizes differ far more than that."""


def spread_blocks(num_blocks: int, num_kept: int) -> tuple[int, ...]:
    """Return the numbers of evenly spread blocks, the first and the last among them."""
    places = torch.linspace(0, num_blocks - 1, num_kept, dtype=torch.float64)
    return tuple(round(place) for place in places.tolist())


@torch.no_grad()
def largest_channels(model: Any, ids_WT: Tensor, num_kept: int) -> Tensor:
    """Return the (K,) numbers, rising, of the channels that are largest in what blocks read.

    States are divided by their root mean square first, as the blocks' norms do.
    """
    total_D = torch.zeros(model.config.hidden_size, device=model.device)

    def add(_: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
        states = (inputs[0] if inputs else others["hidden_states"]).float()
        normed = states / states.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)
        total_D.add_(normed.abs().flatten(0, -2).mean(dim=0))

    blocks = decoder_blocks(model).values()
    handles = [block.register_forward_pre_hook(add, with_kwargs=True) for block in blocks]
    try:
        for ids_T in ids_WT[:NUM_WINDOWS_SEEN]:
            split_model(model)[0](input_ids=ids_T[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return total_D.topk(num_kept).indices.sort().values


def cut_model(teacher: Any, blocks: Sequence[int], channels_K: Tensor | None = None) -> Any:
    """Return a new model of some of a teacher's blocks and channels, with its weights.

    Args:
        teacher: a transformers causal model, unchanged.
        blocks: numbers of the blocks that are kept, rising.
        channels_K: (K,) numbers of the channels that are kept, rising; None for all.

    Raises:
        FormatError: a model of the mended configuration has no place for what is kept.
    """
    names = list(decoder_blocks(teacher))
    config = _mended(teacher.config, blocks, len(names), channels_K)
    with torch.random.fork_rng():
        student = type(teacher)(config).to(teacher.device)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    places = {names[old]: names[new] for new, old in enumerate(blocks)}
    given, own = _renamed(_saved(teacher), names, places), _saved(student)
    if given.keys() != own.keys():
        odd = sorted(given.keys() ^ own.keys())
        raise FormatError(
            f"models of type {config.model_type!r} cannot be made smaller: {odd[0]} is in one of "
            "teacher and student alone"
        )
    for name, tensor in own.items():
        tensor.data = _selected(name, given[name].detach(), tensor.shape, channels_K)
    return student.eval()


def refuse_size(num_blocks: int, num_kept: int, hidden: int | None, width: int) -> None:
    """Refuse a student that is not smaller than its teacher.

    Raises:
        InputError: it has as many blocks or more, or is not narrower where it should be.
    """
    if hidden is not None and hidden >= width:
        raise InputError(
            f"hidden={hidden} is not accepted for a teacher of {width} channels (expected fewer)"
        )
    most = num_blocks if hidden is not None else num_blocks - 1
    if not 1 <= num_kept <= most:
        raise InputError(
            f"layers={num_kept} is not accepted for a teacher of {num_blocks} blocks (expected how "
            f"many the student keeps, from 1 to {most})"
        )


def _mended(config: Any, blocks: Sequence[int], num_blocks: int, channels_K: Tensor | None) -> Any:
    """Return a configuration for what is kept; lists that tell of every block are cut alike."""
    mended = copy.deepcopy(config)
    mended.num_hidden_layers = len(blocks)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == num_blocks:
            setattr(mended, name, type(value)(value[index] for index in blocks))
    if channels_K is not None:
        own = getattr(config, "head_dim", None)
        mended.head_dim = own or config.hidden_size // config.num_attention_heads
        mended.hidden_size = len(channels_K)
    return mended


def _saved(model: Any) -> dict[str, Tensor]:
    """Return parameters, and those buffers that are saved with them; others are the config's."""
    names = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def _renamed(
    tensors: Mapping[str, Tensor], names: Sequence[str], places: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the tensors outside of blocks, and those of the blocks kept under their new names."""
    renamed = {}
    for name, tensor in tensors.items():
        block = next((each for each in names if name.startswith(f"{each}.")), None)
        if block is None:
            renamed[name] = tensor
        elif block in places:
            renamed[places[block] + name.removeprefix(block)] = tensor
    return renamed


def _selected(name: str, tensor: Tensor, shape: torch.Size, channels_K: Tensor | None) -> Tensor:
    """Return a copy of a tensor's kept channels, along the one dimension in which it shrinks."""
    shrinking = [at for at, size in enumerate(shape) if size != tensor.shape[at]]
    if channels_K is None or not shrinking:
        if tensor.shape != shape:
            raise FormatError(
                f"{name} has shape {tuple(tensor.shape)} in the teacher but {tuple(shape)} in a "
                "student of its blocks; models whose blocks differ so cannot be made shallower"
            )
        return tensor.clone()
    if len(shrinking) > 1:
        raise FormatError(
            f"{name} would shrink in more than one dimension; models of this type cannot be made "
            "narrower (leave hidden out)"
        )
    return tensor.index_select(shrinking[0], channels_K)
