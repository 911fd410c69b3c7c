"""The notes that identifiers are measured on, and what is asked of the recognisers there."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from validate_docbr import CNPJ, CNS, CPF, PIS, TituloEleitoral

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from data_preparation.identifiers import _by_type, _overlaps, _score
from data_preparation.notes import FILLERS, IDENTIFIERS, make_notes

from mutirao.data import find_identifiers
from mutirao.data.identifiers.recognisers import RECOGNISERS

NOTES = make_notes(600, seed=3)


def test_notes_hold_every_type_where_they_say():
    types = Counter(type_ for note in NOTES for _, _, type_ in note.spans)
    assert set(types) == {each.type for each in RECOGNISERS}
    for note in NOTES:
        for start, end, _ in note.spans:
            assert note.text[start:end].strip() == note.text[start:end] != ""
    assert make_notes(600, seed=3) == NOTES
    assert make_notes(600, seed=4) != NOTES


@pytest.mark.parametrize(
    ("type_", "document"),
    [
        ("CPF", CPF()),
        ("CNPJ", CNPJ()),
        ("CNS", CNS()),
        ("PIS", PIS()),
        ("TITULO", TituloEleitoral()),
    ],
)
def test_check_digits_agree_with_another_implementation(type_, document):
    draw = random.Random(0)
    for _ in range(300):
        value = IDENTIFIERS[type_](draw)
        assert document.validate("".join(filter(str.isalnum, value))), value
    wrong = [FILLERS["wrong_cpf"](draw) for _ in range(100)]
    assert not any(CPF().validate("".join(filter(str.isdecimal, each))) for each in wrong)


def test_identifiers_of_a_fixed_form_are_found_and_other_numbers_left_alone():
    found = [
        [(each.start, each.end, each.type) for each in find_identifiers(note.text)]
        for note in NOTES
    ]
    by_type = _by_type([note.spans for note in NOTES], found)
    for type_, scores in by_type.items():
        assert scores["recall"] >= 0.99, type_
        assert scores["precision"] >= 0.95, type_  # one chance hit among some hundred
    whole = _score([note.spans for note in NOTES], found, lambda one, other: one == other)
    assert whole["precision"] >= 0.98


def test_scores_are_those_of_hand_counts():
    truth = [[(0, 3, "A"), (5, 9, "B")], []]
    found = [[(0, 3, "A"), (6, 9, "B")], [(1, 2, "A")]]
    exact = _score(truth, found, lambda one, other: one == other)
    assert exact == {"precision": 0.3333, "recall": 0.5, "f1": 0.4}
    assert _score(truth, found, _overlaps) == {"precision": 0.6667, "recall": 1.0, "f1": 0.8}
    assert _by_type(truth, found)["A"] == {"num": 1, "precision": 0.5, "recall": 1.0, "f1": 0.6667}
