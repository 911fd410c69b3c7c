"""DP-SGD: clipping per unit, noise as promised, nothing seen of who took part."""

import logging
import math
import secrets

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from toy_units import (
    adapted_model,
    count_only,
    language_units,
    squared_error,
    toy_model,
    toy_units,
)

from mutirao.errors import DataError, InputError, PrivacyBudgetError
from mutirao.train.accountant import PrivacyBudget
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.private import (
    clip_gradient,
    example_loss,
    fixed_bytes_for_tests_only,
    group_units,
    noisy_mean,
    normal_draws,
    sample_units,
    train_private,
)
from mutirao.train.unit_gradients import unit_gradients

TRAIN = TrainConfig(learning_rate=1e-2, warmup_tokens=0, tokens_per_step=32)
PRIVATE = PrivateConfig(num_units=4, units_per_step=2.0, noise_multiplier=0.0, max_unit_norm=0.5)


def train_toy(model, units, private, *, seed=0, num_steps=1, budget=None, **others):
    return train_private(
        model,
        units,
        squared_error,
        TRAIN,
        private,
        budget=budget or count_only(),
        num_steps=num_steps,
        draw_bytes=fixed_bytes_for_tests_only(seed),
        **others,
    )


def test_clipping_and_mean_against_a_loop_written_out():
    model, units = toy_model(), toy_units()
    weight = model.weight.detach().double().numpy()[0]
    bias = float(model.bias.detach())
    total, norms = np.zeros(4), []
    for unit in units:
        gradient = np.zeros(4)
        for x, y in unit:
            slope = 2 * (weight @ x.double().numpy() + bias - float(y))
            gradient += slope * np.append(x.double().numpy(), 1.0)
        norms.append(math.sqrt(sum(value * value for value in gradient)))
        total += gradient * min(1.0, PRIVATE.max_unit_norm / norms[-1])
    assert min(norms) < PRIVATE.max_unit_norm < max(norms)  # so that the test shows both
    gradients = unit_gradients(model, units, squared_error, PRIVATE)
    mean_P, num_ignored = noisy_mean(gradients, 4, PRIVATE, secrets.token_bytes)
    assert num_ignored == 0
    # Divided by the two units expected, not by the four that came.
    np.testing.assert_allclose(mean_P.numpy(), total / 2.0, rtol=1e-5)


def test_the_optimizer_gets_the_mean_of_what_was_sampled():
    """AdamW's first moment after one step is (1 - β1) times the gradient that it got."""
    everybody = PRIVATE.model_copy(update={"units_per_step": 4.0})
    model, units = toy_model(), toy_units()
    gradients = list(unit_gradients(model, units, squared_error, everybody))
    expected_P, _ = noisy_mean(gradients, 4, everybody, secrets.token_bytes)
    state = train_toy(model, units, everybody).optimizer_state["state"]
    got_P = torch.cat([state[0]["exp_avg"].reshape(-1), state[1]["exp_avg"]]) / (1 - TRAIN.beta1)
    torch.testing.assert_close(got_P.double(), expected_P, rtol=1e-5, atol=1e-7)


def test_short_gradients_stay_and_long_ones_end_at_the_norm():
    short, long = torch.tensor([0.3, 0.4], dtype=torch.float64), torch.full((9,), 1e30).double()
    assert torch.equal(clip_gradient(short, 1.0), short)
    assert float(clip_gradient(long, 2.0).norm()) == pytest.approx(2.0, rel=1e-12)
    assert torch.equal(clip_gradient(torch.zeros(2), 1.0), torch.zeros(2))
    assert clip_gradient(torch.tensor([1.0, math.nan]), 1.0) is None


def test_a_unit_moves_the_sum_by_the_clipping_norm_at_most():
    model = toy_model()
    large = [(1e6 * x, 1e6 * y) for x, y in toy_units((5,))[0]]
    config = PRIVATE.model_copy(update={"units_per_step": 1.0})
    gradients = unit_gradients(model, [large], squared_error, config)
    mean_P, _ = noisy_mean(gradients, 4, config, secrets.token_bytes)
    assert float(mean_P.norm()) == pytest.approx(config.max_unit_norm, rel=1e-9)


def test_noise_has_the_promised_size_and_shape():
    config = PrivateConfig(num_units=10, units_per_step=4, noise_multiplier=1.5, max_unit_norm=0.2)
    draw = fixed_bytes_for_tests_only(3)
    mean_P, _ = noisy_mean([], 200_001, config, draw)
    noise = mean_P.numpy() / (1.5 * 0.2 / 4)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert noise.std() == pytest.approx(1.0, abs=0.01)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01
    half = 100_001  # the two halves come in pairs from the same bits
    assert abs(np.corrcoef(noise[: half - 1], noise[half:])[0, 1]) < 0.015
    again, _ = noisy_mean([], 200_001, config, draw)
    assert abs(np.corrcoef(noise, again.numpy())[0, 1]) < 0.01


def test_noise_from_the_extremes_of_the_bits_is_finite():
    assert np.isfinite(normal_draws(5, lambda num: b"\x00" * num)).all()
    assert np.isfinite(normal_draws(5, lambda num: b"\xff" * num)).all()
    assert normal_draws(0, secrets.token_bytes).size == 0


def test_pytorchs_own_generator_is_no_source_of_secrets():
    """Why it is not used: seeds that agree in 32 bits give the same noise."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (7, 7 + 2**32))
    assert torch.equal(torch.randn(100, generator=first), torch.randn(100, generator=second))


def test_noise_is_new_every_time():
    assert not np.array_equal(
        normal_draws(8, secrets.token_bytes), normal_draws(8, secrets.token_bytes)
    )


def test_units_are_sampled_independently():
    draw = fixed_bytes_for_tests_only(1)
    taken = np.zeros((4000, 5))
    for row in taken:
        row[sample_units(5, 0.3, draw)] = 1
    assert np.all(np.abs(taken.mean(axis=0) - 0.3) < 0.03)
    assert np.all(np.abs(np.corrcoef(taken.T) - np.eye(5)) < 0.06)
    sizes = np.bincount(taken.sum(axis=1).astype(int), minlength=6) / 4000
    np.testing.assert_allclose(sizes, stats.binom.pmf(range(6), 5, 0.3), atol=0.03)
    assert sample_units(5, 1.0, lambda num: b"\xff" * num) == [0, 1, 2, 3, 4]
    assert sample_units(0, 0.5, draw) == []


def test_a_step_without_units_is_a_noisy_step_that_is_paid_for():
    config = PrivateConfig(num_units=10**9, units_per_step=1.0, noise_multiplier=2.0)
    model, budget = toy_model(), count_only()
    before = model.weight.detach().clone()
    result = train_toy(model, toy_units(), config, budget=budget, num_steps=3)
    assert not torch.equal(model.weight, before)
    assert result.num_steps == budget.phases[0].num_steps == 3


def test_training_an_adapter_learns_and_changes_nothing_else(tiny_model_directory):
    model = adapted_model(tiny_model_directory, freeze_a=True)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    config = PrivateConfig(num_units=5, units_per_step=4.0, noise_multiplier=0.02)
    loss = example_loss(0)
    examples = [example for unit in language_units() for example in unit]

    def total():
        with torch.no_grad():
            return float(loss(model, examples))

    before = total()
    result = train_private(
        model,
        language_units(),
        loss,
        TRAIN,
        config.model_copy(update={"is_vectorized": True}),
        budget=count_only(),
        num_steps=30,
        draw_bytes=fixed_bytes_for_tests_only(0),
    )
    assert total() < 0.9 * before
    assert result.num_ignored == 0
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_run_can_be_cut_into_calls():
    def weights(calls):
        model, state, draw, done = toy_model(), None, fixed_bytes_for_tests_only(5), 0
        for num_steps in calls:
            state = train_private(
                model,
                toy_units(),
                squared_error,
                TRAIN,
                PRIVATE.model_copy(update={"noise_multiplier": 1.0}),
                budget=count_only(),
                num_steps=num_steps,
                start_step=done,
                total_steps=6,
                optimizer_state=state,
                draw_bytes=draw,
            ).optimizer_state
            done += num_steps
        return model.weight.detach()

    assert torch.equal(weights([6]), weights([1, 2, 3]))


def test_a_run_that_the_budget_does_not_last_for_is_refused_before_it_starts():
    config = PRIVATE.model_copy(update={"noise_multiplier": 2.0})
    budget = PrivacyBudget(2.0, 1e-5)
    affordable = budget.remaining_steps(config.sampling_probability, 2.0)
    assert affordable >= 1
    model = toy_model()
    before = model.weight.detach().clone()
    with pytest.raises(PrivacyBudgetError, match=rf"do not fit .* \(at most {affordable} more\)"):
        train_toy(model, toy_units(), config, budget=budget, num_steps=affordable + 1)
    assert budget.phases == ()
    assert torch.equal(model.weight, before)
    refusal = r"noise multiplier 0 do not fit .* \(at most 0 more\)"
    with pytest.raises(PrivacyBudgetError, match=refusal):
        train_toy(model, toy_units(), PRIVATE, budget=budget)


def test_a_step_is_paid_for_before_it_looks_at_anybody():
    budget, kept = count_only(), []

    def die(model, records):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_private(
            toy_model(),
            toy_units(),
            die,
            TRAIN,
            PrivateConfig(num_units=4, units_per_step=4.0, noise_multiplier=1.0),
            budget=budget,
            num_steps=2,
            on_spend=lambda budget: kept.append(budget.dump()),
        )
    assert [PrivacyBudget.restore(content).phases[0].num_steps for content in kept] == [1]


def test_a_gradient_that_is_not_finite_counts_as_nothing():
    everybody = PrivateConfig(num_units=4, units_per_step=4.0, noise_multiplier=0.0)
    broken = [(torch.tensor([math.inf, 0.0, 0.0]), torch.zeros(1))]
    with_broken, without = toy_model(), toy_model()
    result = train_toy(with_broken, [*toy_units(), broken], everybody, num_steps=2)
    train_toy(without, toy_units(), everybody, num_steps=2)
    assert result.num_ignored == 2
    assert torch.equal(with_broken.weight, without.weight)


class _Counting(nn.Linear):
    """A layer that remembers what it saw."""

    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen = self.seen + x.detach().sum(dim=0)
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)), "layer 1 .* mixes"),
        (nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True)), "layer 0 .* mixes"),
        (_Counting(), "buffer seen changes"),
        (nn.Linear(3, 1).requires_grad_(False), "nothing to train"),
    ],
)
def test_models_that_leak_around_the_noise_are_refused(model, message):
    everybody = PrivateConfig(num_units=4, units_per_step=4.0, noise_multiplier=1.0)
    with pytest.raises(InputError, match=message):
        train_toy(model, toy_units(), everybody)


def test_trained_buffers_are_refused():
    model = toy_model()
    model.register_buffer("scale", torch.ones(1, requires_grad=True))
    with pytest.raises(InputError, match="buffer scale is trained"):
        train_toy(model, toy_units(), PRIVATE)


def test_a_foreign_generator_is_said_loudly(caplog):
    caplog.set_level(logging.WARNING, "mutirao.train.private")
    train_toy(toy_model(), toy_units(), PRIVATE)
    assert "NOT private" in caplog.text


def test_records_of_a_unit_come_together():
    assert group_units("abcde", ["p", "q", "p", "r", "q"]) == [("a", "c"), ("b", "e"), ("d",)]
    with pytest.raises(DataError, match="record 1 has no unit key"):
        group_units("ab", ["p", ""])
    with pytest.raises(DataError, match="2 records came with 1 unit keys"):
        group_units("ab", ["p"])
