"""Models and silos in memory, shared by the sites of one process and kept between rounds.

A model is loaded once for a base model, an adapter and a seed; the sites that share it take
turns and put their own state into it. A silo's examples are encoded once and kept for the few
sites that were asked last. What lies on disk is verified when it is loaded, and loaded anew
when its files have changed since. Processes that train with this one are kept along with them.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from mutirao.artifact import MANIFEST_NAME, canonical_json, open_artifact, read_manifest
from mutirao.data.prepare import load_records
from mutirao.data.records import Record
from mutirao.data.split import Side
from mutirao.data.tokenization import Example, encode_records
from mutirao.errors import FederationError
from mutirao.federated.plan import Plan, Site
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.loop import is_half_precision
from mutirao.train.packed import TokenIds, check_vocabulary, read_packed
from mutirao.train.private import group_units
from mutirao.tune.lora import adapter_state, attach_lora, frozen_sha256
from mutirao.tune.qlora import quantize_base

if TYPE_CHECKING:
    from mutirao.federated.site.ranks import RankProcesses

T = TypeVar("T")
MAX_SILOS = 8
"""Silos whose examples stay in memory; an assumption: a few sites are asked in turn."""


@dataclass
class LoadedModel:
    """A model with what is trained in it, and its tokenizer."""

    model: Any
    """The causal model, with its adapter where there is one."""
    tokenizer: Any
    """The tokenizer that belongs to it."""
    start: dict[str, Tensor]
    """What is trained, as it was loaded; by name, sorted."""
    history: list[RemovableHandle] = field(default_factory=list)
    """What earlier rounds added to its layers; see ``set_history``."""
    factors: dict[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    """The same as it was given."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is trained, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.start.items()}

    @property
    def pad_id(self) -> int:
        """Token that fills batches."""
        return int(self.tokenizer.pad_token_id or 0)

    def set_history(self, factors: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
        """Add low-rank products to layers, in place of those added before.

        Args:
            factors: (B, A) by module: (O, R) and (R, I), added as B A to the layer's weight.
        """
        for handle in self.history:
            handle.remove()
        self.factors = factors
        modules = dict(self.model.named_modules())
        self.history = [
            modules[name].register_forward_hook(_Addition(*map(torch.from_numpy, pair)))
            for name, pair in sorted(factors.items())
        ]


class _Addition:
    """Adds B A x to what a layer makes of x."""

    def __init__(self, b_OR: Tensor, a_RI: Tensor) -> None:
        self.b_OR, self.a_RI = b_OR, a_RI

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        inner = functional.linear(x, self.a_RI.to(x))
        return output + functional.linear(inner, self.b_OR.to(inner)).to(output.dtype)


class Silo:
    """One site's data, read and encoded when first used."""

    def __init__(self, site: Site, plan: Plan, tokenizer: Any, num_vocabulary: int) -> None:
        self.path, self.plan, self.tokenizer = site.data, plan, tokenizer
        manifest = open_artifact(site.data, "data")
        self.is_packed = bool(manifest.recipe.get("packed"))
        """Whether it holds arrays of token ids in place of records."""
        self._num_vocabulary = num_vocabulary

    def tokens(self, side: Side) -> TokenIds:
        """Return one side's token ids, a memory map; for packed data."""
        return self._train_tokens if side == "train" else self._heldout_tokens

    @cached_property
    def text(self) -> list[Example]:
        """Training examples of text and questions."""
        return self._encode([each for each in self._train if each.task != "outcome"])

    @cached_property
    def outcomes(self) -> list[Example]:
        """Training examples of outcomes."""
        return self._encode([each for each in self._train if each.task == "outcome"])

    @cached_property
    def heldout(self) -> list[Example]:
        """Held-out examples but outcomes."""
        records = load_records(self.path, "heldout")
        return self._encode([each for each in records if each.task != "outcome"])

    @cached_property
    def units(self) -> list[tuple[Example, ...]]:
        """Training examples of each unit of privacy.

        Raises:
            FederationError: the data is packed, so that nobody knows whose it is.
        """
        if self.is_packed:
            raise FederationError(
                "differential privacy needs records, to know whose they are; this silo holds "
                "packed tokens"
            )
        pairs = [(one, each.unit_key) for each in self._train for one in self._encode([each])]
        return group_units([example for example, _ in pairs], [key for _, key in pairs])

    @cached_property
    def _train(self) -> list[Record]:
        return load_records(self.path, "train")

    @cached_property
    def _train_tokens(self) -> TokenIds:
        return self._open("train")

    @cached_property
    def _heldout_tokens(self) -> TokenIds:
        return self._open("heldout")

    def _open(self, side: Side) -> TokenIds:
        path = self.path / f"{side}.npy"
        tokens = read_packed(path)
        check_vocabulary(tokens, self._num_vocabulary, str(path))
        return tokens

    def _encode(self, records: list[Record]) -> list[Example]:
        return encode_records(
            records,
            lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            self.tokenizer.eos_token_id,
            self.plan.train.max_tokens_per_example,
            learn_context=self.plan.train.learn_context,
        )


class ModelCache:
    """What the sites of one process share; take ``lock`` while using what it returns.

    Args:
        max_models: models in memory at once.
        max_silos: silos whose examples are kept.
    """

    def __init__(self, *, max_models: int = 1, max_silos: int = MAX_SILOS) -> None:
        self.lock = threading.RLock()
        self._max_models, self._max_silos = max_models, max_silos
        self._models: OrderedDict[Hashable, LoadedModel] = OrderedDict()
        self._silos: OrderedDict[Hashable, Silo] = OrderedDict()
        self._ranks: RankProcesses | None = None

    def model(self, site: Site, plan: Plan) -> LoadedModel:
        """Return the model of a site and plan, loaded if need be.

        Raises:
            FederationError: the site has another model, or makes another start of it.
            ArtifactError: the model was altered.
        """
        lora = plan.lora.model_dump_json() if plan.lora else None
        is_private = plan.federated.privacy is not None
        how = plan.seed, plan.frozen_sha256, site.rank, is_private, plan.train.compute_dtype
        marks = (lora, plan.model_sha256, *how)
        key = (_fingerprint(site.model), *marks)
        found = self._models.pop(key, None)
        if found is None:
            _trim(self._models, self._max_models - 1)
            found = _load(site, plan)
        self._models[key] = found
        return found

    def silo(self, site: Site, plan: Plan, loaded: LoadedModel) -> Silo:
        """Return a site's data, encoded for a model.

        Raises:
            ArtifactError: the data was altered.
        """
        how = plan.train.max_tokens_per_example, plan.train.learn_context, plan.model_sha256
        key = (_fingerprint(site.data), *how)
        found = self._silos.pop(key, None)
        if found is None:
            _trim(self._silos, self._max_silos - 1)
            num_vocabulary = int(loaded.model.config.vocab_size)
            found = Silo(site, plan, loaded.tokenizer, num_vocabulary)
        self._silos[key] = found
        return found

    def ranks(self, site: Site) -> RankProcesses:
        """Return the processes that train with this one for a site; another site's are ended."""
        from mutirao.federated.site.ranks import RankProcesses

        if self._ranks is None or self._ranks.site != site:
            if self._ranks is not None:
                self._ranks.close()
            self._ranks = RankProcesses(site)
        return self._ranks

    def clear(self) -> None:
        """Give the memory back, and end the processes that train with this one."""
        if self._ranks is not None:
            self._ranks.close()
        self._ranks = None
        self._models.clear()
        self._silos.clear()
        gc.collect()  # PEFT's models are in cycles


@contextmanager
def take_turn(site: Site) -> Iterator[None]:
    """Wait until no other site of this machine holds a model in memory."""
    if site.turn is None:
        yield
        return
    _import_early()
    site.turn.parent.mkdir(parents=True, exist_ok=True)
    with site.turn.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, or the process dies
        yield


def _import_early() -> None:
    """Import what loading a model takes seconds to import, before waiting for the turn."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def _load(site: Site, plan: Plan) -> LoadedModel:
    own_model = open_artifact(site.model, "model")
    if own_model.sha256 != plan.model_sha256:
        raise FederationError(
            f"site {site.name} has another base model ({own_model.sha256[:12]}) than the "
            f"federation ({plan.model_sha256[:12]}); install the agreed one"
        )
    # All of what is trained is kept in float32; a frozen base needs no more than it computes in.
    model: Any
    model, tokenizer = load_causal_lm(site.model, dtype="bfloat16" if plan.lora else "float32")
    if plan.lora is not None:
        rank = site.rank or plan.lora.rank
        config = plan.lora.model_copy(update={"rank": rank})
        model = attach_lora(model, config, seed=plan.seed)
        if frozen_sha256(model) != plan.frozen_sha256:
            raise FederationError(
                f"site {site.name} makes another frozen part of the adapter from seed "
                f"{plan.seed} than the coordinator; install the same version of PyTorch"
            )
        if plan.lora.quantize_base:
            quantize_base(model)
    else:
        model.requires_grad_(True)
    if torch.cuda.is_available() and plan.federated.privacy is None:
        model.to("cuda")
    is_quantized = plan.lora is not None and plan.lora.quantize_base
    if not is_quantized and not is_half_precision(plan.train, model.device.type):
        model.float()  # only now: the adapter's start is drawn in the base's precision
    return LoadedModel(model, tokenizer, adapter_state(model))


def _fingerprint(path: Path) -> str:
    """Return a hash that changes when an artifact does; of sizes and times, not of contents."""
    manifest = read_manifest(path)
    marks: list[Any] = [str(path.resolve()), manifest.sha256]
    for name in (MANIFEST_NAME, *sorted(manifest.files)):
        try:
            status = (path / name).stat()
        except OSError:
            continue  # told when the artifact is verified
        marks.append([name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(canonical_json(marks)).hexdigest()


def _trim(kept: OrderedDict[Hashable, T], most: int) -> None:
    while len(kept) > max(0, most):
        kept.popitem(last=False)
        gc.collect()
