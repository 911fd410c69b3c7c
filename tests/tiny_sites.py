"""Sites with a tiny model and a few records, and requests as a coordinator would sign them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutirao.artifact import read_manifest, write_artifact
from mutirao.data.records import Record
from mutirao.federated.codec import CodecConfig, decode_tensors, encode_tensors
from mutirao.federated.codec.shapes import shapes_of
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.messages import (
    StateFields,
    TrainRequest,
    payload_tensors,
    tensor_payloads,
)
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import FederatedConfig, Plan, Site
from mutirao.federated.site.replica import add_change, hash_tensors
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.config import TrainConfig
from mutirao.tune.config import LoRAConfig
from mutirao.tune.lora import adapter_state, attach_lora, frozen_sha256

RUN = "ab" * 32
LORA = LoRAConfig(rank=2, alpha=4, target_modules=("q_proj", "down_proj"), num_layers=1)
FEDERATED = FederatedConfig(num_rounds=3, tokens_per_round=120, monitor_tokens=40)
TRAIN = TrainConfig(
    learning_rate=1e-2, warmup_tokens=0, tokens_per_step=64, max_tokens_per_example=32
)
WORDS = ("fever", "cough", "patient", "admitted", "outcome", "persistent", "febre", "correct")


def make_model(tiny_model_directory: Path, folder: Path) -> Path:
    """Write the tiny model as an artifact."""
    with write_artifact(folder, "model") as writer:
        shutil.copytree(tiny_model_directory, writer.path, dirs_exist_ok=True)
    return folder


def make_silo(folder: Path, *, seed: int = 0, num: int = 12, units: int = 0) -> Path:
    """Write a prepared silo; with ``units`` the records belong to so many patients in turn."""
    generator = np.random.default_rng(seed)

    def record(number: int) -> Record:
        text = " ".join(generator.choice(WORDS, 12))
        unit = f"p{number % units}" if units else ""
        return Record(id=f"notes:{number}", source="notes", text=text, unit=unit)

    with write_artifact(folder, "data") as writer:
        for side in ("train", "heldout"):
            lines = [record(number).model_dump_json() + "\n" for number in range(num)]
            (writer.path / f"{side}.jsonl").write_text("".join(lines))
    return folder


def make_packed(folder: Path, *, seed: int = 0, num: int = 2_000, vocabulary: int = 300) -> Path:
    """Write a silo of packed tokens, of which each follows from the one before."""
    start = np.random.default_rng(seed).integers(0, 20)
    ids = ((np.arange(num) * 7 + start) % 20).astype(np.uint16)
    assert vocabulary > 20
    with write_artifact(folder, "data", recipe={"packed": True}) as writer:
        np.save(writer.path / "train.npy", ids)
        np.save(writer.path / "heldout.npy", ids[:200])
    return folder


def make_plan(
    model: Path, *, lora: LoRAConfig | None = LORA, federated=FEDERATED, train=TRAIN
) -> tuple[Plan, dict[str, np.ndarray]]:
    """Return a plan and the agreed start, as a coordinator makes them."""
    loaded, _ = load_causal_lm(model, dtype="bfloat16" if lora else "float32")
    frozen = ""
    if lora is not None:
        loaded = attach_lora(loaded, lora, seed=0)
        frozen = frozen_sha256(loaded)
    start = {name: tensor.numpy() for name, tensor in adapter_state(loaded).items()}
    plan = Plan(
        federated=federated,
        lora=lora,
        train=train,
        model_sha256=read_manifest(model).sha256,
        frozen_sha256=frozen,
    )
    return plan, start


@dataclass
class TinyCoordinator:
    """Signs requests, and follows the state as the sites hold it."""

    work: Path
    plan: Plan
    state: dict[str, np.ndarray]
    based_on: str = ""

    def __post_init__(self) -> None:
        self.key = open_identity(self.work / "identity")

    @property
    def public(self) -> str:
        return public_hex(self.key)

    def sign(self, kind, round_number, fields, payloads=None, *, run=RUN) -> Parcel:
        return Parcel(
            kind=kind,
            run=run,
            round=round_number,
            sender=COORDINATOR,
            fields=fields.model_dump(mode="json"),
            payloads=payloads or {},
        ).signed(self.key)

    def whole(self, round_number: int, *, extra=None, last_counted=None, **changes) -> Parcel:
        """Return a request with the whole state in float32; ``changes`` are of the plan."""
        fields = StateFields(form="whole", state_sha256=hash_tensors(self.state))
        plan = self.plan.model_copy(update=changes)
        request = TrainRequest(plan=plan, state=fields, last_counted=last_counted)
        payloads = tensor_payloads(encode_tensors(self.state, CodecConfig(format="fp32")))
        return self.sign("train", round_number, request, {**payloads, **(extra or {})})

    def change(self, round_number: int, update: dict[str, np.ndarray], *, extra=None) -> Parcel:
        """Return a request with a change of the state, and go on from the state it leads to."""
        codec = self.plan.federated.download
        payloads = encode_tensors(update, codec)
        decoded = decode_tensors(payloads, shapes_of(update), codec)
        before = hash_tensors(self.state)
        self.state = add_change(self.state, decoded)
        fields = StateFields(form="change", based_on=before, state_sha256=hash_tensors(self.state))
        request = TrainRequest(plan=self.plan, state=fields)
        return self.sign(
            "train", round_number, request, {**tensor_payloads(payloads), **(extra or {})}
        )

    def decode(self, answer: Parcel) -> dict[str, np.ndarray]:
        """Return an answer's update."""
        shapes = shapes_of(self.state)
        return decode_tensors(payload_tensors(answer), shapes, self.plan.federated.upload)


def make_site(tmp_path: Path, model: Path, data: Path, name: str = "north", **more) -> Site:
    """Return a site's file."""
    return Site(name=name, model=model, data=data, work=tmp_path / name, **more)
