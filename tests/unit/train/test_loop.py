"""The loop learns, follows one schedule over rounds, and is repeatable."""

import pytest
import torch

from mutirao.data.tokenization import Example
from mutirao.errors import DataError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train import loop
from mutirao.train.config import TrainConfig
from mutirao.train.loop import learning_rate_at, train

EXAMPLES = [Example(tuple(range(5, 5 + n)), 0) for n in (4, 9, 16, 7, 12)]
CONFIG = TrainConfig(learning_rate=1e-2, warmup_tokens=0, tokens_per_step=32)


def test_learning_rate_rises_falls_and_stays():
    config = TrainConfig(learning_rate=1.0, warmup_tokens=100, final_learning_rate_share=0.1)
    assert learning_rate_at(config, 50, 1100) == pytest.approx(0.5)
    assert learning_rate_at(config, 100, 1100) == pytest.approx(1.0)
    assert learning_rate_at(config, 600, 1100) == pytest.approx(0.55)
    assert learning_rate_at(config, 1100, 1100) == pytest.approx(0.1)
    assert learning_rate_at(config, 9999, 1100) == pytest.approx(0.1)


def test_training_lowers_the_loss(tiny_model_directory):
    model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
    first = train(model, EXAMPLES, CONFIG, pad_id=0, seed=0)
    for number in range(1, 15):
        last = train(
            model, EXAMPLES, CONFIG, pad_id=0, seed=number, optimizer_state=first.optimizer_state
        )
    assert last.loss < 0.5 * first.loss
    assert last.num_tokens == sum(len(example.ids) for example in EXAMPLES)


def test_training_repeats_to_the_bit(tiny_model_directory):
    def once():
        model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
        train(model, EXAMPLES, CONFIG, pad_id=0, seed=0)
        return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    assert torch.equal(once(), once())


def test_context_is_not_learned(tiny_model_directory):
    model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
    all_context = [Example((5, 6, 7), 3)]
    with pytest.raises(DataError, match="no training example has a token"):
        train(model, all_context, CONFIG, pad_id=0, seed=0)


@pytest.mark.parametrize(
    ("capability", "machine", "is_slow"),
    [("AVX2", "x86_64", True), ("AVX512", "x86_64", False), ("DEFAULT", "aarch64", False)],
)
def test_slow_bfloat16_is_avoided_and_said_once(monkeypatch, caplog, capability, machine, is_slow):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(loop.logger, "disabled", False)
    loop._warn_of_slow_bfloat16.cache_clear()
    model = torch.nn.Linear(1, 1)
    with loop.autocast(model, TrainConfig(compute_dtype="float32")):
        assert model(torch.ones(1, 1)).dtype == torch.float32
    with loop.autocast(model, TrainConfig()):
        expected = torch.float32 if is_slow else torch.bfloat16
        assert model(torch.ones(1, 1)).dtype == expected
    assert "bfloat16" not in caplog.text
    for _ in range(2):
        loop.autocast(model, TrainConfig(compute_dtype="bfloat16"))
    assert caplog.text.count("bfloat16 can take ten times as long") == int(is_slow)
    assert not loop.is_half_precision(TrainConfig(compute_dtype="float32"), "cuda")
    assert loop.is_half_precision(TrainConfig(), "cuda")
    loop._warn_of_slow_bfloat16.cache_clear()
