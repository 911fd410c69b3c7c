"""The comparison of rules: errors that are told apart, and bytes that were counted by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

from mutirao.federated.aggregation.low_rank import Factors
from mutirao.federated.aggregation.low_rank_comparison import compare_rules
from mutirao.federated.codec import CodecConfig

HEADER = 24
PAGE = Path(__file__).parents[4] / "docs" / "explanation" / "lora-aggregation.md"
INT8 = CodecConfig(format="int8")


def _cohort(ranks, *, share_a=False):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(max(ranks), 40)) / np.sqrt(40)
    layers, starts = {}, {}
    for layer in ("q", "v"):
        layers[layer], starts[layer] = {}, {}
        for number, rank in enumerate(ranks):
            moved = first[:rank] + (0 if share_a else 0.02 * rng.normal(size=(rank, 40)))
            b = 0.02 * rng.normal(size=(30, rank))
            site = f"site{number}"
            layers[layer][site] = Factors(b.astype("f4"), moved.astype("f4"), 16 / rank)
            starts[layer][site] = Factors(np.zeros((30, rank), "f4"), first[:rank].astype("f4"))
    weights = {f"site{number}": 1.0 + number for number in range(len(ranks))}
    return layers, weights, starts


def test_exact_rules_are_exact_and_their_bytes_are_those_of_the_factors():
    layers, weights, _ = _cohort([4, 4, 4])
    report = compare_rules(layers, weights)
    assert sorted(report) == ["fedex", "separate", "stacked"]
    assert report["stacked"].relative_error < 1e-6
    assert report["fedex"].relative_error < 1e-6
    assert report["separate"].relative_error > 0.05
    pair = 4 * 4 * (30 + 40) + 2 * HEADER
    assert {each.bytes_up for each in report.values()} == {2 * 3 * pair}
    assert report["separate"].bytes_down == 2 * 3 * pair
    assert report["stacked"].bytes_down == 2 * 3 * (4 * 12 * 70 + 2 * HEADER)
    assert report["fedex"].bytes_down == 2 * 3 * (pair + 4 * 8 * 70 + 2 * HEADER)


def test_mixed_ranks_have_no_fedex():
    layers, weights, _ = _cohort([2, 8])
    report = compare_rules(layers, weights)
    assert sorted(report) == ["separate", "stacked"]
    assert report["stacked"].relative_error < 1e-6
    assert report["separate"].relative_error > 0.05
    assert report["stacked"].bytes_down == 2 * 2 * (4 * 10 * 70 + 2 * HEADER)


def test_with_a_shared_half_travels_and_all_rules_are_exact():
    layers, weights, _ = _cohort([4, 4], share_a=True)
    report = compare_rules(layers, weights)
    assert report["ffa"].bytes_up == report["ffa"].bytes_down == 2 * 2 * (4 * 4 * 30 + HEADER)
    assert max(each.relative_error for each in report.values()) < 1e-6


def test_what_the_codec_loses_is_less_when_differences_travel():
    layers, weights, starts = _cohort([4, 4, 4])
    whole = compare_rules(layers, weights, upload=INT8)
    apart = compare_rules(layers, weights, upload=INT8, starts=starts)
    assert 1e-5 < apart["stacked"].relative_error < whole["stacked"].relative_error
    # The residual is of what arrived, so both exact rules end at the same place.
    assert apart["fedex"].relative_error == pytest.approx(apart["stacked"].relative_error, 1e-3)


def test_the_page_shows_what_its_program_prints(capsys):
    page = PAGE.read_text(encoding="utf-8")
    program, shown = (
        re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "text")
    )
    exec(program, {})
    printed = capsys.readouterr().out.splitlines()
    for line, wanted in zip(printed, shown.splitlines(), strict=True):
        *names, error, up, down = line.split()
        *wanted_names, wanted_error, wanted_up, wanted_down = wanted.split()
        assert (names, up, down) == (wanted_names, wanted_up, wanted_down)
        # One digit is shown, and the last bits of linear algebra differ between machines.
        assert 0.5 <= float(error) / float(wanted_error) <= 2
