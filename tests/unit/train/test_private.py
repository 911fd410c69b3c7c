"""DP-SGD: clipping per unit, noise as promised, nothing seen of who took part; an audit of it.

The audit asks whether somebody who knows everything but whether one unit took part does
better at telling than the claimed ε allows. It must fail against the real thing, and
succeed where the noise is off or weaker than claimed.
"""

import math
import secrets

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mutirao.config import parse_recipe
from mutirao.data.tokenization import Example
from mutirao.errors import DataError, InputError, RecipeError, ShapeError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.accountant import Phase, PrivacyBudget, epsilon_spent
from mutirao.train.config import TrainConfig
from mutirao.train.private import (
    PrivateConfig,
    clip_gradient,
    example_loss,
    fixed_bytes_for_tests_only,
    group_units,
    noisy_mean,
    normal_draws,
    sample_units,
    train_private,
    unit_gradients,
)
from mutirao.tune.config import LoRAConfig
from mutirao.tune.lora import attach_lora

TRAIN = TrainConfig(learning_rate=1e-2, warmup_tokens=0, tokens_per_step=32)
PRIVATE = PrivateConfig(num_units=4, units_per_step=2.0, noise_multiplier=0.0, max_unit_norm=0.5)


def count_only():
    return PrivacyBudget(math.inf, 1e-5)


def squared_error(model, records):
    """Summed over records (x, y)."""
    x_BI = torch.stack([x for x, _ in records])
    y_B1 = torch.stack([y for _, y in records])
    return ((model(x_BI) - y_B1) ** 2).sum()


def toy_units(num_records=(1, 3, 2, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(3, generator=generator), torch.randn(1, generator=generator))
            for _ in range(num)
        ]
        for num in num_records
    ]


def toy_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


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


@pytest.fixture
def language_units():
    lengths = ((4, 9), (16,), (7, 12, 3), (5,), (11,))
    units = []
    for number, unit in enumerate(lengths):
        first = 5 + 7 * number
        units.append([Example(tuple(range(first, first + n)), 1 + n % 3) for n in unit])
    return units


def _adapted(folder, *, freeze_a):
    model, _ = load_causal_lm(folder, dtype="float32")
    config = LoRAConfig(
        rank=2, alpha=4, target_modules=("q_proj", "down_proj"), num_layers=2, freeze_a=freeze_a
    )
    model = attach_lora(model, config, seed=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:  # B begins at zero, where the gradient of A is zero too
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("freeze_a", [True, False])
@pytest.mark.parametrize("records_per_pass", [1, 3, 100])
def test_the_vectorized_path_is_the_slow_one(
    tiny_model_directory, language_units, freeze_a, records_per_pass
):
    model = _adapted(tiny_model_directory, freeze_a=freeze_a)
    loss = example_loss(0, autocast=False)

    def gradients(**changes):
        config = PRIVATE.model_copy(update=changes)
        return torch.stack(list(unit_gradients(model, language_units, loss, config)))

    slow_UP = gradients(records_per_pass=1)
    fast_UP = gradients(records_per_pass=records_per_pass, is_vectorized=True)
    assert slow_UP.abs().amax(dim=1).min() > 1e-3
    torch.testing.assert_close(fast_UP, slow_UP, rtol=1e-4, atol=1e-5)


def test_the_vectorized_path_knows_biases_and_layers_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 1, bias=False)

        def forward(self, x):
            return self.out(self.layer(torch.tanh(self.layer(x))))

    model, units = Twice().double(), toy_units()
    units = [[(x.double(), y.double()) for x, y in unit] for unit in units]
    slow = list(unit_gradients(model, units, squared_error, PRIVATE))
    fast = list(
        unit_gradients(
            model, units, squared_error, PRIVATE.model_copy(update={"is_vectorized": True})
        )
    )
    torch.testing.assert_close(torch.stack(fast), torch.stack(slow), rtol=1e-12, atol=1e-12)


def test_the_vectorized_path_refuses_what_it_cannot_take_apart():
    fast = PRIVATE.model_copy(update={"is_vectorized": True})
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1))
    with pytest.raises(InputError, match="something else than linear layers"):
        list(unit_gradients(model, toy_units(), squared_error, fast))

    def joined(model, records):
        return model(torch.cat([x for x, _ in records])[None, :3]).sum()

    with pytest.raises(ShapeError, match="one row for each of 7 records"):
        list(unit_gradients(toy_model(), toy_units(), joined, fast))


def test_training_an_adapter_learns_and_changes_nothing_else(tiny_model_directory, language_units):
    model = _adapted(tiny_model_directory, freeze_a=True)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    config = PrivateConfig(num_units=5, units_per_step=4.0, noise_multiplier=0.02)
    loss = example_loss(0)
    examples = [example for unit in language_units for example in unit]

    def total():
        with torch.no_grad():
            return float(loss(model, examples))

    before = total()
    result = train_private(
        model,
        language_units,
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
    with pytest.raises(InputError, match=rf"do not fit .* \(at most {affordable} more\)"):
        train_toy(model, toy_units(), config, budget=budget, num_steps=affordable + 1)
    assert budget.phases == ()
    assert torch.equal(model.weight, before)
    with pytest.raises(InputError, match=r"noise multiplier 0 do not fit .* \(at most 0 more\)"):
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
    train_toy(toy_model(), toy_units(), PRIVATE)
    assert "NOT private" in caplog.text


def test_records_of_a_unit_come_together():
    assert group_units("abcde", ["p", "q", "p", "r", "q"]) == [("a", "c"), ("b", "e"), ("d",)]
    with pytest.raises(DataError, match="record 1 has no unit key"):
        group_units("ab", ["p", ""])
    with pytest.raises(DataError, match="2 records came with 1 unit keys"):
        group_units("ab", ["p"])


def test_more_units_than_there_are_cannot_be_expected():
    with pytest.raises(RecipeError, match="units_per_step=5"):
        parse_recipe(PrivateConfig, {"num_units": 4, "units_per_step": 5, "noise_multiplier": 1.0})


DELTA = 1e-3
NUM_RUNS = 1200
NUM_AUDITED_STEPS = 3
CLAIMED = PrivateConfig(num_units=4, units_per_step=2.0, noise_multiplier=1.2)


def canary_scores(private, with_canary, seed):
    """What an observer of the optimizer's state makes of many runs: the canary's direction.

    The canary's gradient is far beyond the clipping norm along the first weight, which no
    other unit moves. AdamW's first moment holds the steps' noisy gradients, summed.
    """
    config = TRAIN.model_copy(update={"beta1": 0.999})
    others = [[(torch.tensor([0.0, 1.0, 0.5]), torch.ones(1))], [(torch.ones(3), torch.ones(1))]]
    others[1][0][0][0] = 0.0
    canary = [(torch.tensor([1e3, 0.0, 0.0]), torch.full((1,), -1e3))]
    units = [*others, canary] if with_canary else others
    draw = fixed_bytes_for_tests_only(seed)
    scores = []
    for _ in range(NUM_RUNS):
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        result = train_private(
            model,
            units,
            squared_error,
            config,
            private,
            budget=count_only(),
            num_steps=NUM_AUDITED_STEPS,
            draw_bytes=draw,
        )
        scores.append(float(result.optimizer_state["state"][0]["exp_avg"][0, 0]))
    return np.array(scores)


def empirical_epsilon(private):
    """Return a lower bound on ε that holds with 95 % confidence.

    The threshold is chosen on half of the runs and judged on the other half, by Clopper and
    Pearson's intervals of both rates (as Nasr et al. 2021, arXiv:2101.04535).
    """
    member, stranger = (canary_scores(private, there, seed=there) for there in (True, False))
    half = NUM_RUNS // 2

    def bound(threshold, rows):
        hits, alarms = (int((scores[rows] > threshold).sum()) for scores in (member, stranger))
        least_hits = stats.beta.ppf(0.025, hits, half - hits + 1) if hits else 0.0
        most_alarms = stats.beta.ppf(0.975, alarms + 1, half - alarms) if alarms < half else 1.0
        return math.log(max((least_hits - DELTA) / most_alarms, 1e-9))

    thresholds = np.quantile(np.concatenate([member, stranger]), np.linspace(0.3, 0.99, 60))
    best = max(thresholds, key=lambda threshold: bound(threshold, slice(half)))
    return bound(best, slice(half, None))


def test_audit_stays_below_the_claim_and_finds_noise_that_is_weaker():
    claim = epsilon_spent(
        [
            Phase(
                sampling_probability=CLAIMED.sampling_probability,
                noise_multiplier=CLAIMED.noise_multiplier,
                num_steps=NUM_AUDITED_STEPS,
            )
        ],
        DELTA,
    )
    found = empirical_epsilon(CLAIMED)
    weaker = empirical_epsilon(CLAIMED.model_copy(update={"noise_multiplier": 0.1}))
    noiseless = empirical_epsilon(CLAIMED.model_copy(update={"noise_multiplier": 0.0}))
    assert 0.3 < found <= claim
    assert weaker > claim
    assert noiseless > claim
