"""One site's training: the agreed state in, a changed state out.

Nothing here leaves the site, and nothing here knows of requests and answers (``worker``). The
model and the encoded silo come from a cache that the sites of one process share, so a trainer
is light, and only the one that set its state last may go on from it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from mutirao.artifact import Manifest, read_manifest, write_artifact
from mutirao.data.tokenization import Example
from mutirao.errors import ArtifactError, FederationError, explain_disk_errors
from mutirao.evaluate.losses import evaluate_text
from mutirao.federated.aggregation.low_rank_state import split_state, start_adapter
from mutirao.federated.arrays import read_arrays
from mutirao.federated.codec import Tensors
from mutirao.federated.plan import Plan, Site
from mutirao.federated.site.journal import LOCAL_NAME, OPTIMIZER_NAME, SiteJournal
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.ranks import RoundStart, part_tensors
from mutirao.federated.site.state import WITH_HISTORY
from mutirao.models.causal import CausalModel
from mutirao.train.accountant import PrivacyBudget
from mutirao.train.loop import TrainResult, is_half_precision, train
from mutirao.train.moments import start_optimizer
from mutirao.train.packed import packed_loss, train_packed, windows_per_step
from mutirao.train.parallel import ALONE, Ranks
from mutirao.train.private import PrivateResult, example_loss, train_private
from mutirao.train.stream import take_mixed
from mutirao.tune.lora import adapter_state, load_adapter_state, save_adapter

OnTokens = Callable[[int], None]


class LocalTrainer:
    """A model and one site's examples, in memory.

    Args:
        site: who and where.
        plan: what was agreed.
        cache: where model and examples are kept; None for a cache of its own.

    Raises:
        FederationError: the site has another model than the federation, or asks for what is not
            built.
        ArtifactError: the site's model or data was altered.
    """

    def __init__(self, site: Site, plan: Plan, cache: ModelCache | None = None) -> None:
        if site.num_processes != 1 and plan.federated.privacy is not None:
            raise FederationError(
                f"num_processes={site.num_processes} is not supported with differential privacy "
                "(expected 1)"
            )
        self.site, self.plan, self._cache = site, plan, cache or ModelCache()
        self.loaded = self._cache.model(site, plan)
        self.silo = self._cache.silo(site, plan, self.loaded)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is trained, by name, sorted."""
        return self.loaded.shapes

    def get_state(self) -> dict[str, NDArray[np.float32]]:
        """Return what is trained, as float32 arrays by name, sorted."""
        return {name: tensor.numpy() for name, tensor in adapter_state(self.model).items()}

    def set_state(self, state: Tensors) -> None:
        """Set what is trained.

        Raises:
            ShapeError: names or shapes are not those of the model.
        """
        load_adapter_state(self.model, {name: torch.tensor(state[name]) for name in state})

    def start_round(self, state: Tensors, round_number: int) -> dict[str, NDArray[np.float32]]:
        """Put the agreed state in place; return what is trained as it stands then.

        Args:
            state: what all sites hold; with aggregation 'stacked' and 'fedex' with a history.
            round_number: from 1; fixes the fresh adapter of 'stacked'.

        Raises:
            ShapeError: names or shapes are not those of the model.
            UpdateError: a history fits no layer.
        """
        rule = self.plan.federated.aggregation
        if rule not in WITH_HISTORY:
            self.set_state(state)
            return dict(state)
        adapter, history = split_state(state)
        self.loaded.set_history(
            {
                module: (factors.b.astype(np.float32), factors.a.astype(np.float32))
                for module, factors in history.items()
            }
        )
        if rule == "stacked":
            adapter = start_adapter(self.shapes, seed=self.plan.seed, round_number=round_number)
        self.set_state(adapter)
        return adapter

    def heldout_loss(self) -> float | None:
        """Return the loss on the first held-out tokens, or None when none are wanted."""
        measured = self.evaluate(self.plan.federated.monitor_tokens)
        return None if measured is None else measured[0]

    def evaluate(self, max_tokens: int) -> tuple[float, int] | None:
        """Return the loss on the first held-out tokens, in nats per token, and their number.

        Args:
            max_tokens: about how many; whole examples are scored.

        Returns:
            None when there is nothing to score.
        """
        if max_tokens < 1:
            return None
        if self.silo.is_packed:
            tokens = self.silo.tokens("heldout")
            if tokens.size < 2:
                return None
            return packed_loss(self.model, tokens, self.plan.train, max_tokens=max_tokens)
        examples: list[Example] = []
        num_tokens = 0
        for example in self.silo.heldout:
            if num_tokens >= max_tokens:
                break
            examples.append(example)
            num_tokens += len(example.ids)
        if not examples:
            return None
        wrapped = CausalModel(self.model, self.tokenizer, name=self.site.name)
        result = evaluate_text(wrapped, examples)
        return result.loss, result.num_tokens

    def train_round(
        self, round_number: int, optimizer_state: dict[str, Any] | None, on_tokens: OnTokens
    ) -> TrainResult:
        """Train on this round's stretch of the site's examples, with all the site's processes.

        Args:
            round_number: from 1.
            optimizer_state: to go on from, or None to start anew: from zero, or from the base
                model's second moments where the plan says so; is changed.
            on_tokens: hears how far it has come.

        Raises:
            InputError: the base model's second moments are missing or not its own.
            RankLostError: one of the processes ended; the model is in between two states.
        """
        if optimizer_state is None and self.plan.federated.second_moments:
            optimizer_state = start_optimizer(
                self.model, self.site.model, self.plan.train, fused=self.silo.is_packed
            )
        if self.site.num_processes == 1:
            return self._train(round_number, optimizer_state, on_tokens, ALONE)
        processes = self._cache.ranks(self.site)
        with processes.share_round(self.plan, self.loaded, round_number, optimizer_state) as ranks:
            return self._train(round_number, optimizer_state, on_tokens, ranks)

    def follow_round(self, start: RoundStart, ranks: Ranks) -> None:
        """Train a round that rank 0 begins, from what it sends, with as many threads.

        Raises:
            RankLostError: another rank ended.
        """
        torch.set_num_threads(start.num_threads)
        tensors = {name: ranks.broadcast(torch.empty(shape)) for name, shape in start.shapes}
        trained, history, optimizer = part_tensors(tensors)
        self.loaded.set_history(
            {module: (b_OR.numpy(), a_RI.numpy()) for module, (b_OR, a_RI) in history.items()}
        )
        load_adapter_state(self.model, trained)
        del tensors, trained  # as large as the weights
        state = None if start.groups is None else {"state": optimizer, "param_groups": start.groups}
        self._train(start.round, state, lambda _: None, ranks)

    def _train(
        self,
        round_number: int,
        optimizer_state: dict[str, Any] | None,
        on_tokens: OnTokens,
        ranks: Ranks,
    ) -> TrainResult:
        # For models with dropout, which must not drop the same at all ranks.
        torch.manual_seed(self.plan.seed + round_number + (ranks.rank << 32))
        if self.silo.is_packed:
            return self._train_packed(round_number, optimizer_state, on_tokens, ranks)
        federated = self.plan.federated
        stride = federated.tokens_per_round
        examples = take_mixed(
            self.silo.text,
            self.silo.outcomes,
            outcome_share=self.plan.train.outcome_share,
            seed=self.plan.seed,
            skip_tokens=(round_number - 1) // federated.turns * stride,
            num_tokens=stride,
        )
        return train(
            self.model,
            examples,
            self.plan.train,
            pad_id=self.loaded.pad_id,
            seed=self.plan.seed + round_number,
            start_tokens=(round_number - 1) * stride,
            total_tokens=federated.num_rounds * stride,
            optimizer_state=optimizer_state,
            on_step=lambda tokens, _: on_tokens(tokens),
            ranks=ranks,
        )

    def _train_packed(
        self,
        round_number: int,
        optimizer_state: dict[str, Any] | None,
        on_tokens: OnTokens,
        ranks: Ranks,
    ) -> TrainResult:
        config, federated = self.plan.train, self.plan.federated
        step_tokens = windows_per_step(config) * config.max_tokens_per_example
        num_steps = max(1, federated.tokens_per_round // step_tokens)
        return train_packed(
            self.model,
            self.silo.tokens("train"),
            config,
            seed=self.plan.seed,
            name=self.site.name,
            num_steps=num_steps,
            start_step=(round_number - 1) * num_steps,
            total_steps=federated.num_rounds * num_steps,
            optimizer_state=optimizer_state,
            on_step=lambda tokens, _: on_tokens(tokens),
            ranks=ranks,
        )

    def train_private_round(
        self,
        round_number: int,
        optimizer_state: dict[str, Any] | None,
        budget: PrivacyBudget,
        on_spend: Callable[[PrivacyBudget], None],
    ) -> PrivateResult:
        """Do this round's noisy steps; ``on_spend`` keeps the budget on disk before each.

        Raises:
            PrivacyBudgetError: the budget does not last for the round; nothing was spent.
        """
        federated = self.plan.federated
        privacy = federated.privacy
        assert privacy is not None
        return train_private(
            self.model,
            self.silo.units,
            example_loss(
                self.loaded.pad_id,
                autocast=is_half_precision(self.plan.train, self.model.device.type),
            ),
            self.plan.train,
            privacy.training,
            budget=budget,
            num_steps=privacy.steps_per_round,
            start_step=(round_number - 1) * privacy.steps_per_round,
            total_steps=federated.num_rounds * privacy.steps_per_round,
            optimizer_state=optimizer_state,
            on_spend=on_spend,
        )


def train_alone(
    site: Site, plan: Plan, out: Path, *, on_tokens: Callable[[int, int], None] | None = None
) -> Manifest:
    """Train on one site's data alone, for as many tokens as in the federation.

    The first round of a federation is the same alone or together, so the site's own result
    of it, where it was kept, is the start; the other rounds follow without exchange.

    Args:
        site: who and where.
        plan: of the federation to compare with; without differential privacy, and with an
            adapter.
        out: folder of the new artifact of kind 'adapter'.
        on_tokens: called now and then with (tokens trained, tokens in all).

    Raises:
        FederationError: the plan trains all weights, or its sites train in turns.
    """
    if plan.lora is None:
        raise FederationError("training alone is for plans with an adapter (plan.lora is null)")
    if plan.federated.turns > 1:
        raise FederationError(
            "training alone is compared with sites that train in every round "
            f"(plan.federated.turns is {plan.federated.turns})"
        )
    cache = ModelCache()
    trainer = LocalTrainer(site, plan, cache)
    first, optimizer_state = 1, None
    for run in SiteJournal(site.work).runs_of(plan):
        folder = run.round_folder(1)
        if (folder / LOCAL_NAME).exists() and (state := load_optimizer(folder)) is not None:
            trainer.set_state(read_arrays(folder / LOCAL_NAME))
            first, optimizer_state = 2, state
            break
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
    cache.clear()  # the next silo's model would come on top
    return read_manifest(out)


def load_optimizer(folder: Path) -> dict[str, Any] | None:
    """Return the optimizer state that a round left, or None where there is none.

    Args:
        folder: the round's.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / OPTIMIZER_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        raise ArtifactError(
            f"the journal {path} is damaged; remove it to go on with a fresh optimizer"
        ) from None
    return state


def save_optimizer(folder: Path, state: Mapping[str, Any]) -> None:
    """Keep an optimizer state in a round's folder, atomically, without a copy in memory."""
    partial = folder / f".{OPTIMIZER_NAME}.partial"
    with explain_disk_errors(partial):
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / OPTIMIZER_NAME)
