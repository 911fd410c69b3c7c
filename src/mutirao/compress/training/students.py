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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from mutirao.compress.blocks import decoder_blocks
from mutirao.compress.config import CompressConfig
from mutirao.errors import FormatError, InputError, ShapeError
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
    width = None if channels_K is None else len(channels_K)
    config = _mended(teacher.config, blocks, len(names), width)
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


def check_student(path: Path, config: CompressConfig) -> None:
    """Refuse a student that could not be made, or not be rounded, before a model is loaded.

    Args:
        path: the teacher's directory, of which config.json alone is read; where that is no model,
            nothing is said here.
        config: its distillation is looked at where it makes a student of its own.

    Raises:
        InputError: the student would not be smaller, or no model of its type is so wide.
        ShapeError: the group size of the rounding that follows does not divide its width.
    """
    sizes = config.distillation
    if sizes is None or config.steps[0] != "distill":
        return
    try:
        teacher = AutoConfig.from_pretrained(str(path), local_files_only=True).get_text_config()
        num_blocks, width = int(teacher.num_hidden_layers), int(teacher.hidden_size)
    except (OSError, ValueError, AttributeError, TypeError):
        return  # loading it says what is wrong
    num_kept = num_blocks // 2 if sizes.layers is None else sizes.layers
    refuse_size(num_blocks, num_kept, sizes.hidden, width)
    if sizes.hidden is None:
        return
    if config.group_size is not None and sizes.hidden % config.group_size:
        raise ShapeError(
            f"compress.group_size={config.group_size} does not divide the student's hidden="
            f"{sizes.hidden} channels; choose a multiple of it, or another group size"
        )
    mended = _mended(teacher, spread_blocks(num_blocks, num_kept), num_blocks, sizes.hidden)
    try:
        type(teacher).from_dict(mended.to_dict())
    except Exception as error:  # each type of model refuses in its own way
        heads = getattr(teacher, "num_attention_heads", None)
        expected = "another width"
        if heads and sizes.hidden % heads:
            expected = f"a multiple of its {heads} attention heads"
        raise InputError(
            f"hidden={sizes.hidden} is not accepted for a student of type "
            f"{teacher.model_type!r} (expected {expected})"
        ) from error


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


def _mended(config: Any, blocks: Sequence[int], num_blocks: int, width: int | None) -> Any:
    """Return a configuration for what is kept; lists that tell of every block are cut alike."""
    mended = copy.deepcopy(config)
    mended.num_hidden_layers = len(blocks)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == num_blocks:
            setattr(mended, name, type(value)(value[index] for index in blocks))
    if width is not None:
        own = getattr(config, "head_dim", None)
        mended.head_dim = own or config.hidden_size // config.num_attention_heads
        mended.hidden_size = width
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
