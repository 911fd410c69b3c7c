"""The outer step against hand-computed values and PyTorch's own SGD."""

import numpy as np
import pytest
import torch

from mutirao.errors import UpdateError
from mutirao.federated.strategy import WeightedUpdate, mean_update, outer_step


def _update(values, weight):
    return WeightedUpdate(np.array(values, np.float32), weight)


def test_mean_is_weighted_by_tokens():
    mean = mean_update({"a": _update([1, 2], 1.0), "b": _update([4, 8], 2.0)})
    assert mean == pytest.approx([3.0, 6.0])


def test_mean_does_not_depend_on_who_answered_first():
    rng = np.random.default_rng(0)
    updates = {f"s{i}": _update(rng.normal(size=500), 1.0 + i) for i in range(5)}
    shuffled = dict(reversed(updates.items()))
    assert (mean_update(updates) == mean_update(shuffled)).all()


@pytest.mark.parametrize(
    "updates",
    [
        {},
        {"a": _update([1], 1.0), "b": _update([1, 2], 1.0)},
        {"a": _update([1], 0.0)},
        {"a": _update([1], float("nan"))},
    ],
)
def test_unsound_rounds_are_refused(updates):
    with pytest.raises(UpdateError):
        mean_update(updates)


@pytest.mark.parametrize(("learning_rate", "decay"), [(1.0, 0.0), (0.7, 0.9), (0.5, 0.3)])
def test_outer_step_is_torch_sgd_on_the_negative_mean(learning_rate, decay):
    rng = np.random.default_rng(1)
    start = rng.normal(size=20).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()).double())
    oracle = torch.optim.SGD([parameter], lr=learning_rate, momentum=decay, nesterov=decay > 0)
    state, momentum = start, np.zeros_like(start)
    for _ in range(4):
        mean = rng.normal(size=20)
        parameter.grad = torch.from_numpy(-mean)
        oracle.step()
        state, momentum = outer_step(
            state, momentum, mean, learning_rate=learning_rate, momentum_decay=decay
        )
    assert state == pytest.approx(parameter.detach().numpy(), abs=1e-5)


def test_a_step_out_of_float32_is_refused():
    large = np.full(3, 3e38, np.float32)
    with pytest.raises(UpdateError, match="too large"):
        outer_step(large, large * 0, np.full(3, 3e38), learning_rate=1.0, momentum_decay=0.0)
