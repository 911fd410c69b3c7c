"""Packed text: windows depend on the step alone, rounds join up, and every token is learned."""

import numpy as np
import pytest
import torch

from mutirao.errors import ArtifactError, DataError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.config import TrainConfig
from mutirao.train.packed import (
    backward_windows,
    check_vocabulary,
    packed_loss,
    read_packed,
    take_windows,
    train_packed,
)

TOKENS = ((np.arange(500) * 7) % 20).astype(np.uint16)
CONFIG = TrainConfig(
    learning_rate=1e-2,
    warmup_tokens=0,
    tokens_per_step=64,
    max_tokens_per_example=16,
    compute_dtype="float32",
)


@pytest.fixture
def model(tiny_model_directory):
    return load_causal_lm(tiny_model_directory, dtype="float32")[0].requires_grad_(True)


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_windows_are_stretches_of_the_text_and_follow_from_seed_name_and_step():
    def take(**changes):
        return take_windows(TOKENS, 4, 17, **{"seed": 1, "name": "north", "step": 3, **changes})

    windows = take()
    assert windows.shape == (4, 17)
    assert torch.equal(windows, take())
    assert all(
        not torch.equal(windows, take(**change))
        for change in ({"seed": 2}, {"name": "south"}, {"step": 4})
    )
    assert torch.equal((windows[:, 1:] - windows[:, :-1]) % 20, torch.full((4, 16), 7))
    assert torch.equal(
        take_windows(TOKENS, 2, 500, seed=0, name="n", step=0)[0][:5],
        torch.tensor(TOKENS[:5].astype(np.int64)),
    )
    with pytest.raises(DataError, match="too few"):
        take_windows(TOKENS, 1, 501, seed=0, name="n", step=0)


def test_rounds_join_up_to_the_bit(tiny_model_directory):
    def run(cuts):
        model = load_causal_lm(tiny_model_directory, dtype="float32")[0].requires_grad_(True)
        state, start = None, 0
        for num_steps in cuts:
            result = train_packed(
                model,
                TOKENS,
                CONFIG,
                seed=0,
                name="n",
                num_steps=num_steps,
                start_step=start,
                total_steps=6,
                optimizer_state=state,
            )
            state, start = result.optimizer_state, start + num_steps
        return flat(model)

    assert torch.equal(run([6]), run([1, 3, 2]))


def test_training_learns_and_counts(model):
    before, num_scored = packed_loss(model, TOKENS, CONFIG, max_tokens=160)
    assert num_scored == 160
    told = []
    result = train_packed(
        model, TOKENS, CONFIG, seed=0, name="n", num_steps=30, on_step=lambda n, _: told.append(n)
    )
    assert (result.num_tokens, result.num_steps, told[-1]) == (30 * 64, 30, 30 * 64)
    assert packed_loss(model, TOKENS, CONFIG, max_tokens=160)[0] < 0.3 * before


def test_loss_and_gradient_are_those_of_the_plain_formula_however_a_step_is_cut(model):
    ids = take_windows(TOKENS, 4, 17, seed=0, name="n", step=0)
    logits = model(input_ids=ids).logits[:, :-1].reshape(-1, model.config.vocab_size)
    expected = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].reshape(-1))
    expected.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    for tokens_per_pass in (16, 4096):
        model.zero_grad()
        config = CONFIG.model_copy(update={"tokens_per_pass": tokens_per_pass})
        loss_sum = backward_windows(model, ids, config, num_learned=64)
        assert loss_sum / 64 == pytest.approx(expected.item(), rel=1e-5)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_a_frozen_head_gives_the_same_loss(model):
    ids = take_windows(TOKENS, 2, 17, seed=0, name="n", step=0)
    plain = backward_windows(model, ids, CONFIG, num_learned=32)
    model.get_output_embeddings().weight.requires_grad_(False)
    assert backward_windows(model, ids, CONFIG, num_learned=32) == pytest.approx(plain, rel=1e-5)


def test_files_that_are_not_token_ids_are_refused(tmp_path):
    for name, array in (("a", np.zeros((2, 2), np.uint16)), ("b", np.zeros(3, np.float32))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ArtifactError, match="one row of uint16 or uint32"):
            read_packed(tmp_path / f"{name}.npy")
    np.save(tmp_path / "p.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_packed(tmp_path / "p.npy")
    np.save(tmp_path / "good.npy", TOKENS)
    tokens = read_packed(tmp_path / "good.npy")
    check_vocabulary(tokens, 20, "good")
    with pytest.raises(DataError, match="token 19"):
        check_vocabulary(tokens, 19, "good")
    with pytest.raises(DataError, match="no held-out text"):
        packed_loss(torch.nn.Linear(1, 1), TOKENS[:1], CONFIG, max_tokens=5)
