"""A federation's recipe, and what is made of it before the first round.

One TOML file at the coordinator says what is trained, by whom, and where it is kept. From it
come the plan, which is made once and kept with the work, and what a run will cost: bytes both
ways in each round and, under differential privacy, ε. A site needs no recipe.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from mutirao.artifact import MANIFEST_NAME, Manifest, write_artifact, write_atomic
from mutirao.config import Config, load_json
from mutirao.data.config import DataConfig
from mutirao.errors import InputError, RecipeError
from mutirao.federated.aggregation.compatibility import check_plan
from mutirao.federated.codec import count_bytes
from mutirao.federated.codec.config import CodecConfig
from mutirao.federated.coordinator.journal import COORDINATOR_NAME, CoordinatorJournal
from mutirao.federated.identity import parse_public_key, public_hex
from mutirao.federated.plan import SITE_NAME, Coordinator, FederatedConfig, Plan, Site
from mutirao.train.config import TrainConfig
from mutirao.tune.config import LoRAConfig

if TYPE_CHECKING:
    from mutirao.federated.coordinator.unlearning import Replay

PLAN_NAME = "plan.json"


class FederationRecipe(Config):
    """What is trained, by whom, and where it is kept."""

    model: Path
    """The base model: an artifact of kind 'model', or a Hugging Face directory, of which one is
    made. Every site needs the same artifact."""
    sites: dict[str, str] = Field(min_length=1)
    """By name: the site's public key, as 64 hexadecimal digits or a PEM file; or for a
    simulation its data, an artifact of kind 'data' or a folder of text."""
    work: Path
    """Where journal, plan and logs are kept."""
    federated: FederatedConfig = FederatedConfig()
    """Rounds and aggregation."""
    full_weights: bool = False
    """Train all weights in place of an adapter."""
    lora: LoRAConfig = LoRAConfig()
    """The adapter that is trained, unless all weights are."""
    train: TrainConfig = TrainConfig()
    """Training at each site."""
    data: DataConfig = DataConfig()
    """Preparation of folders of text, in a simulation."""
    seed: int = 0
    """Seed of everything that is drawn."""
    address: str = "127.0.0.1"
    """Host name or IP address under which sites reach the coordinator."""
    port: int = Field(default=9_092, ge=1, le=65_535)
    """Port of the coordinator."""
    certificates: Path | None = None
    """Folder of the coordinator's certificates; null for a trial on one machine."""

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: dict[str, str]) -> dict[str, str]:
        for name in sites:
            if not SITE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a site name (at most 64 letters, digits, dots, dashes and "
                    "underscores)"
                )
        return sites

    @property
    def coordinator_folder(self) -> Path:
        """The coordinator's journal and key."""
        return self.work / "coordinator"

    def public_keys(self) -> dict[str, str]:
        """Return each site's public key, in hexadecimal.

        Raises:
            RecipeError: a site has something else.
        """
        return {name: _read_public_key(name, key) for name, key in self.sites.items()}


@dataclass(frozen=True)
class Estimate:
    """What a run will cost, before it starts."""

    plan_sha256: str
    """Hash of the plan, for the sites' policies."""
    num_values: int
    """Trained values."""
    num_sites: int
    """Sites."""
    num_rounds: int
    """Rounds."""
    upload_bytes: int
    """Payloads of one site's update, in bytes; under secure aggregation at least so many."""
    download_bytes: int
    """Payloads of the change that one site gets in a round, in bytes."""
    first_download_bytes: int
    """Payloads of the first state, in bytes."""
    epsilon: float | None
    """Spent at each site by the end of the run; None without differential privacy."""
    delta: float | None
    """The δ of that."""

    def to_json(self) -> dict[str, object]:
        """Return all fields."""
        return asdict(self)


def open_plan(recipe: FederationRecipe) -> Plan:
    """Return the recipe's plan, made on first use with the start of training.

    Raises:
        InputError: the work folder belongs to another recipe, or the plan is not sound.
        FormatError: the model is of a kind that is not supported.
    """
    from mutirao.federated.coordinator.adapter import write_start_apart

    lora = None if recipe.full_weights else recipe.lora
    agreed = (recipe.federated, lora, recipe.train, recipe.seed)
    path = recipe.work / PLAN_NAME
    if path.exists() and CoordinatorJournal(recipe.coordinator_folder).has_start():
        kept = load_json(Plan, path)
        if (kept.federated, kept.lora, kept.train, kept.seed) != agreed:
            raise InputError(
                f"{recipe.work} belongs to a run with other settings; name another work folder, "
                "or remove it to train anew"
            )
        return kept
    asked = Plan(
        federated=recipe.federated, lora=lora, train=recipe.train, seed=recipe.seed, model_sha256=""
    )
    check_plan(asked, len(recipe.sites))
    model = open_model(recipe.model, recipe.work)
    plan = write_start_apart(
        model, recipe.coordinator_folder, recipe.federated, lora, recipe.train, recipe.seed
    )
    write_atomic(path, plan.model_dump_json(indent=1))
    return plan


def open_model(model: Path, work: Path) -> Path:
    """Return the model's artifact: the folder itself, or one made in the work folder."""
    model = model.expanduser().resolve()
    if (model / MANIFEST_NAME).exists():
        return model
    import torch

    from mutirao.formats.huggingface import check_model_directory, load_causal_lm, save_causal_lm

    made = work / "model"
    if not (made / MANIFEST_NAME).exists():
        check_model_directory(model)
        loaded, tokenizer = load_causal_lm(model)
        with write_artifact(made, "model") as writer:
            save_causal_lm(loaded.to(torch.bfloat16), tokenizer, writer.path)
    return made


def open_data(name: str, data: Path, work: Path, config: DataConfig) -> Path:
    """Return a site's data artifact: the folder itself, or one prepared from its text."""
    return prepare_data(name, data, work / "data" / name, config)


def prepare_data(name: str, data: Path, out: Path, config: DataConfig) -> Path:
    """Return a data artifact: the folder itself, what lies in ``out``, or one made there."""
    data = data.expanduser().resolve()
    if (data / MANIFEST_NAME).exists():
        return data
    if not (out / MANIFEST_NAME).exists():
        from mutirao.data.prepare import prepare_silo

        prepare_silo(name, data, out, config)
    return out


def write_moments(
    recipe: FederationRecipe,
    text: Path,
    out: Path,
    *,
    num_steps: int,
    on_tokens: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a copy of the recipe's model with its second moments on a public text.

    Args:
        recipe: says which model, and how the sites will train it.
        text: a folder of text, or an artifact of kind 'data'.
        out: folder of the new model.
        num_steps: steps to take the mean over.
        on_tokens: hears how many tokens have been seen.

    Raises:
        InputError: the recipe trains an adapter, the text is no folder, or ``out`` exists.
        DataError: there is no text.
    """
    from mutirao.federated.moments import measure_moments

    if not recipe.full_weights:
        raise InputError(
            "second moments are of all weights, and this recipe trains an adapter (expected "
            "full_weights = true)"
        )
    if not text.expanduser().is_dir():
        raise InputError(f"{text} is not a folder of text")
    if out.exists():
        raise InputError(f"{out} exists; name a new folder")
    model = open_model(recipe.model, recipe.work)
    # Prepared anew each time: who names another text must not get the moments of the last one.
    prepared = recipe.work / "public-text"
    shutil.rmtree(prepared, ignore_errors=True)
    data = prepare_data("public", text, prepared, recipe.data)
    return measure_moments(
        model,
        data,
        out,
        recipe.train,
        num_steps=num_steps,
        seed=recipe.seed,
        on_tokens=on_tokens,
    )


def write_trained(recipe: FederationRecipe, plan: Plan, out: Path) -> None:
    """Write what a finished run has trained: an adapter, or a model where all weights were."""
    from mutirao.federated.coordinator.adapter import write_result

    model = open_model(recipe.model, recipe.work)
    work = recipe.coordinator_folder
    write_result(work, out, plan, model=model, data={}, extra_files={}, metrics={})


def open_begun(recipe: FederationRecipe) -> Coordinator:
    """Return the coordinator of a recipe's run, which must have begun.

    Raises:
        RecipeError: it has not.
    """
    kept = load_json(Coordinator, recipe.coordinator_folder / COORDINATOR_NAME)
    return kept.model_copy(update={"work": recipe.coordinator_folder.resolve()})


def prepare_run_without(recipe: FederationRecipe, site: str, out: Path) -> Coordinator:
    """Make a work folder in which a run goes on from before a site's first round, without it.

    Args:
        recipe: of the run.
        site: who leaves.
        out: new work folder, for a recipe without that site.

    Raises:
        InputError: the site took part in no round, the others are too few for the plan, or the
            folder exists.
    """
    from mutirao.federated.coordinator.unlearning import prepare_without

    made = prepare_without(open_begun(recipe), site, out / recipe.coordinator_folder.name)
    write_atomic(out / PLAN_NAME, made.plan.model_dump_json(indent=1))
    return made


def replay_run_without(recipe: FederationRecipe, site: str, out: Path) -> Replay:
    """Replay a run from its journal without a site, and write what it had trained; approximate.

    Args:
        recipe: of the run.
        site: who leaves.
        out: new folder of the replayed states; its folder 'result' gets adapter or model.

    Raises:
        InputError: the run hides single updates, the site was in no round or alone in one, or
            the folder exists.
    """
    from mutirao.federated.coordinator.adapter import write_result
    from mutirao.federated.coordinator.unlearning import replay_without

    coordinator = open_begun(recipe)
    replay = replay_without(coordinator, site, out)
    model = open_model(recipe.model, recipe.work)
    result = out / "result"
    write_result(out, result, coordinator.plan, model=model, data={}, extra_files={}, metrics={})
    return replay


def _read_public_key(site: str, key: str) -> str:
    try:
        return public_hex(parse_public_key(key))
    except InputError:
        raise RecipeError(
            f"sites.{site}={key!r} is not a public key (expected 64 hexadecimal digits or a PEM "
            "file, which `mutirao federate keys` makes at the site)"
        ) from None


def simulated_sites(recipe: FederationRecipe) -> list[Site]:
    """Return the sites of a simulation, with their data prepared.

    Raises:
        RecipeError: a site has no folder.
    """
    model = open_model(recipe.model, recipe.work)
    sites = []
    for name, folder in sorted(recipe.sites.items()):
        if not Path(folder).expanduser().is_dir():
            raise RecipeError(f"sites.{name}={folder!r} is not a folder, which a simulation needs")
        data = open_data(name, Path(folder), recipe.work, recipe.data)
        work = recipe.work.resolve() / "sites" / name
        sites.append(Site(name=name, model=model, data=data, work=work))
    return sites


def estimate(recipe: FederationRecipe, plan: Plan) -> Estimate:
    """Return what a run will cost."""
    shapes = CoordinatorJournal(recipe.coordinator_folder).open_state(0, "global").shapes
    federated, whole = plan.federated, CodecConfig(format="fp32")
    upload = count_bytes(shapes, federated.upload)
    num_values = sum(math.prod(shape) for shape in shapes.values())
    if (secure := federated.secure) is not None:
        upload = num_values * (secure.value_bits + len(recipe.sites).bit_length()) // 8
    epsilon, delta = _privacy(plan)
    return Estimate(
        plan_sha256=plan.sha256,
        num_values=num_values,
        num_sites=len(recipe.sites),
        num_rounds=federated.num_rounds,
        upload_bytes=upload,
        download_bytes=count_bytes(shapes, federated.download),
        first_download_bytes=count_bytes(shapes, whole),
        epsilon=epsilon,
        delta=delta,
    )


def _privacy(plan: Plan) -> tuple[float | None, float | None]:
    """Return ε and δ of a whole run."""
    from mutirao.train.accountant import Phase, epsilon_spent

    if (privacy := plan.federated.privacy) is None:
        return None, None
    training = privacy.training
    phase = Phase(
        sampling_probability=training.sampling_probability,
        noise_multiplier=training.noise_multiplier,
        num_steps=math.ceil(plan.federated.num_rounds / plan.federated.turns)
        * privacy.steps_per_round,
    )
    return epsilon_spent([phase], privacy.delta), privacy.delta
