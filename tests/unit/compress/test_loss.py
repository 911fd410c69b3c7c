from __future__ import annotations

import math

import pytest
import torch

from mutirao.compress.config import TextConfig
from mutirao.compress.loss import measure_loss
from mutirao.compress.windows import read_windows
from mutirao.errors import DataError, InputError
from mutirao.formats.huggingface import load_causal_lm

IDS = torch.arange(5, 5 + 5 * 16).reshape(5, 16) % 200


@pytest.fixture
def models(tiny_model_directory):
    first = load_causal_lm(tiny_model_directory, dtype="float32")[0]
    second = load_causal_lm(tiny_model_directory, dtype="float32")[0]
    with torch.no_grad():
        for parameter in second.model.layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(0)) * 0.05)
    return first, second


@torch.no_grad()
def test_agrees_with_plain_cross_entropy_and_divergence(models):
    found = measure_loss(*models, IDS)
    first, second = (
        model(input_ids=IDS[:, :-1]).logits.double().log_softmax(dim=2) for model in models
    )
    losses = [-each.gather(2, IDS[:, 1:, None])[..., 0].mean(dim=1) for each in (first, second)]
    rises = losses[1] - losses[0]
    assert found.original == pytest.approx(float(losses[0].mean()), abs=1e-5)
    assert found.rise == pytest.approx(float(rises.mean()), abs=1e-5)
    assert found.standard_error == pytest.approx(float(rises.std()) / math.sqrt(5), abs=1e-5)
    divergence = (first.exp() * (first - second)).sum(dim=2).mean()
    assert found.divergence == pytest.approx(float(divergence), abs=1e-5)
    assert found.num_tokens == 5 * 15


def test_a_model_beside_itself_is_no_worse(models):
    found = measure_loss(models[0], models[0], IDS)
    assert found.rise == 0
    assert found.divergence == pytest.approx(0, abs=1e-6)


class _Letters:
    eos_id = 0
    context_tokens = 64

    def encode(self, text):
        return [ord(letter) for letter in text]


def test_what_is_measured_on_is_never_looked_at(tmp_path):
    (tmp_path / "text.txt").write_text("".join(chr(33 + i % 90) for i in range(4000)))
    config = TextConfig(window_tokens=16, calibration_windows=20, heldout_windows=10)
    windows = read_windows(tmp_path / "text.txt", _Letters(), config)
    assert windows.calibration.shape == (20, 16)
    assert windows.heldout.shape == (10, 16)
    ids = [33 + i % 90 for i in range(4000)] + [0]
    boundary = len(ids) - int(len(ids) * 0.2)
    tail = torch.tensor(ids[boundary:])
    assert torch.equal(windows.heldout[0], tail[:16])
    assert torch.equal(windows.heldout[-1], tail[-16:])
    assert torch.equal(windows.calibration[-1], torch.tensor(ids[boundary - 16 : boundary]))


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    config = TextConfig(window_tokens=16, calibration_windows=20, heldout_windows=10)
    with pytest.raises(DataError, match=r"has 10 tokens \(at least 800 are needed"):
        read_windows(tmp_path / "text.txt", _Letters(), config)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text.docx").write_text("x")
    with pytest.raises(DataError, match="of another kind"):
        read_windows(tmp_path / "text.docx", _Letters(), TextConfig(window_tokens=16))


def test_windows_longer_than_the_model_takes_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("long enough " * 1000)
    config = TextConfig(window_tokens=65, calibration_windows=2, heldout_windows=2)
    with pytest.raises(InputError, match=r"65 tokens .*at most 64"):
        read_windows(tmp_path / "text.txt", _Letters(), config)
