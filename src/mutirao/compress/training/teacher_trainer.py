"""TRL's distillation trainer, told to learn from given windows; imported by ``following`` alone.

TRL 1.16 samples each answer from the student before it scores it. The one method that does so is
replaced, by one that hands out windows; it has no public name, hence the narrow pin of TRL. Its
``GKDTrainer`` would take given text without that, but holds all logits of both models at a time and
leaves the temperature out of its loss.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from mutirao.console import step_progress
from mutirao.errors import DataError
from mutirao.train.config import TrainConfig
from mutirao.train.loop import autocast


def run_trainer(
    student: Any,
    teacher: Any,
    ids_WT: Tensor,
    *,
    folder: str,
    windows_per_pass: int,
    windows_per_step: int,
    steps: int,
    warmup_steps: int,
    learning_rate: float,
    temperature: float,
    seed: int,
    after_step: Callable[[], None],
    description: str,
) -> None:
    """Train a student in place; see ``following.follow_teacher``, which checks and tidies up.

    Raises:
        DataError: the loss is no longer finite.
    """
    is_on_cpu = student.device.type == "cpu"
    arguments = DistillationConfig(
        output_dir=folder,
        beta=0.0,  # KL(teacher || student)
        temperature=temperature,
        max_steps=steps,
        warmup_steps=warmup_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=windows_per_pass,
        gradient_accumulation_steps=windows_per_step // windows_per_pass,
        gradient_checkpointing=False,
        bf16=False,  # ``compute_loss`` chooses
        use_cpu=is_on_cpu,
        dataloader_pin_memory=not is_on_cpu,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with step_progress() as progress:
        trainer = _WindowTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=[{"prompt": ids_T} for ids_T in ids_WT],
            processing_class=_blank_tokenizer(),
            callbacks=[_AfterStep(after_step, progress, description, steps)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class _WindowTrainer(DistillationTrainer):  # type: ignore[misc]
    """Learns from windows as they are, tells nobody, and stops where the loss is lost."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the first token of each window as a prompt, and the others as its completion."""
        ids_BT = torch.stack([each["prompt"] for each in inputs]).to(self.accelerator.device)
        mask_BT = torch.ones_like(ids_BT)
        return {
            "prompt_ids": ids_BT[:, :1],
            "prompt_mask": mask_BT[:, :1],
            "completion_ids": ids_BT[:, 1:],
            "completion_mask": mask_BT[:, 1:],
            "num_items_in_batch": mask_BT[:, 1:].sum(),
        }

    def _send_telemetry(self) -> None:
        """Send none, whatever the environment says."""

    def compute_loss(self, model: Any, *args: Any, **others: Any) -> Any:
        with autocast(model, TrainConfig()):
            loss = super().compute_loss(model, *args, **others)
        if not bool(torch.isfinite(loss)):
            raise DataError(
                "the divergence from the teacher is not finite; lower learning_rate and start again"
            )
        return loss


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """Does what is to be done after each step, and moves a progress bar."""

    def __init__(
        self, act: Callable[[], None], progress: Progress, description: str, steps: int
    ) -> None:
        self._act = act
        self._progress = progress
        self._task = progress.add_task(description, total=steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._act()
        self._progress.advance(self._task)


def _blank_tokenizer() -> PreTrainedTokenizerFast:
    """Return one of a single word: the trainer asks for a tokenizer, and windows need none."""
    words = Tokenizer(models.WordLevel({"end": 0}, unk_token="end"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")
