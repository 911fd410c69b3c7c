import json
import math
import re

import numpy as np
import pytest

from mutirao.data import read_folder
from mutirao.demo.patients import (
    HOSPITALS,
    PATIENTS_NAME,
    bayes_auroc,
    expected_auroc,
    make_patients,
    write_patients,
)


def test_rows_are_outcome_records_marked_synthetic(tmp_path):
    path = tmp_path / PATIENTS_NAME
    write_patients(path, 0, 50, seed=3)
    assert "synthetic" in path.name
    assert all(json.loads(line)["meta"]["synthetic"] for line in path.read_text().splitlines())
    records = list(read_folder(tmp_path))
    assert len(records) == 50
    assert all(record.task == "outcome" for record in records)
    assert all(record.context.endswith("Heart disease:") for record in records)
    assert {record.completion for record in records} == {" no", " yes"}


def test_same_seed_gives_the_same_patients_and_hospitals_differ():
    assert make_patients(1, 20, seed=5) == make_patients(1, 30, seed=5)[:20]
    assert make_patients(1, 20, seed=5) != make_patients(1, 20, seed=6)
    assert make_patients(1, 20, seed=5) != make_patients(2, 20, seed=5)


def test_the_told_findings_give_the_probability_by_one_rule():
    """The rule is computed again here from the sentences alone."""
    for hospital in range(len(HOSPITALS)):
        for row in make_patients(hospital, 100, seed=1):
            told = row["prompt"]
            age, depression, systolic = map(int, re.findall(r"\d+", told))
            log_odds = -3.6 + 0.5 * (age - 55) / 10 + 0.4 * (systolic - 130) / 20
            log_odds += 1.2 * depression + 0.7 * (" man," in told)
            log_odds += 1.0 * (" smoker" in told) + 2.0 * ("exertion pain" in told)
            log_odds += 1.2 * (", diabetes" in told) + 0.8 * ("family heart" in told)
            expected = 1 / (1 + math.exp(-log_odds))
            assert row["meta"]["probability"] == pytest.approx(expected, abs=1e-4)


def test_outcomes_follow_their_probabilities():
    rows = make_patients(1, 3000, seed=2)
    expected = np.mean([row["meta"]["probability"] for row in rows])
    assert np.mean([row["answer"] for row in rows]) == pytest.approx(expected, abs=0.03)


def test_case_mixes_differ():
    shares = [
        np.mean([row["answer"] for row in make_patients(hospital, 1000, seed=0)])
        for hospital in range(3)
    ]
    assert max(shares) - min(shares) > 0.3
    pain = [
        np.mean(["exertion pain" in row["prompt"] for row in make_patients(hospital, 1000, 0)])
        for hospital in range(3)
    ]
    assert pain[0] > 0.85
    assert pain[2] < 0.35


def test_expected_auroc_against_pairs_counted_one_by_one():
    probabilities = np.array([0.1, 0.4, 0.4, 0.9, 0.7])
    wins = total = 0.0
    for p in probabilities:
        for q in probabilities:
            weight = p * (1 - q)
            total += weight
            wins += weight * (1.0 if p > q else 0.5 if p == q else 0.0)
    assert expected_auroc(probabilities) == pytest.approx(wins / total)
    assert expected_auroc(np.full(9, 0.3)) == pytest.approx(0.5)


def test_ceiling_leaves_something_to_learn():
    for hospital in range(3):
        assert 0.78 < bayes_auroc(hospital, num=5000) < 0.95
