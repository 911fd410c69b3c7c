"""Several processes share each step of training: data parallelism over any model and loop.

Each process, a rank, holds the whole model and its optimizer. Of a step's rows it takes a
stretch, and divides their summed loss by the tokens that the whole step learns; the ranks'
gradients, added up in float32, are then those of the step, whoever computed what. All ranks
get the same bytes of the sum and do the same optimizer step, so they stay alike without
sending weights. The result is that of one process but for the order of summation, and follows
from the number of ranks and their threads alone.

Ranks come from ``join``, from files that they all reach, or are wrapped round a group that was
made elsewhere: ``Ranks(torch.distributed.group.WORLD)`` under torchrun. NCCL is taken where
every rank has a GPU of its own, Gloo over the loopback interface otherwise. A rank whose peer
ends hears of it at once under Gloo; under NCCL at the latest after ``TIMEOUT_S``, when PyTorch
ends the process.

Left out: sharding of weights and optimizer (every rank has all of them), several machines, and
an overlap of sums with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from mutirao.errors import RankLostError

_distributed: Any = torch.distributed  # much of it has no types
TIMEOUT_S = 600.0
"""Longest wait for another rank's share of a step; an assumption, far above any step's time."""
JOIN_TIMEOUT_S = 60.0
"""Longest wait for another rank to join that has said it would."""
_BUCKET_VALUES = 16 * 1024 * 1024
"""Values that are added up at a time (64 MiB), which bounds the extra memory; a choice."""


class Ranks:
    """The processes that share each step, as one of them sees them.

    Args:
        group: what connects them, or None for a process alone.
        device: where the group takes tensors.
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        self._group = group
        self._device = torch.device(device)
        self.rank: int = 0 if group is None else group.rank()
        """Number of this process, from 0."""
        self.size: int = 1 if group is None else group.size()
        """How many there are."""

    def share(self, num_rows: int) -> slice:
        """Return which of a step's rows this rank computes; none where there are too few."""
        return slice(
            num_rows * self.rank // self.size,
            num_rows * (self.rank + 1) // self.size,
        )

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss_sum: float) -> float:
        """Add up the ranks' gradients in place, and return the sum of their losses.

        A parameter that no rank has a gradient for keeps none.

        Args:
            parameters: the same on all ranks, in the same order.
            loss_sum: of this rank's rows.

        Raises:
            RankLostError: another rank is gone.
        """
        if self._group is None:
            return loss_sum
        counts = [float(parameter.grad is not None) for parameter in parameters]
        head = torch.tensor([loss_sum, *counts], dtype=torch.float64)
        total, *counts = self._sum(head).tolist()
        used = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
        for bucket in _buckets(used):
            flat = self._sum(torch.cat([_flat_gradient(parameter) for parameter in bucket]))
            parts = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter).to(parameter)
        return float(total)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor, on the CPU; all ranks give one of its shape and type.

        Raises:
            RankLostError: another rank is gone.
        """
        if self._group is None:
            return tensor.cpu()
        buffer = tensor.to(self._device).contiguous()
        self._wait(lambda: self._group.broadcast(buffer, root=0))
        return buffer.cpu()

    def _sum(self, tensor: Tensor) -> Tensor:
        buffer = tensor.to(self._device)
        self._wait(lambda: self._group.allreduce([buffer]))
        return buffer

    def _wait(self, begin: Any) -> None:
        try:
            begin().wait()
        except RuntimeError as error:  # all that Gloo and NCCL raise
            raise RankLostError(
                "a process that shares the training was lost; see its standard error, and whether "
                "memory is enough"
            ) from error


ALONE = Ranks()
"""One process that does all by itself."""


def join(store_path: Path, rank: int, size: int) -> Ranks:
    """Join the other ranks; returns when all have.

    Args:
        store_path: a file that only these ranks know, not there yet when the first one comes.
        rank: number of this process, from 0.
        size: number of ranks.

    Raises:
        RankLostError: the others did not come in time.
    """
    store = _distributed.FileStore(str(store_path), size)
    store.set_timeout(timedelta(seconds=JOIN_TIMEOUT_S))
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
    try:
        if has_gpus and _distributed.is_nccl_available():
            torch.cuda.set_device(rank)
            return Ranks(_nccl_group(store, rank, size), torch.device("cuda", rank))
        return Ranks(_gloo_group(store, rank, size))
    except RuntimeError as error:
        raise RankLostError(
            f"the {size} processes that share the training did not find each other within "
            f"{JOIN_TIMEOUT_S:.0f} s"
        ) from error


def _gloo_group(store: Any, rank: int, size: int) -> Any:
    gloo = _distributed.ProcessGroupGloo
    options = gloo._Options()
    # The loopback address: what is added up concerns nobody outside, nor needs the host's name.
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return gloo(store, rank, size, options)


def _nccl_group(store: Any, rank: int, size: int) -> Any:
    nccl = _distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return nccl(store, rank, size, options)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters in stretches of about ``_BUCKET_VALUES``; a larger one goes alone."""
    bucket: list[nn.Parameter] = []
    num_values = 0
    for parameter in parameters:
        if bucket and num_values + parameter.numel() > _BUCKET_VALUES:
            yield bucket
            bucket, num_values = [], 0
        bucket.append(parameter)
        num_values += parameter.numel()
    if bucket:
        yield bucket


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    return parameter.grad.detach().to(torch.float32).reshape(-1)
