"""Distillation: a smaller student, or a changed model, learns what its teacher predicts.

How a student is cut out of its teacher is in ``students``, how it is trained in ``following``.
Teachers with another vocabulary are not here.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mutirao.compress.blocks import decoder_blocks
from mutirao.compress.config import DistillConfig
from mutirao.compress.training.following import check_request, follow_teacher
from mutirao.compress.training.students import (
    cut_model,
    largest_channels,
    refuse_size,
    spread_blocks,
)


def distill(
    teacher: Any,
    tokenizer: Any,
    ids_WT: Tensor,
    config: DistillConfig,
    *,
    student: Any = None,
    seed: int = 0,
) -> Any:
    """Train a student to a teacher's next-token distributions.

    Args:
        teacher: a transformers causal model, unchanged.
        tokenizer: the teacher's and the student's; windows are tokens already, so that it is not
            looked at.
        ids_WT: (W, T) token ids.
        config: how large the student is, and how it is trained.
        student: a model to heal, such as one whose blocks share their weights: trained in place,
            and left half trained where that fails; the config's sizes do not count. None for a new
            one, smaller than the teacher.
        seed: of the order of windows.

    Returns:
        The student, in its dtype, for evaluation.

    Raises:
        InputError: the student would not be smaller, another number is not accepted, or TRL is not
            installed.
        DataError: too few windows, or the loss is no longer finite.
        FormatError: models of the teacher's type cannot be cut.
    """
    check_request(ids_WT, steps=config.steps, windows_per_step=config.windows_per_step)
    if student is None:
        student = _new_student(teacher, ids_WT, config)
    follow_teacher(
        student,
        teacher,
        ids_WT,
        steps=config.steps,
        learning_rate=config.learning_rate,
        windows_per_step=config.windows_per_step,
        temperature=config.temperature,
        seed=seed,
        description="distil",
    )
    return student


def _new_student(teacher: Any, ids_WT: Tensor, config: DistillConfig) -> Any:
    num_blocks = len(decoder_blocks(teacher))
    num_kept = num_blocks // 2 if config.layers is None else config.layers
    refuse_size(num_blocks, num_kept, config.hidden, teacher.config.hidden_size)
    channels_K = None
    if config.hidden is not None:
        channels_K = largest_channels(teacher, ids_WT, config.hidden)
    return cut_model(teacher, spread_blocks(num_blocks, num_kept), channels_K)
