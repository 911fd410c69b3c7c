"""The matrix: every combination has a verdict, and each unsound one says why."""

import itertools

import pytest

from mutirao.errors import InputError
from mutirao.federated.aggregation.compatibility import (
    CONFLICTS,
    Combination,
    Encoding,
    Feedback,
    Privacy,
    Rule,
    Secrecy,
    check_combination,
    check_plan,
    compatibility_table,
    find_conflicts,
    plan_combination,
)
from mutirao.federated.codec import CodecConfig
from mutirao.federated.plan import FederatedConfig, Plan, PrivacyConfig, SecureConfig
from mutirao.train.config import PrivateConfig
from mutirao.tune.config import LoRAConfig

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
    if each.secrecy is Secrecy.SECURE and each.rule is Rule.TOKEN_MEAN:
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
        (
            {"secrecy": Secrecy.SECURE, "encoding": Encoding.FIXED_POINT},
            "tell a site's size",
        ),
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
        {
            "rule": Rule.EQUAL_MEAN,
            "secrecy": Secrecy.SECURE,
            "encoding": Encoding.FIXED_POINT,
        },
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


SECURE = {"secure": SecureConfig(), "weighting": "equal"}
PRIVACY = PrivacyConfig(
    epsilon=4.0,
    delta=1e-5,
    training=PrivateConfig(num_units=100, units_per_step=10, noise_multiplier=1.0),
)
TRAINED_A = LoRAConfig(freeze_a=False)


def _plan(lora=None, **federated):
    return Plan(model_sha256="0" * 64, lora=lora, federated=FederatedConfig(**federated))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (_plan(), Combination()),
        (_plan(LoRAConfig()), Combination()),
        (_plan(weighting="equal"), Combination(Rule.EQUAL_MEAN)),
        (_plan(TRAINED_A), Combination(Rule.SEPARATE_FACTOR_MEANS)),
        (
            _plan(**SECURE),
            Combination(Rule.EQUAL_MEAN, Secrecy.SECURE, encoding=Encoding.FIXED_POINT),
        ),
        (
            _plan(upload=CodecConfig(format="bf16", keep_one_in=4), error_feedback=True),
            Combination(encoding=Encoding.TOP_K, feedback=Feedback.AFTER_CLIP),
        ),
        (_plan(TRAINED_A, aggregation="fedex"), Combination(Rule.FEDEX)),
        (_plan(aggregation="krum"), Combination(Rule.KRUM)),
        (_plan(privacy=PRIVACY), Combination(privacy=Privacy.RECORD)),
    ],
)
def test_a_plan_says_what_it_combines(plan, expected):
    assert plan_combination(plan) == expected


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (_plan(secure=SecureConfig()), "tell a site's size"),
        (_plan(privacy=PRIVACY), "Token counts tell"),
        (_plan(TRAINED_A, aggregation="fedex", privacy=PRIVACY), "Token counts tell"),
        (_plan(TRAINED_A), "is not the mean of the products"),
        (_plan(TRAINED_A, aggregation="separate", privacy=PRIVACY), "Token counts tell"),
        (_plan(**SECURE, error_feedback=True), "not built for secure"),
        (_plan(**SECURE, max_update_norm=1.0), "cannot be checked under secure"),
        (_plan(**SECURE, aggregation="median"), "single updates"),
        (_plan(quorum=6), "quorum=6 is more than the 5 sites"),
        (_plan(turns=6), "turns=6 is more than the 5 sites"),
        (_plan(turns=2, quorum=3), "quorum=3 is more than the 2 sites of a turn"),
        (_plan(turns=2, aggregation="krum"), "with 2 sites"),
        (_plan(TRAINED_A, turns=2, aggregation="stacked"), "turns is not built for aggregation"),
        (_plan(**SECURE, turns=2), "turns is not built for secure aggregation"),
        (_plan(secure=SecureConfig(threshold=6), weighting="equal"), "at least 6 sites"),
        (_plan(aggregation="krum", num_faulty=2), "num_faulty=2"),
        (_plan(aggregation="krum", quorum=4), "with 4 sites"),
        (_plan(aggregation="trimmed_mean", num_faulty=3), "num_trimmed=3"),
    ],
)
def test_an_unsound_plan_is_refused(plan, words):
    with pytest.raises(InputError, match=words):
        check_plan(plan, 5)


@pytest.mark.parametrize(
    "plan",
    [
        _plan(),
        _plan(**SECURE),
        _plan(**SECURE, privacy=PRIVACY),
        _plan(TRAINED_A, aggregation="separate"),
        _plan(TRAINED_A, aggregation="stacked"),
        _plan(aggregation="krum"),
        _plan(aggregation="median", privacy=PRIVACY),
        _plan(quorum=3, error_feedback=True),
        _plan(turns=5),
        _plan(turns=2, quorum=2, aggregation="median", privacy=PRIVACY),
    ],
)
def test_sound_plans_pass(plan):
    check_plan(plan, 5)


def test_two_sites_are_too_few_for_secure_aggregation():
    with pytest.raises(InputError, match="at least 3 sites, and the run has 2"):
        check_plan(_plan(**SECURE), 2)
