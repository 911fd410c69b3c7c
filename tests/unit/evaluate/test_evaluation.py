from __future__ import annotations

import json
import logging

import pytest

from mutirao.artifact import MANIFEST_NAME
from mutirao.errors import ArtifactError, DataError, InputError
from mutirao.evaluate.config import EvaluationConfig
from mutirao.evaluate.evaluation import (
    evaluate_silos,
    read_evaluation,
    write_evaluation,
)
from mutirao.evaluate.losses import paired_difference

CONFIG = EvaluationConfig(max_text_tokens=100, num_questions=4, num_outcomes=6, max_tokens=32)


@pytest.fixture
def silos(make_record):
    texts = [make_record(f"t{i}", f"Some note number {i}, told at some length.") for i in range(9)]
    questions = [
        make_record(f"q{i}", f"Question {i}?", (" A", " B"), i % 2, "question") for i in range(9)
    ]
    outcomes = [
        make_record(f"o{i}", f"Patient {i}", (" no", " yes"), i % 2, "outcome") for i in range(9)
    ]
    return {"north": texts + questions + outcomes, "south": texts[:3]}


def test_every_part_is_measured_and_json_has_the_agreed_keys(table_model, silos, tmp_path):
    evaluation = evaluate_silos(table_model, silos, CONFIG, label="base")
    write_evaluation(evaluation, tmp_path / "base", CONFIG)
    document = json.loads((tmp_path / "base" / "evaluation.json").read_text())
    north, south = document["silos"]["north"], document["silos"]["south"]
    assert document["label"] == "base"
    assert set(north["text"]) == {"loss", "num_tokens", "record_losses", "record_tokens"}
    assert set(north["questions"]) == {
        "num", "logprob", "logprob_se", "accuracy", "accuracy_low", "accuracy_high", "chance",
    }  # fmt: skip
    assert set(north["outcomes"]) == {
        "num", "num_positive", "auroc", "auroc_low", "auroc_high", "scores", "labels",
    }  # fmt: skip
    assert north["questions"]["num"] == 4
    assert north["outcomes"]["num"] == 6
    assert south["questions"] is None
    assert south["outcomes"] is None
    assert read_evaluation(tmp_path / "base") == evaluation


def test_the_same_records_are_used_whatever_their_order(make_table_model, silos):
    one = evaluate_silos(make_table_model(0), silos, CONFIG, label="one")
    shuffled = {name: records[::-1] for name, records in silos.items()}
    two = evaluate_silos(make_table_model(1), shuffled, CONFIG, label="two")
    for name in silos:
        first, second = one.silos[name].text, two.silos[name].text
        assert first.record_losses != second.record_losses
        assert paired_difference(first, second).standard_error > 0
    assert one.silos["north"].outcomes.labels == two.silos["north"].outcomes.labels


def test_text_keeps_within_its_tokens(table_model, silos):
    evaluate_silos(table_model, {"north": silos["north"]}, CONFIG, label="base", tasks=["text"])
    assert 32 <= table_model.num_scored <= CONFIG.max_text_tokens


def test_only_what_was_asked_for_is_measured(table_model, silos):
    evaluation = evaluate_silos(table_model, silos, CONFIG, label="4-bit", tasks=("text",))
    assert evaluation.silos["north"].questions is None
    assert evaluation.silos["north"].outcomes is None


@pytest.mark.parametrize("tasks", [("question",), ("text", "poems")])
def test_unknown_or_missing_parts_are_refused(table_model, silos, tasks):
    with pytest.raises(InputError, match="tasks="):
        evaluate_silos(table_model, silos, CONFIG, label="base", tasks=tasks)


def test_a_silo_without_text_is_named(table_model):
    with pytest.raises(DataError, match="silo empty"):
        evaluate_silos(table_model, {"empty": []}, CONFIG, label="base")


def test_outcomes_of_one_kind_give_none_and_say_so(table_model, make_record, caplog):
    records = [make_record(i, f"P{i}", (" no", " yes"), 0, "outcome") for i in range(3)]
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate_silos(table_model, {"a": records}, CONFIG, label="base")
    assert evaluation.silos["a"].outcomes is None
    assert "all 3 held-out outcomes are the same" in caplog.text


def test_parents_are_recorded(table_model, silos, tmp_path):
    first = evaluate_silos(table_model, silos, CONFIG, label="base", tasks=("text",))
    write_evaluation(first, tmp_path / "a", CONFIG)
    manifest = write_evaluation(first, tmp_path / "b", CONFIG, parents=[tmp_path / "a"])
    assert manifest.parents["evaluation-a"].path == "../a"
    assert manifest.recipe["evaluation"]["num_questions"] == 4


def test_a_damaged_evaluation_is_refused(table_model, silos, tmp_path):
    evaluation = evaluate_silos(table_model, silos, CONFIG, label="base", tasks=("text",))
    write_evaluation(evaluation, tmp_path / "a", CONFIG)
    (tmp_path / "a" / "evaluation.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        read_evaluation(tmp_path / "a")
    assert (tmp_path / "a" / MANIFEST_NAME).exists()
