"""One site's work in one round: train on its own data, hand back an update.

Nothing of the site's text goes into the answer: an encoded change of the adapter and a
handful of numbers. The optimizer's state stays at the site from round to round. Knows
nothing of how messages travel.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from mutirao.artifact import Manifest, canonical_json, open_artifact, read_manifest, write_artifact
from mutirao.config import Config
from mutirao.data.prepare import load_records
from mutirao.data.records import Record
from mutirao.data.tokenization import Example, encode_records
from mutirao.errors import ArtifactError, FederationError
from mutirao.evaluate.losses import evaluate_text
from mutirao.federated.codec import EncodedUpdate, encode_update
from mutirao.federated.journal import SiteJournal, read_arrays, write_arrays
from mutirao.federated.plan import Plan, Site
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models.causal import CausalModel
from mutirao.train.loop import TrainResult, train
from mutirao.train.stream import take_mixed
from mutirao.tune.lora import (
    adapter_state,
    attach_lora,
    frozen_sha256,
    load_adapter_state,
    save_adapter,
    state_to_vector,
    vector_to_state,
)


class RoundAnswer(Config):
    """The numbers that a site sends beside its update."""

    site: str
    """The site's name."""
    round: int
    """The round they belong to."""
    num_tokens: int = Field(gt=0)
    """Training tokens: the update's weight."""
    train_loss: float = Field(ge=0, allow_inf_nan=False)
    """Mean training loss, nats per token."""
    heldout_loss: float | None = Field(ge=0, allow_inf_nan=False)
    """Loss of the model as received on held-out text, nats per token."""
    seconds: float = Field(ge=0, allow_inf_nan=False)
    """Time of the work, in seconds."""


@dataclass(frozen=True)
class RoundReply:
    """All that leaves a site in a round."""

    update: EncodedUpdate
    answer: RoundAnswer
    tensors: tuple[str, ...] = ()
    """Names of the tensors in the update, for the site's own log; they do not travel."""


class LocalTrainer:
    """A model with its adapter, and one site's examples, in memory."""

    def __init__(self, site: Site, plan: Plan) -> None:
        own_model = open_artifact(site.model, "model")
        if own_model.sha256 != plan.model_sha256:
            raise FederationError(
                f"site {site.name} has another base model ({own_model.sha256[:12]}) than the "
                f"federation ({plan.model_sha256[:12]}); install the agreed one at {site.model}"
            )
        open_artifact(site.data, "data")
        self.site = site
        self.plan = plan
        model, self.tokenizer = load_causal_lm(site.model)
        self.model = attach_lora(model, plan.lora, seed=plan.seed)
        if frozen_sha256(self.model) != plan.frozen_sha256:
            raise FederationError(
                f"site {site.name} makes another frozen part of the adapter from seed "
                f"{plan.seed} than the coordinator; install the same version of PyTorch"
            )

    def get_state(self) -> NDArray[np.float32]:
        """Return the adapter's trained part as one vector."""
        return state_to_vector(adapter_state(self.model))

    def set_state(self, vector: NDArray[np.float32]) -> None:
        """Set the adapter's trained part."""
        load_adapter_state(self.model, vector_to_state(vector, adapter_state(self.model)))

    def heldout_loss(self) -> float | None:
        """Return the loss on the first held-out tokens, or None when none are wanted."""
        budget = self.plan.federated.monitor_tokens
        examples: list[Example] = []
        records = load_records(self.site.data, "heldout")
        for example in self._encode([each for each in records if each.task != "outcome"]):
            if sum(len(taken.ids) for taken in examples) >= budget:
                break
            examples.append(example)
        if not examples:
            return None
        wrapped = CausalModel(self.model, self.tokenizer, name=self.site.name)
        return evaluate_text(wrapped, examples).loss

    def train_round(
        self,
        round_number: int,
        optimizer_state: dict[str, Any] | None,
        on_tokens: Callable[[int], None],
    ) -> TrainResult:
        """Train on this round's stretch of the site's examples; ``on_tokens`` hears how far."""
        federated = self.plan.federated
        stride = federated.tokens_per_round
        records = load_records(self.site.data, "train")
        examples = take_mixed(
            self._encode([record for record in records if record.task != "outcome"]),
            self._encode([record for record in records if record.task == "outcome"]),
            outcome_share=self.plan.train.outcome_share,
            seed=self.plan.seed,
            skip_tokens=(round_number - 1) * stride,
            num_tokens=stride,
        )
        return train(
            self.model,
            examples,
            self.plan.train,
            pad_id=self.tokenizer.pad_token_id or 0,
            seed=self.plan.seed + round_number,
            start_tokens=(round_number - 1) * stride,
            total_tokens=federated.num_rounds * stride,
            optimizer_state=optimizer_state,
            on_step=lambda tokens, _: on_tokens(tokens),
        )

    def _encode(self, records: Sequence[Record]) -> list[Example]:
        return encode_records(
            records,
            lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            self.tokenizer.eos_token_id,
            self.plan.train.max_tokens_per_example,
            learn_context=self.plan.train.learn_context,
        )


def answer_round(
    site: Site, plan: Plan, round_number: int, state: NDArray[np.float32]
) -> RoundReply:
    """Do a site's work of one round, or return the journaled answer to the same request.

    Args:
        site: who and where.
        plan: what was agreed.
        round_number: from 1.
        state: (N,) the global adapter's trained part.

    Raises:
        FederationError: the site has another model.
        ArtifactError: the site's model or data was altered.
        DataError: there is nothing to train on.
    """
    journal = SiteJournal(site.work)
    request_sha256 = _request_hash(site, plan, round_number, state)
    if (kept := journal.read_reply(round_number, request_sha256)) is not None:
        update = EncodedUpdate(kept.pop("codes"), kept.pop("scales"))
        tensors = tuple(kept.pop("tensors", ()))
        return RoundReply(update, RoundAnswer.model_validate(kept), tensors)
    _import_early()
    with _turn(site):
        started = time.monotonic()
        trainer = LocalTrainer(site, plan)
        trainer.set_state(state)
        heldout_loss = trainer.heldout_loss()
        earlier = load_optimizer(journal, round_number - 1)
        tell = partial(journal.write_progress, round_number)
        result = trainer.train_round(round_number, earlier, tell)
        update = encode_update(trainer.get_state() - state)
        tensors = tuple(adapter_state(trainer.model))
        _keep_local(journal, round_number, trainer, result)
    answer = RoundAnswer(
        site=site.name,
        round=round_number,
        num_tokens=result.num_tokens,
        train_loss=result.loss,
        heldout_loss=heldout_loss,
        seconds=time.monotonic() - started,
    )
    journal.write_reply(
        round_number,
        request_sha256,
        {"codes": update.codes, "scales": update.scales},
        {**answer.model_dump(mode="json"), "tensors": tensors},
    )
    return RoundReply(update, answer, tensors)


def train_alone(
    site: Site, plan: Plan, out: Path, *, on_tokens: Callable[[int, int], None] | None = None
) -> Manifest:
    """Train on one site's data alone, for as many tokens as in the federation.

    The first round of a federation is the same alone or together, so the site's own result
    of it, where it was kept, is the start; the other rounds follow without exchange.

    Args:
        site: who and where.
        plan: of the federation to compare with.
        out: folder of the new artifact of kind 'adapter'.
        on_tokens: called now and then with (tokens trained, tokens in all).
    """
    trainer = LocalTrainer(site, plan)
    journal = SiteJournal(site.work)
    first, optimizer_state = 1, None
    local_path = journal.round_folder(1) / "local.safetensors"
    if local_path.exists() and (state := load_optimizer(journal, 1)) is not None:
        trainer.set_state(read_arrays(local_path)["state"])
        first, optimizer_state = 2, state
    stride, num_rounds = plan.federated.tokens_per_round, plan.federated.num_rounds

    def tell(done: int) -> None:
        if on_tokens is not None:
            on_tokens((round_number - 1) * stride + done, num_rounds * stride)

    for round_number in range(first, num_rounds + 1):
        result = trainer.train_round(round_number, optimizer_state, tell)
        optimizer_state = result.optimizer_state
    recipe: dict[str, JsonValue] = {"site": site.name, "plan": plan.model_dump(mode="json")}
    with write_artifact(out, "adapter", recipe=recipe, seed=plan.seed) as writer:
        writer.add_parent("base", site.model)
        writer.add_parent("data", site.data)
        save_adapter(trainer.model, writer.path, base_model=str(site.model))
    del trainer
    gc.collect()  # PEFT's models are in cycles; the next silo's would come on top
    return read_manifest(out)


def _import_early() -> None:
    """Import what loading a model takes seconds to import, before waiting for the turn."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


@contextmanager
def _turn(site: Site) -> Iterator[None]:
    """Wait until no other site of this machine holds a model in memory."""
    if site.turn is None:
        yield
        return
    site.turn.parent.mkdir(parents=True, exist_ok=True)
    with site.turn.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, or the process dies
        yield


def load_optimizer(journal: SiteJournal, round_number: int) -> dict[str, Any] | None:
    """Return the optimizer state after a round, or None where there is none.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = journal.round_folder(round_number) / "optimizer.pt" if round_number else None
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        raise ArtifactError(
            f"the journal {path} is damaged; remove it to go on with a fresh optimizer"
        ) from None
    return state


def _keep_local(
    journal: SiteJournal, round_number: int, trainer: LocalTrainer, result: TrainResult
) -> None:
    folder = journal.round_folder(round_number)
    partial = folder / ".optimizer.pt.partial"
    torch.save(result.optimizer_state, partial)
    partial.replace(folder / "optimizer.pt")
    write_arrays(folder / "local.safetensors", {"state": trainer.get_state()})


def _request_hash(site: Site, plan: Plan, round_number: int, state: NDArray[np.float32]) -> str:
    request = {
        "plan": plan.model_dump(mode="json"),
        "round": round_number,
        "state": hashlib.sha256(state.tobytes()).hexdigest(),
        "data": read_manifest(site.data).sha256,
    }
    return hashlib.sha256(canonical_json(request)).hexdigest()
