"""The sweep in small: what a kill leaves is gone on with, to the same weights and rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import bench_precision
from precision import rounding, training
from precision.rounding import Rounding
from precision.text import Text
from precision.training import Run, train_run

WANTED = [Rounding("rtn", "g32", 3), Rounding("gptq", "channel", 2)]
RUN = Run("64", 0, (3, 6), compute_dtype="float32")


class _KilledError(Exception):
    pass


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Random words, not real text."""
    monkeypatch.setattr(training, "WINDOWS", 4)
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 1)
    monkeypatch.setattr(rounding, "HELDOUT_WINDOWS", 8)
    monkeypatch.setattr(rounding, "CALIBRATION_WINDOWS", 4)
    draw = np.random.default_rng(0)
    for kind in ("english", "python"):
        for side in ("train", "heldout"):
            words = draw.choice([b"fever ", b"cough ", b"return ", b"x = 1\n"], size=2000)
            np.save(tmp_path / f"{kind}-{side}.npy", np.frombuffer(b"".join(words), np.uint8))
    return Text(tmp_path)


def _rows(folder):
    return bench_precision.read_rows(folder / "rows" / "d64-s0.jsonl")


def test_a_killed_run_ends_with_the_same_weights_and_rows(text, tmp_path):
    bench_precision.sweep_run(tmp_path / "whole", RUN, text, WANTED)

    def kill(step):
        if step == 5:
            raise _KilledError

    with pytest.raises(_KilledError):
        list(train_run(tmp_path / "cut" / "runs", RUN, text, kill))
    rows = tmp_path / "cut" / "rows" / "d64-s0.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"run": "d64-s0", "num_tok')  # a row that was being written
    bench_precision.sweep_run(tmp_path / "cut", RUN, text, WANTED)
    for name in ("3-decayed", "3-stable", "6-decayed", "6-stable"):
        first, second = (
            torch.load(tmp_path / which / "runs" / "d64-s0" / f"{name}.pt")
            for which in ("whole", "cut")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert _rows(tmp_path / "cut") == _rows(tmp_path / "whole")
    assert len(_rows(tmp_path / "cut")) == 2 * 2 + 2  # the trunk's states are rounded to nearest
    before = rows.read_bytes()
    bench_precision.sweep_run(tmp_path / "cut", RUN, text, WANTED)
    assert rows.read_bytes() == before


def test_a_branch_ends_elsewhere_than_the_trunk(text, tmp_path):
    states = {
        (steps, decayed): torch.load(path)
        for steps, decayed, path in train_run(tmp_path / "runs", RUN, text)
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[6, True][name], states[6, False][name])


def test_training_in_few_bits_rounds_forward_and_not_backward(text, tmp_path):
    model = training.make_model(training.SIZES["64"], 0)
    layer = model.model.layers[0].mlp.up_proj
    plain = layer.weight.detach().clone()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with training.rounded_weights(model, 3):
        y = layer(x)
        y.sum().backward()
    step = plain.abs().amax(dim=1, keepdim=True) / 3
    torch.testing.assert_close(y, x @ ((plain / step).round() * step).T)
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(plain))
    assert "forward" not in vars(layer)


def test_rows_say_what_was_measured(text, tmp_path):
    bench_precision.sweep_run(tmp_path, RUN, text, WANTED[:1])
    row = json.loads((tmp_path / "rows" / "d64-s0.jsonl").read_text().splitlines()[0])
    assert row["num_parameters"] == 212_992
    assert row["num_tokens"] == 3 * training.STEP_TOKENS
    assert row["standard_error"] > 0
