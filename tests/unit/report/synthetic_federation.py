"""SYNTHETIC folders of a coordinator and of a site: nothing was trained, every number is made up.

They are written by the code that writes real ones (journal, audit log, states), so that their
forms are real. ``write_attacks`` has the form of benchmarks/bench_privacy.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mutirao.artifact import write_atomic
from mutirao.federated.aggregation.outer import FedAvg
from mutirao.federated.audit.log import LOG_NAME, AuditLog
from mutirao.federated.audit.record import Mask, Noise, Release
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord, SiteRound
from mutirao.federated.identity import open_identity
from mutirao.federated.plan import Coordinator, Plan

SITES = ("north", "south", "west")
SHAPES = {"layers.0.q.lora_B.weight": (8, 4), "layers.1.q.lora_B.weight": (8, 4)}
NUM_VALUES = 64
STEPS = 50
RUN = "ab" * 8
POLICY = """
recipes = ["any"]
app_bundles = ["any"]
coordinators = ["{key}"]
kinds = ["adapter update", "losses"]
codecs = ["int8", "fixed point"]
tensors = ["layers.*.lora_B.weight"]
max_bytes_per_day = 20_000_000
max_bytes_per_run = 100_000_000
min_cohort = {cohort}
"""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_coordinator(
    work: Path,
    *,
    sites: tuple[str, ...] = SITES,
    num_rounds: int = 4,
    is_secure: bool = False,
    is_private: bool = False,
    sentence: str = "an update with a value that is not finite was refused",
    lost: tuple[int, int] = (2, 0),
) -> Path:
    """Write a coordinator's folder; ``lost`` is a round, and the place of the site it misses."""
    federated: dict[str, Any] = {"num_rounds": num_rounds}
    if is_secure:
        federated |= {"secure": {}, "weighting": "equal"}
    if is_private:
        training = {"num_units": 1000, "units_per_step": 10, "noise_multiplier": 1.1}
        federated["privacy"] = {"epsilon": 3.0, "delta": 1e-5, "training": training}
    plan = Plan.model_validate({"model_sha256": digest("model"), "federated": federated})
    journal = CoordinatorJournal(work)
    values = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    journal.write_start(SHAPES, values.__getitem__, FedAvg())
    keys = {site: digest(site) for site in sites}
    agreed = Coordinator(plan=plan, sites=keys, work=work, run_id=digest("run"))
    write_atomic(work / "coordinator.json", agreed.model_dump_json())
    records = []
    for number in range(1, num_rounds + 1):
        present = [(index, site) for index, site in enumerate(sites) if (number, index) != lost]
        records.append(
            RoundRecord(
                round=number,
                seconds=12.5 + number,
                sites={
                    site: _site_round(index, number, is_secure, is_private)
                    for index, site in present
                },
                missing=tuple(site for site in sites if site not in dict(present).values()),
                refused=(sites[0],) if number == 1 else (),
                global_sha256=digest(f"global {number}"),
                replica_sha256=digest(f"replica {number}"),
                is_secure=is_secure,
            )
        )
    journal.write_records(records)
    journal.log_refusal(1, sites[0], sentence)
    journal.write_status("finished", round_number=num_rounds)
    return work


def _site_round(index: int, number: int, is_secure: bool, is_private: bool) -> SiteRound:
    return SiteRound(
        num_tokens=10_000 + index,
        num_steps=STEPS,
        train_loss=None if is_private else 3.0 - 0.1 * number + 0.2 * index,
        heldout_loss=None if is_private else 3.1 - 0.1 * number + 0.2 * index,
        epsilon=0.4 * number**0.5 if is_private else None,
        seconds=8.0 + index,
        bytes_sent=1_000 + 10 * index,
        bytes_received=2_000 if number == 1 else 500,
        update_sha256=digest(f"update {index} {number}"),
        update_norm=None if is_secure else 1.0 + index,
        cosine_to_mean=None if is_secure else (0.9, 0.7, -0.2)[index % 3],
    )


def write_measures(work: Path) -> None:
    """Write measures in the form of ``coordinator.measures``, with three that are no losses."""
    losses = {
        "global": {"north": 2.5, "south": 2.75, "west": 2.9},
        "without north": {"north": 2.62, "south": 2.72, "west": "much"},
        "alone north": {"north": 2.4, "south": 3.0, "west": float("nan")},
    }
    document: dict[str, Any] = {
        "round": 4,
        "losses": {
            label: {site: {"loss": loss, "num_tokens": 100} for site, loss in row.items()}
            for label, row in losses.items()
        },
        "contributions": {"north": 0.045, "south": None},
        "later": [1, 2],
    }
    document["losses"]["alone north"]["east"] = 7
    (work / "measures.json").write_text(json.dumps(document))


def write_site(
    work: Path,
    *,
    site: str = "north",
    num_rounds: int = 10,
    is_masked: bool = False,
    is_private: bool = False,
    policy: Path | None = None,
    kind: str = "adapter update",
    content: str = "change of a LoRA adapter of rank 16 on all layers; training tokens, losses and "
    "seconds",
    run: str = RUN,
) -> Path:
    """Write a site's folder, and its policy where a path is given."""
    key = open_identity(work / "identity")
    sha256 = None
    if policy is not None:
        policy.write_text(POLICY.format(key=digest("coordinator"), cohort=3 if is_masked else 0))
        sha256 = hashlib.sha256(policy.read_bytes()).hexdigest()
    log = AuditLog(work / LOG_NAME, key, site=site)
    for number in range(1, num_rounds + 1):
        common: dict[str, Any] = {
            "run": run,
            "round": number,
            "recipient": "coordinator",
            "recipient_key": digest("coordinator"),
            "recipe_sha256": digest("plan"),
            "policy_sha256": sha256,
        }
        if is_masked:
            for step in ("keys", "shares", "consent"):
                log.append(
                    Release(
                        **common,
                        kind="secure aggregation",
                        content=step,
                        codec="fixed point",
                        payload_bytes=700,
                        payload_sha256=digest(f"{step} {number}"),
                    )
                )
        log.append(
            Release(
                **common,
                kind=kind,
                content=content,
                tensors=tuple(SHAPES),
                codec="fixed point" if is_masked else "int8",
                mask=Mask(cohort_size=3 + number % 2) if is_masked else None,
                noise=Noise(noise_multiplier=1.1, clip_norm=1.0, epsilon=0.3 * number, delta=1e-5)
                if is_private
                else None,
                payload_bytes=123_456,
                payload_sha256=digest(f"payload {number}"),
            )
        )
    return work


def write_attacks(path: Path) -> Path:
    def row(auc: float, bits: float, share: float, epsilon: float | None) -> dict[str, Any]:
        server = {
            "exposure": [
                {"num_repetitions": 1, "mean_bits": 1.5},
                {"num_repetitions": 16, "mean_bits": bits},
            ],
            "extracted": {"1": 0.0, "16": share},
            "membership": {
                "auc": auc,
                "auc_low": auc - 0.02,
                "auc_high": auc + 0.02,
                "rates": [{"asked_false_positive_rate": 0.01, "rate": 0.015}],
            },
            "audit": {"epsilon": 0.1},
        }
        return {
            "claimed_epsilon": epsilon,
            "positions": {"server": server},
            "tokens": {"attribution": {"accuracy": 0.8, "chance": 0.25}},
        }

    document = {
        "date": "2026-11-26",
        "data": "SYNTHETIC: no attack was run",
        "conditions": {
            "untrained": row(0.5, 1.4, 0.0, None),
            "plain": row(0.81, 19.9, 0.75, None),
            "secure-aggregated": row(0.79, 19.5, 0.7, None),
            "clipped": row(0.7, 12.0, 0.2, None),
            "dp-high": row(0.52, 2.0, 0.0, 8.0),
            "dp-low": {"positions": "later"},
        },
    }
    path.write_text(json.dumps(document))
    return path
