"""Synthetic patients of three hospitals, told in short sentences, with a yes/no outcome.

NO PATIENT HERE EXISTS: every record is drawn from a logistic model whose coefficients were
chosen for this demonstration, not fitted to anything, and must not be read as medicine.

The rule from findings to outcome is one for all hospitals; who comes differs. At each
hospital some findings hardly vary, so that its own records teach little about them, and
the others' can help. As the rule is known, so is the ceiling: the AUROC that the true
probability itself reaches on a hospital's mix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.artifact import write_atomic

PATIENTS_NAME = "patients-synthetic.jsonl"
CHOICES = (" no", " yes")

Findings = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class CaseMix:
    """Who comes to a hospital: shares from 0 to 1, means in the finding's unit."""

    mean_age: float
    """Years; standard deviation 9."""
    male: float
    smoker: float
    exertion: float
    """Share with chest pain on exertion."""
    diabetes: float
    mean_systolic: float
    """mmHg; standard deviation 16."""
    depression: float
    """Mean of the ST depression in the exercise test, mm."""
    family: float
    """Share with heart disease in the family."""


HOSPITALS = (
    # Referral centre: nearly everybody is an older man with pain on exertion.
    CaseMix(64, 0.92, 0.45, 0.90, 0.25, 142, 1.1, 0.40),
    # Teaching clinic: many with diabetes and high pressure; exercise tests hardly differ.
    CaseMix(56, 0.50, 0.08, 0.40, 0.50, 150, 0.2, 0.06),
    # Screening: younger, many smokers, diabetes and high pressure rare.
    CaseMix(49, 0.45, 0.50, 0.30, 0.04, 126, 0.7, 0.45),
)
"""The three case mixes, by hospital index."""

INTERCEPT = -3.6
"""Log-odds of a 55-year-old woman with systolic 130 mmHg and none of the findings."""

LOG_ODDS = {
    "age": 0.5,  # per 10 years from 55
    "male": 0.7,
    "smoker": 1.0,
    "exertion": 2.0,
    "diabetes": 1.2,
    "systolic": 0.4,  # per 20 mmHg from 130
    "depression": 1.2,  # per mm
    "family": 0.8,
}
"""The rule, one for all hospitals; assumption, sized so that three findings decide most."""


def write_patients(path: Path, hospital_index: int, num: int, seed: int) -> None:
    """Write synthetic patients as JSONL rows of task "outcome".

    Args:
        path: target; by habit named PATIENTS_NAME, which says what the rows are.
        hospital_index: 0 to 2, into HOSPITALS.
        num: how many patients.
        seed: the same seed and hospital give the same patients, in a prefix of any num.
    """
    rows = make_patients(hospital_index, num, seed)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_patients(hospital_index: int, num: int, seed: int) -> list[dict[str, Any]]:
    """Draw patients as rows of {"prompt", "choices", "answer", "task", "meta"}."""
    random = np.random.default_rng([seed, hospital_index])
    rows = []
    for _ in range(num):
        findings = _draw(HOSPITALS[hospital_index], 1, random)
        probability = float(outcome_probability(findings)[0])
        rows.append(
            {
                "prompt": _tell({name: float(values[0]) for name, values in findings.items()}),
                "choices": list(CHOICES),
                "answer": int(random.random() < probability),
                "task": "outcome",
                "meta": {"synthetic": True, "probability": round(probability, 4)},
            }
        )
    return rows


def outcome_probability(findings: Findings) -> NDArray[np.float64]:
    """Return the true probability of the outcome, per patient.

    Args:
        findings: (num,) per name of LOG_ODDS: years, mmHg, mm, or 0/1.
    """
    centred = {
        **findings,
        "age": (findings["age"] - 55) / 10,
        "systolic": (findings["systolic"] - 130) / 20,
    }
    log_odds = INTERCEPT + sum(LOG_ODDS[name] * centred[name] for name in LOG_ODDS)
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def bayes_auroc(hospital_index: int, num: int = 20_000, seed: int = 0) -> float:
    """Return the AUROC of the true probability at a hospital: no score does better.

    Expected over outcomes, on ``num`` drawn patients: the probability that of a patient
    with and one without the outcome the first has the higher score, ties counting half.
    """
    random = np.random.default_rng([seed, hospital_index, 1])
    findings = _draw(HOSPITALS[hospital_index], num, random)
    return expected_auroc(outcome_probability(findings))


def expected_auroc(probabilities: NDArray[np.float64]) -> float:
    """Return the AUROC of probabilities as scores for outcomes drawn from themselves.

    Args:
        probabilities: (num,), not all 0 and not all 1.
    """
    _, index = np.unique(probabilities, return_inverse=True)
    positive = np.bincount(index, probabilities)
    negative = np.bincount(index, 1 - probabilities)
    below = np.cumsum(negative) - negative
    wins = float(np.sum(positive * (below + negative / 2)))
    return wins / float(positive.sum() * negative.sum())


def _draw(mix: CaseMix, num: int, random: np.random.Generator) -> Findings:
    """Draw findings as they are told: years, pressure in steps of 5, whole mm."""

    def share(probability: float) -> NDArray[np.float64]:
        return (random.random(num) < probability).astype(np.float64)

    return {
        "age": np.clip(np.rint(random.normal(mix.mean_age, 9, num)), 30, 89),
        "male": share(mix.male),
        "smoker": share(mix.smoker),
        "exertion": share(mix.exertion),
        "diabetes": share(mix.diabetes),
        "systolic": np.clip(5 * np.rint(random.normal(mix.mean_systolic, 16, num) / 5), 90, 210),
        "depression": np.clip(random.poisson(mix.depression, num), 0, 4).astype(np.float64),
        "family": share(mix.family),
    }


def _tell(finding: dict[str, float]) -> str:
    """Tell one patient's findings, each always at the same place and in the same words."""
    sex = "man" if finding["male"] else "woman"
    smoker = "smoker" if finding["smoker"] else "non-smoker"
    pain = "pain" if finding["exertion"] else "no pain"
    diabetes = "diabetes" if finding["diabetes"] else "no diabetes"
    family = "heart disease" if finding["family"] else "healthy"
    return (
        f"Patient: {sex}, {finding['age']:.0f} years, {smoker}, {diabetes}, family {family}. "
        f"On exertion {pain}, ST depression {finding['depression']:.0f} mm. "
        f"Pressure {finding['systolic']:.0f}. Heart disease:"
    )
