"""An audit of DP-SGD: does an attacker do better than the claimed ε allows?

The attacker knows everything but whether one unit took part. The audit must fail against
the real thing, and succeed where the noise is off or weaker than claimed.
"""

import math

import numpy as np
import torch
from scipy import stats
from torch import nn
from toy_units import count_only, squared_error

from mutirao.train.accountant import Phase, epsilon_spent
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.private import fixed_bytes_for_tests_only, train_private

TRAIN = TrainConfig(learning_rate=1e-2, warmup_tokens=0, tokens_per_step=32)
DELTA = 1e-3
NUM_RUNS = 1200
NUM_CONTROL_RUNS = 400
"""Of noise that is weaker than claimed: fewer runs only make it harder to find."""
NUM_AUDITED_STEPS = 3
CLAIMED = PrivateConfig(num_units=4, units_per_step=2.0, noise_multiplier=1.2)


def canary_scores(private, with_canary, seed, num_runs):
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
    for _ in range(num_runs):
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


def empirical_epsilon(private, num_runs):
    """Return a lower bound on ε that holds with 95 % confidence.

    The threshold is chosen on half of the runs and judged on the other half, by Clopper and
    Pearson's intervals of both rates (as Nasr et al. 2021, arXiv:2101.04535).
    """
    member, stranger = (
        canary_scores(private, there, seed=there, num_runs=num_runs) for there in (True, False)
    )
    half = num_runs // 2

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
    found = empirical_epsilon(CLAIMED, NUM_RUNS)
    weaker = empirical_epsilon(
        CLAIMED.model_copy(update={"noise_multiplier": 0.1}), NUM_CONTROL_RUNS
    )
    noiseless = empirical_epsilon(
        CLAIMED.model_copy(update={"noise_multiplier": 0.0}), NUM_CONTROL_RUNS
    )
    assert 0.3 < found <= claim
    assert weaker > claim
    assert noiseless > claim
