import random

import pytest

from mutirao.data import DuplicateConfig, DuplicateFilter, Record


def record(text, **fields):
    return Record(id=text[:8], source="x", text=text, **fields)


def outcome(text, answer=0):
    return record(
        text, context_length=len(text) - 4, choices=(" no", " yes"), answer=answer, task="outcome"
    )


def words(num, seed):
    return [f"w{random.Random(seed * 10_000 + i).randrange(10**6)}" for i in range(num)]


def reference_jaccard(a, b, size=5):
    grams = [{tuple(x[i : i + size]) for i in range(len(x) - size + 1)} for x in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_exact_duplicates_ignore_case_spaces_and_punctuation():
    seen = DuplicateFilter()
    assert seen.reason(record("Chest pain, for two days.")) is None
    assert seen.reason(record("chest  PAIN for two days")) == "exact duplicate"
    assert seen.reason(record("Chest pain, for three days.")) is None


@pytest.mark.parametrize("num_changed", [1, 2, 3, 5, 8])
def test_near_duplicates_follow_the_true_jaccard_similarity(num_changed):
    threshold = DuplicateConfig().threshold
    for seed in range(20):
        first = words(200, seed)
        second = list(first)
        for position in random.Random(seed).sample(range(200), num_changed):
            second[position] = "changed"
        expected = reference_jaccard(first, second) >= threshold
        seen = DuplicateFilter()
        assert seen.reason(record(" ".join(first))) is None
        assert (seen.reason(record(" ".join(second))) == "near duplicate") == expected


def test_the_first_is_kept_whatever_comes_between():
    base = words(100, 1)
    copies = [" ".join([*base, f"end{i}"]) for i in range(5)]
    others = [" ".join(words(100, seed)) for seed in range(2, 40)]
    seen = DuplicateFilter()
    kept = [text for text in [copies[0], *others, *copies[1:]] if not seen.reason(record(text))]
    assert kept == [copies[0], *others]


def test_notes_in_one_frame_with_different_content_are_kept():
    seen = DuplicateFilter()
    for seed in range(30):
        note = "Admission note. The patient was admitted today with " + " ".join(words(25, seed))
        assert seen.reason(record(note)) is None


def test_outcome_records_are_compared_exactly_only():
    frame = "Patient: man, 64 years, smoker, diabetes. ST depression {} mm. Ill: no"
    seen = DuplicateFilter()
    assert all(seen.reason(outcome(frame.format(i))) is None for i in (1, -1, 1.5, 15))
    assert seen.reason(outcome(frame.format(1))) == "exact duplicate"


def test_empty_and_wordless_texts_are_handled():
    seen = DuplicateFilter()
    assert seen.reason(record("?!")) is None
    assert seen.reason(record("!!")) is None
    assert seen.reason(record("?!")) == "exact duplicate"
