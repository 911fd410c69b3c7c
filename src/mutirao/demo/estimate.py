"""What a demonstration would take, before it starts: tokens, bytes, time and memory.

Times come from rates measured once on two cores of an AMD EPYC with AVX-512 and BF16
(2026-11-22, SmolLM2-135M, bfloat16) and scale with the recipe's token counts; another
machine or model takes longer or shorter in proportion.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from mutirao.console import format_bytes, format_duration, output
from mutirao.demo.recipe import DemoRecipe
from mutirao.demo.road import STAGES, Road, check_recipe
from mutirao.demo.run_folder import NEEDED_BYTES

TRAINING_TOKENS_PER_S = 550.0
EVALUATION_TOKENS_PER_S = 800.0
CONVERSION_S = 30.0
PREPARATION_S = 20.0
ROUND_TRIP_S = 9.0
DEPLOYMENT_S = 20.0
PEAK_MEMORY_BYTES = 3_000_000_000
"""Measured with the default recipe, all processes together."""
MEAN_QUESTION_TOKENS = 150
MEAN_RECORD_TOKENS = 60


@dataclass(frozen=True)
class Estimate:
    """What is expected of a run."""

    run: str
    stages: list[str]
    silos: list[str]
    training_tokens: int
    evaluation_tokens: int
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int


def estimate_demo(recipe: DemoRecipe, run: Path) -> Estimate:
    """Return what a run of this recipe is expected to take; nothing is fetched or written."""
    check_recipe(recipe)
    road = Road(recipe, run)
    num_silos, federated, evaluation = len(road.silos), recipe.federated, recipe.evaluation
    federated_tokens = num_silos * federated.num_rounds * federated.tokens_per_round
    alone_tokens = federated_tokens - num_silos * federated.tokens_per_round
    num_models = 2 + num_silos + len(recipe.compress)
    text_tokens = num_models * num_silos * evaluation.max_text_tokens
    task_tokens = (
        2
        * num_silos
        * (
            evaluation.num_questions * MEAN_QUESTION_TOKENS
            + evaluation.num_outcomes * MEAN_RECORD_TOKENS
        )
    )
    training_tokens = federated_tokens + alone_tokens
    evaluation_tokens = text_tokens + task_tokens
    seconds = (
        CONVERSION_S
        + PREPARATION_S
        + DEPLOYMENT_S
        + federated.num_rounds * num_silos * ROUND_TRIP_S
        + training_tokens / TRAINING_TOKENS_PER_S
        + evaluation_tokens / EVALUATION_TOKENS_PER_S
    )
    return Estimate(
        run=str(run),
        stages=[stage.title for stage in STAGES],
        silos=list(road.silos),
        training_tokens=training_tokens,
        evaluation_tokens=evaluation_tokens,
        seconds=round(seconds),
        peak_memory_bytes=PEAK_MEMORY_BYTES,
        disk_bytes=NEEDED_BYTES,
    )


def print_estimate(estimate: Estimate, *, as_json: bool) -> None:
    """Print the estimate for people, or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(asdict(estimate), indent=2))
        return
    for number, title in enumerate(estimate.stages, start=1):
        output.print(f"{number:2d}. {title}")
    output.print(f"run folder       {estimate.run}", soft_wrap=True)
    output.print(f"silos            {', '.join(estimate.silos)}", soft_wrap=True)
    output.print(f"training         {estimate.training_tokens:,} tokens")
    output.print(f"evaluation       {estimate.evaluation_tokens:,} tokens")
    output.print(f"expected time    {format_duration(estimate.seconds)} on 2 cores")
    output.print(f"expected memory  {format_bytes(estimate.peak_memory_bytes)} at most")
    output.print(f"disk             {format_bytes(estimate.disk_bytes)}")
