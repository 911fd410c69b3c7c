"""The matrix: every combination has a verdict, and each unsound one says why."""

import itertools

import pytest

from mutirao.errors import InputError
from mutirao.federated.compatibility import (
    CONFLICTS,
    Combination,
    Encoding,
    Feedback,
    Privacy,
    Rule,
    Secrecy,
    check_combination,
    compatibility_table,
    find_conflicts,
)

ALL = [Combination(*each) for each in itertools.product(Rule, Secrecy, Privacy, Encoding, Feedback)]
ROBUST = (Rule.MEDIAN, Rule.TRIMMED_MEAN, Rule.KRUM, Rule.MULTI_KRUM)


def _is_sound(each):
    """Written apart from the module: what a sound combination needs."""
    needs_single = each.rule in (*ROBUST, Rule.FEDEX, Rule.STACKED)
    if each.rule is Rule.SEPARATE_FACTOR_MEANS:
        return False
    if each.secrecy is Secrecy.SECURE and (
        needs_single or each.encoding is not Encoding.FIXED_POINT
    ):
        return False
    if each.privacy is Privacy.RECORD and each.rule is Rule.TOKEN_MEAN:
        return False
    if each.privacy is Privacy.CLIENT and (
        each.rule is not Rule.EQUAL_MEAN or each.feedback is Feedback.AFTER_CLIP
    ):
        return False
    if each.rule in (Rule.MEDIAN, Rule.TRIMMED_MEAN) and each.encoding is Encoding.TOP_K:
        return False
    return not (each.rule is Rule.STACKED and each.feedback is not Feedback.NONE)


def test_every_combination_has_the_verdict_of_an_independent_account():
    assert len(ALL) == 9 * 2 * 3 * 7 * 3
    for each in ALL:
        assert (not find_conflicts(each)) == _is_sound(each), each


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"rule": Rule.KRUM, "secrecy": Secrecy.SECURE}, "single updates"),
        ({"rule": Rule.FEDEX, "secrecy": Secrecy.SECURE}, "own factors"),
        ({"rule": Rule.STACKED, "secrecy": Secrecy.SECURE}, "own factors"),
        ({"encoding": Encoding.TOP_K, "secrecy": Secrecy.SECURE}, "other places"),
        ({"encoding": Encoding.INT4, "secrecy": Secrecy.SECURE}, "scales of their own"),
        ({"encoding": Encoding.BF16, "secrecy": Secrecy.SECURE}, "modulo a power of two"),
        ({"feedback": Feedback.AFTER_CLIP, "privacy": Privacy.CLIENT}, "sensitivity"),
        ({"rule": Rule.TOKEN_MEAN, "privacy": Privacy.CLIENT}, "Token counts tell"),
        ({"rule": Rule.TOKEN_MEAN, "privacy": Privacy.RECORD}, "Token counts tell"),
        ({"rule": Rule.SEPARATE_FACTOR_MEANS}, "is not the mean of the products"),
        ({"rule": Rule.MEDIAN, "encoding": Encoding.TOP_K}, "is zero"),
    ],
)
def test_an_unsound_combination_is_refused_with_its_reason(choices, words):
    with pytest.raises(InputError, match=words):
        check_combination(Combination(**choices))


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"rule": Rule.KRUM},
        {"secrecy": Secrecy.SECURE, "encoding": Encoding.FIXED_POINT},
        {"rule": Rule.KRUM, "privacy": Privacy.RECORD, "feedback": Feedback.AFTER_CLIP},
        {"rule": Rule.EQUAL_MEAN, "privacy": Privacy.CLIENT, "feedback": Feedback.THEN_CLIP},
        {"encoding": Encoding.TOP_K, "feedback": Feedback.AFTER_CLIP},
        {"rule": Rule.FEDEX, "encoding": Encoding.INT8},
    ],
)
def test_sound_combinations_pass(choices):
    check_combination(Combination(**choices))


def test_all_reasons_are_told_at_once():
    worst = Combination(
        Rule.STACKED, Secrecy.SECURE, Privacy.CLIENT, Encoding.TOP_K, Feedback.AFTER_CLIP
    )
    assert len(find_conflicts(worst)) == 5
    with pytest.raises(InputError) as caught:
        check_combination(worst)
    assert all(reason in str(caught.value) for reason in find_conflicts(worst))


def test_reasons_are_one_sentence_each_and_every_one_is_needed():
    for conflict in CONFLICTS:
        assert conflict.reason.count(".") == 1
        assert conflict.reason.endswith(".")
        assert any(find_conflicts(each) == [conflict.reason] for each in ALL), conflict.reason


def test_the_table_tells_what_the_check_refuses():
    lines = compatibility_table().splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = {}
    for line in lines[2 : lines.index("")]:
        row, *values = [cell.strip() for cell in line.strip("|").split("|")]
        cells.update(
            {(row, column): value for column, value in zip(header[1:], values, strict=True)}
        )
    assert cells["Krum", "secure aggregation"] == "no (2)"
    assert cells["equal mean", "secure aggregation"] == "yes"
    assert cells["fixed point", "secure aggregation"] == "yes"
    assert cells["separate means of A and B", "record-level privacy"] == "no (1)"
    assert cells["top-k", "top-k"] == ""
    told = " ".join(cells.values())
    for number, conflict in enumerate(CONFLICTS, 1):
        assert f"{number}. {conflict.reason}" in lines
        assert str(number) in told
