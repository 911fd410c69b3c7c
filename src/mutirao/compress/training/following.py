"""A student that learns a teacher's predictions: TRL's distillation, on windows of plain text.

TRL's ``DistillationTrainer`` brings the loss, which never holds all logits (its own kernel projects
them in tiles), the accumulation of gradients over passes, and the schedule. It is made for a
student that writes its own answers to prompts; here each window is handed to it as one such answer,
so that the student follows the teacher over given text (Hinton et al. 2015, arXiv:1503.02531; the
forward divergence, beta 0 in Agarwal et al. 2023, arXiv:2306.13649). TRL is imported only when
something is trained: the optional package is the extra ``compress``.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mutirao.compress.shrinking.sizes import SPARSE_SHARE
from mutirao.errors import DataError, InputError
from mutirao.models.arithmetic import fast_dtype

PIP_LINE = 'pip install "mutirao[compress]"'

TOKENS_PER_PASS = 512
"""Most tokens in one pass: TRL's tiles of two models' logits take 134 MB for them."""

WARMUP_SHARE = 0.1
"""Share of the steps in which the learning rate rises; it falls as a cosine afterwards. Assumption:
what is customary."""


def follow_teacher(
    student: Any,
    teacher: Any,
    ids_WT: Tensor,
    *,
    steps: int,
    learning_rate: float,
    windows_per_step: int,
    temperature: float = 1.0,
    seed: int = 0,
    description: str = "distil",
    learning: Sequence[nn.Parameter] | None = None,
) -> None:
    """Train a student's parameters, in place, to a teacher's next-token distributions.

    The loss is the mean KL(teacher || student) over all tokens but the first of a window, in nats.
    Weights are kept in float32 while they are trained, and come back in the dtype that they had.
    Parameters that are shared stay shared, and the zeros of a pruned matrix zeros; a matrix of low
    rank gets a full one. The teacher stays as it is.

    Args:
        student: a transformers causal model.
        teacher: another with the same vocabulary.
        ids_WT: (W, T) token ids, T at least 2.
        steps: optimizer steps, at least 1.
        learning_rate: peak of AdamW's.
        windows_per_step: windows that a step sees, at most W.
        temperature: both distributions are flattened by it.
        seed: of the order of windows.
        description: what the progress bar says.
        learning: parameters that learn; None for all.

    Raises:
        InputError: a number is not accepted, or TRL is not installed.
        DataError: there are too few windows, or the loss is no longer finite.
    """
    check_request(ids_WT, steps=steps, windows_per_step=windows_per_step)
    trainers = import_optional("teacher_trainer", "TRL")
    dtypes = [each.dtype for each in student.parameters()]
    was_trained = [each.requires_grad for each in student.parameters()]
    was_training = teacher.training
    learns = None if learning is None else {id(each) for each in learning}
    with _random_state_kept(), _settings_kept(student), tempfile.TemporaryDirectory() as folder:
        try:
            for parameter in student.parameters():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(learns is None or id(parameter) in learns)
            trainers.run_trainer(
                student,
                _fast(teacher),
                ids_WT,
                folder=folder,
                windows_per_pass=_windows_per_pass(windows_per_step, ids_WT.shape[1]),
                windows_per_step=windows_per_step,
                steps=steps,
                warmup_steps=int(steps * WARMUP_SHARE),
                learning_rate=learning_rate,
                temperature=temperature,
                seed=seed,
                after_step=_keep_zeros(student),
                description=description,
            )
        finally:
            given = zip(student.parameters(), dtypes, was_trained, strict=True)
            for parameter, dtype, is_trained in given:
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(is_trained)
            student.eval()
            teacher.train(was_training)


def check_request(ids_WT: Tensor, *, steps: int, windows_per_step: int) -> None:
    """Refuse what no training can be done with, before anything is loaded or copied.

    Raises:
        InputError: no steps, or no windows in a step.
        DataError: too few windows, or too short ones.
    """
    if steps < 1 or windows_per_step < 1:
        raise InputError(
            f"steps={steps} with windows_per_step={windows_per_step} trains nothing (expected at "
            "least 1 of each)"
        )
    if ids_WT.dim() != 2 or ids_WT.shape[1] < 2 or len(ids_WT) < windows_per_step:
        raise DataError(
            f"token ids of shape {tuple(ids_WT.shape)} are too few to train on (expected at least "
            f"{windows_per_step} windows, one for each of windows_per_step, of at least 2 tokens); "
            "give more text or lower windows_per_step"
        )


def import_optional(name: str, package: str) -> Any:
    """Import a module of this folder that stands on an optional package.

    Raises:
        InputError: the package is not installed.
    """
    try:
        return import_module(f"mutirao.compress.training.{name}")
    except ImportError as error:
        raise InputError(
            f"this step trains with {package}, which cannot be imported ({error}): {PIP_LINE}"
        ) from None


def _windows_per_pass(windows_per_step: int, num_tokens: int) -> int:
    """Return the largest divisor of a step's windows whose tokens fit one pass; at least 1."""
    most = max(1, TOKENS_PER_PASS // num_tokens)
    return max(n for n in range(1, min(most, windows_per_step) + 1) if windows_per_step % n == 0)


def _keep_zeros(model: nn.Module) -> Callable[[], None]:
    """Return what puts the zeros of pruned matrices back, which a step of training moved."""
    masks = [
        (parameter, parameter != 0)
        for parameter in model.parameters()
        if parameter.dim() == 2 and int((parameter == 0).sum()) >= SPARSE_SHARE * parameter.numel()
    ]

    @torch.no_grad()
    def keep() -> None:
        for parameter, mask in masks:
            parameter.mul_(mask)

    return keep


def _fast(teacher: nn.Module) -> nn.Module:
    """Return the teacher, or a float32 copy where the processor multiplies its dtype by loops."""
    parameter = next(teacher.parameters())
    if parameter.dtype == torch.float32 or fast_dtype(parameter.device.type) == "bfloat16":
        return teacher
    copied = copy.deepcopy(teacher)
    for each in copied.parameters():
        each.data = each.data.float()
    return copied


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the generators as they were, which TRL seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _settings_kept(model: Any) -> Iterator[None]:
    """Leave a model's settings as they were: trainers write their tokenizer's into them."""
    owners = [model.config, model.generation_config]
    before = [copy.deepcopy(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, values in zip(owners, before, strict=True):
            vars(owner).clear()
            vars(owner).update(values)
        for name in ("model_tags", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
