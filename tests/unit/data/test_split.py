import pytest

from mutirao.data import Record, side_of


def record(text, context_length=0):
    return Record(id="x", source="x", text=text, context_length=context_length)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_share_is_met_and_larger_shares_contain_smaller(share):
    sides = [side_of(record(f"document number {i}"), share) for i in range(4000)]
    assert sides.count("heldout") / 4000 == pytest.approx(share, abs=0.025)
    larger = [side_of(record(f"document number {i}"), share + 0.2) for i in range(4000)]
    assert all(b == "heldout" for a, b in zip(sides, larger, strict=True) if a == "heldout")


def test_side_depends_on_words_not_on_place_or_punctuation():
    for i in range(200):
        here = record(f"Case {i}: chest pain.")
        there = Record(id="other:9", source="other", text=f"case {i} - CHEST pain")
        assert side_of(here, 0.3) == side_of(there, 0.3)


def test_one_question_with_two_answers_stands_on_one_side():
    for i in range(200):
        prompt = f"Question {i}?"
        sides = {side_of(record(prompt + end, len(prompt)), 0.5) for end in (" yes", " no")}
        assert len(sides) == 1
