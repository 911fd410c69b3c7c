"""Robust rules against brute force, and screens that name the site that is at fault."""

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import InputError, UpdateError
from mutirao.federated.aggregation.robust import (
    ScreenConfig,
    coordinate_median,
    cosines_to_others,
    krum_scores,
    multi_krum,
    screen_updates,
    select_krum,
    trimmed_mean,
)

SHAPES = {"a": (3, 4), "b": (5,)}


def _updates(num_sites, seed=0, common=1.0):
    rng = np.random.default_rng(seed)
    shared = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return {
        f"s{number}": {
            name: (common * shared[name] + 0.3 * rng.normal(size=shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        for number in range(num_sites)
    }


def _scaled(update, factor):
    return {name: (each * factor).astype(np.float32) for name, each in update.items()}


def _flat(update):
    return [float(value) for name in sorted(update) for value in update[name].reshape(-1)]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_median_of_each_coordinate(num_sites, seed):
    updates = _updates(num_sites, seed)
    expected = [statistics.median(each) for each in zip(*map(_flat, updates.values()), strict=True)]
    assert _flat(coordinate_median(updates)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_trimmed", [0, 1, 2])
def test_trimmed_mean_of_each_coordinate(num_trimmed):
    updates = _updates(6)
    expected = [
        statistics.fmean(sorted(each)[num_trimmed : 6 - num_trimmed])
        for each in zip(*map(_flat, updates.values()), strict=True)
    ]
    assert _flat(trimmed_mean(updates, num_trimmed)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def _brute_scores(updates, num_faulty):
    scores = {}
    for site, update in updates.items():
        others = [each for other, each in updates.items() if other != site]
        count = len(updates) - num_faulty - 2
        scores[site] = min(
            sum(
                sum((x - y) ** 2 for x, y in zip(_flat(update), _flat(other), strict=True))
                for other in group
            )
            for group in itertools.combinations(others, count)
        )
    return scores


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 8), st.data(), st.integers(0, 10**6))
def test_krum_by_brute_force(num_sites, data, seed):
    num_faulty = data.draw(st.integers(0, (num_sites - 3) // 2))
    updates = _updates(num_sites, seed)
    expected = _brute_scores(updates, num_faulty)
    assert krum_scores(updates, num_faulty) == pytest.approx(expected, rel=1e-9)
    num_selected = data.draw(st.integers(1, num_sites - num_faulty))
    order = sorted(expected, key=lambda site: (round(expected[site], 9), site))
    selected = select_krum(updates, num_faulty, num_selected)
    assert selected == order[:num_selected]
    found = _flat(multi_krum(updates, num_faulty, num_selected))
    chosen = [_flat(updates[site]) for site in selected]
    assert found == pytest.approx(np.mean(chosen, axis=0), rel=1e-5, abs=1e-6)


def test_gross_faults_do_not_move_the_result():
    updates = _updates(7)
    honest = np.mean([_flat(each) for each in updates.values()], axis=0)
    for site in ("s1", "s5"):
        updates[site] = _scaled(updates[site], -1000.0)
    for result in (coordinate_median(updates), trimmed_mean(updates, 2), multi_krum(updates, 2, 4)):
        assert np.abs(np.array(_flat(result)) - honest).max() < 0.8
    assert not {"s1", "s5"} & set(select_krum(updates, 2, 5))


def test_equals_are_chosen_by_name_whatever_the_order():
    same = _updates(1)["s0"]
    updates = dict.fromkeys(("d", "b", "a", "c"), same)
    assert select_krum(updates, 0, 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda u: trimmed_mean(u, 2), "num_trimmed=2"),
        (lambda u: trimmed_mean(u, -1), "num_trimmed=-1"),
        (lambda u: krum_scores(u, 1), "num_faulty=1"),
        (lambda u: krum_scores(u, -1), "num_faulty=-1"),
        (lambda u: multi_krum(u, 0, 5), "num_selected=5"),
        (lambda u: multi_krum(u, 0, 0), "num_selected=0"),
    ],
)
def test_impossible_numbers_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call(_updates(4))


@pytest.mark.parametrize("rule", [coordinate_median, lambda u: krum_scores(u, 0), screen_updates])
def test_updates_must_be_of_one_kind(rule):
    updates = _updates(4)
    updates["s2"] = {"a": updates["s2"]["a"]}
    with pytest.raises(UpdateError, match="s0 and s2"):
        rule(updates)


@pytest.mark.parametrize("rule", [coordinate_median, screen_updates, lambda u: multi_krum(u, 0)])
def test_a_round_without_updates_is_refused(rule):
    with pytest.raises((UpdateError, InputError), match=r"no site|0 sites"):
        rule({})


def test_rules_refuse_what_is_not_finite():
    updates = _updates(4)
    updates["s3"]["b"][1] = np.nan
    with pytest.raises(UpdateError, match="site s3 sent tensor 'b'"):
        coordinate_median(updates)


def test_honest_sites_pass_the_screens():
    assert screen_updates(_updates(5)) == []
    assert screen_updates(_updates(5, common=0.0), ScreenConfig(min_cosine=-0.9)) == []


def test_each_fault_is_named_with_its_reason():
    updates = _updates(8)
    updates["s1"]["b"][2] = np.inf
    updates["s3"] = _scaled(updates["s3"], 1e6)
    updates["s6"] = _scaled(updates["s6"], -1.0)
    faults = screen_updates(updates)
    assert [fault.site for fault in faults] == ["s1", "s3", "s6"]
    for fault, words in zip(faults, ("not finite", "median norm", "against"), strict=True):
        assert words in fault.reason
        assert f"site {fault.site}" in fault.reason


def test_a_large_flipped_update_does_not_make_the_others_look_wrong():
    updates = _updates(3)
    updates["s2"] = _scaled(updates["s2"], -9.0)
    config = ScreenConfig(max_norm_ratio=None)
    assert [fault.site for fault in screen_updates(updates, config)] == ["s2"]


def test_an_absolute_bound_on_the_norm_holds_for_a_single_site():
    update = {"one": _updates(1)["s0"]}
    (fault,) = screen_updates(update, ScreenConfig(max_norm=0.1))
    assert "expected at most 0.1, the agreed bound" in fault.reason
    assert screen_updates(update) == []


def test_of_two_that_disagree_neither_is_named():
    updates = _updates(2)
    updates["s1"] = _scaled(updates["s0"], -1.0)
    assert screen_updates(updates) == []


def test_zeros_have_no_direction():
    updates = _updates(4)
    updates["s2"] = _scaled(updates["s2"], 0.0)
    assert "s2" not in cosines_to_others(updates)
    assert screen_updates(updates) == []
    assert screen_updates(dict.fromkeys("abc", updates["s2"])) == []


def test_cosines_by_hand():
    updates = _updates(5)
    directions = {s: np.array(_flat(u)) / np.linalg.norm(_flat(u)) for s, u in updates.items()}
    for site, cosine in cosines_to_others(updates).items():
        others = sum(each for other, each in directions.items() if other != site)
        assert cosine == pytest.approx(directions[site] @ others / np.linalg.norm(others))
