"""Evaluate one model on the held-out records of every silo, and keep the result.

Which records are used depends on the records alone, so that models are compared on the
same ones. The result is an artifact of kind 'evaluation' holding ``evaluation.json``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from mutirao.artifact import Manifest, open_artifact, read_manifest, write_artifact
from mutirao.config import Config
from mutirao.console import step_progress
from mutirao.data.records import Record, Task
from mutirao.data.tokenization import Example, encode_record
from mutirao.errors import ArtifactError, DataError, InputError
from mutirao.evaluate.choices import QuestionResult, evaluate_questions
from mutirao.evaluate.config import EvaluationConfig
from mutirao.evaluate.losses import TextResult, evaluate_examples
from mutirao.evaluate.outcomes import OutcomeResult, evaluate_outcomes
from mutirao.models.protocol import LanguageModel

logger = logging.getLogger(__name__)

ALL_TASKS: tuple[Task, ...] = ("text", "question", "outcome")
EVALUATION_NAME = "evaluation.json"


class SiloEvaluation(Config):
    """A model on one silo's held-out records."""

    text: TextResult
    """Loss on whole texts, questions included; outcomes are measured apart."""
    questions: QuestionResult | None = None
    """Questions with options; null where there are none or they were not asked for."""
    outcomes: OutcomeResult | None = None
    """Yes/no outcomes; null where there are none or they were not asked for."""


class Evaluation(Config):
    """A model on every silo's held-out records."""

    label: str
    """What was evaluated: 'base', 'federated', '4-bit', …"""
    silos: dict[str, SiloEvaluation]
    """Results by silo."""


def evaluate_silos(
    model: LanguageModel,
    silos: Mapping[str, Sequence[Record]],
    config: EvaluationConfig,
    *,
    label: str,
    tasks: Collection[Task] = ALL_TASKS,
) -> Evaluation:
    """Measure a model on the held-out records of each silo.

    Args:
        model: the model.
        silos: held-out records by silo.
        config: how much of them is used.
        label: what is evaluated.
        tasks: what is measured; 'text' always has to be among it.

    Raises:
        InputError: tasks has an unknown name or lacks 'text'.
        DataError: a silo has nothing to score.
    """
    if "text" not in tasks or not set(tasks) <= set(ALL_TASKS):
        raise InputError(
            f"tasks={sorted(tasks)} is not accepted (expected 'text', and if you like "
            "'question' and 'outcome')"
        )
    results: dict[str, SiloEvaluation] = {}
    with step_progress() as progress:
        step = progress.add_task(f"evaluating {label}", total=len(silos) * len(tasks))
        for name, records in silos.items():
            ordered = sorted(records, key=_hash_order)
            text = _measure_text(model, name, ordered, config)
            progress.advance(step)
            questions, outcomes = None, None
            if "question" in tasks:
                questions = _measure_questions(model, ordered, config)
                progress.advance(step)
            if "outcome" in tasks:
                outcomes = _measure_outcomes(model, name, ordered, config)
                progress.advance(step)
            results[name] = SiloEvaluation(text=text, questions=questions, outcomes=outcomes)
    return Evaluation(label=label, silos=results)


def write_evaluation(
    evaluation: Evaluation,
    path: Path,
    config: EvaluationConfig,
    *,
    parents: Iterable[Path] = (),
) -> Manifest:
    """Write an evaluation as an artifact.

    Args:
        evaluation: the results.
        path: the artifact's folder.
        config: how they were measured.
        parents: artifacts that it was made from: the model, each silo's data. Their roles
            are their kinds and names, such as 'data-north'.

    Raises:
        ArtifactError: a parent has no manifest.
        DiskFullError: no room; ``path`` is as it was.
    """
    recipe = {"evaluation": config.model_dump(mode="json")}
    with write_artifact(path, "evaluation", recipe=recipe) as writer:
        for parent in parents:
            writer.add_parent(f"{read_manifest(parent).kind}-{parent.name}", parent)
        (writer.path / EVALUATION_NAME).write_text(
            evaluation.model_dump_json(indent=2), encoding="utf-8"
        )
        for name, silo in evaluation.silos.items():
            writer.metrics[f"loss.{name}"] = silo.text.loss
    return open_artifact(path, "evaluation")


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation artifact.

    Raises:
        ArtifactError: it is incomplete, was altered, or is of another shape.
    """
    open_artifact(path, "evaluation")
    try:
        return Evaluation.model_validate_json((path / EVALUATION_NAME).read_bytes())
    except (OSError, ValidationError):
        raise ArtifactError(
            f"{path / EVALUATION_NAME} is missing or damaged; evaluate the model again"
        ) from None


def _hash_order(record: Record) -> str:
    return hashlib.sha256(f"{record.id}\n{record.text}".encode()).hexdigest()


def _measure_text(
    model: LanguageModel, name: str, records: Sequence[Record], config: EvaluationConfig
) -> TextResult:
    """Score the first window of as many records as fit: many short pieces say more than few.

    Questions count whole, as text of the silo; outcomes are left to their own measure,
    except where a silo has nothing else.
    """
    records = [record for record in records if record.task != "outcome"] or records
    chosen: list[list[Example]] = []
    num_tokens = 0
    for record in records:
        examples = encode_record(
            record, model.encode, model.eos_id, config.max_tokens, learn_context=True
        )[:1]
        if not examples:
            continue
        if chosen and num_tokens + len(examples[0].ids) > config.max_text_tokens:
            break
        chosen.append(examples)
        num_tokens += len(examples[0].ids)
    if not chosen:
        raise DataError(f"silo {name} has no held-out text to evaluate; give it more records")
    return evaluate_examples(model, chosen)


def _measure_questions(
    model: LanguageModel, records: Sequence[Record], config: EvaluationConfig
) -> QuestionResult | None:
    chosen = [record for record in records if record.task == "question"][: config.num_questions]
    return evaluate_questions(model, chosen, max_tokens=config.max_tokens) if chosen else None


def _measure_outcomes(
    model: LanguageModel, name: str, records: Sequence[Record], config: EvaluationConfig
) -> OutcomeResult | None:
    chosen = [record for record in records if record.task == "outcome"][: config.num_outcomes]
    if not chosen:
        return None
    if len({record.answer for record in chosen}) < 2:
        logger.warning(
            "silo %s: no AUROC, since all %d held-out outcomes are the same", name, len(chosen)
        )
        return None
    return evaluate_outcomes(model, chosen, max_tokens=config.max_tokens)
