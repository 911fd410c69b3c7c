"""Outer optimizers against PyTorch's, and states that go on bit for bit after a journal."""

import numpy as np
import pytest
import torch

from mutirao.errors import UpdateError
from mutirao.federated.aggregation.outer import FedAdam, FedAvg, FedMom, Nesterov, OuterState
from mutirao.federated.arrays import read_arrays, write_arrays

SHAPES = {"a": (4, 5), "b": (7,)}
RULES = [FedAvg(), FedAvg(learning_rate=0.3), Nesterov(), FedMom(), FedAdam()]


def _tensors(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def _run(rule, num_steps):
    parameters = _tensors(0)
    state = rule.start(parameters)
    for number in range(num_steps):
        parameters, state = rule.step(parameters, _tensors(100 + number), state)
    return parameters, state


def _torch_parameters():
    return {
        name: torch.nn.Parameter(torch.from_numpy(each.copy()).double())
        for name, each in _tensors(0).items()
    }


def _torch_run(optimizer, parameters, num_steps, before_step=lambda number: None):
    for number in range(num_steps):
        for name, mean in _tensors(100 + number).items():
            parameters[name].grad = -torch.from_numpy(mean).double()  # the pseudo-gradient
        before_step(number)
        optimizer.step()
    return {name: each.detach().numpy() for name, each in parameters.items()}


@pytest.mark.parametrize(
    ("rule", "learning_rate", "momentum"),
    [
        (FedAvg(learning_rate=0.4), 0.4, 0.0),
        (Nesterov(), 0.7, 0.9),
        (Nesterov(learning_rate=1.0, momentum=0.7), 1.0, 0.7),
        (Nesterov(learning_rate=0.5, momentum=0.0), 0.5, 0.0),
        # With a constant rate FedMom's two sequences are Nesterov's momentum, written otherwise.
        (FedMom(learning_rate=0.7, momentum=0.9), 0.7, 0.9),
    ],
)
def test_sgd_of_pytorch(rule, learning_rate, momentum):
    oracle = _torch_parameters()
    optimizer = torch.optim.SGD(
        oracle.values(), lr=learning_rate, momentum=momentum, nesterov=momentum > 0
    )
    expected = _torch_run(optimizer, oracle, 8)
    found, state = _run(rule, 8)
    assert state.step == 8
    for name in SHAPES:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5)


def test_adam_of_pytorch_with_its_bias_correction_undone():
    rule = FedAdam(learning_rate=0.05, beta1=0.9, beta2=0.99, tau=1e-2)
    oracle = _torch_parameters()
    optimizer = torch.optim.Adam(oracle.values(), lr=rule.learning_rate, betas=(0.9, 0.99))
    for parameter in oracle.values():
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.full_like(parameter, rule.tau**2),
        }

    def undo_bias_correction(number):
        first, second = 1 - 0.9 ** (number + 1), 1 - 0.99 ** (number + 1)
        for group in optimizer.param_groups:
            group["lr"] = rule.learning_rate * first / second**0.5
            group["eps"] = rule.tau / second**0.5

    expected = _torch_run(optimizer, oracle, 8, undo_bias_correction)
    found, _ = _run(rule, 8)
    for name in SHAPES:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5)


def test_fedmom_keeps_the_rate_its_momentum_was_made_with():
    parameters = {"x": np.zeros(1, np.float32)}
    mean = {"x": np.ones(1, np.float32)}
    state = FedMom().start(parameters)
    parameters, state = FedMom(learning_rate=1.0, momentum=0.5).step(parameters, mean, state)
    assert parameters["x"] == pytest.approx(1.5)  # average 1, and half of the way to it on
    parameters, state = FedMom(learning_rate=0.1, momentum=0.5).step(parameters, mean, state)
    assert parameters["x"] == pytest.approx(1.6 + 0.5 * 0.6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_a_journaled_state_goes_on_bit_for_bit(rule, tmp_path):
    parameters, state = _run(rule, 3)
    write_arrays(tmp_path / "state.safetensors", state.arrays)
    write_arrays(tmp_path / "parameters.safetensors", parameters)
    restored = OuterState(state.step, read_arrays(tmp_path / "state.safetensors"))
    again = read_arrays(tmp_path / "parameters.safetensors")
    for number in range(3, 6):
        again, restored = rule.step(again, _tensors(100 + number), restored)
    parameters, state = _run(rule, 6)
    assert restored.step == state.step == 6
    assert restored.arrays.keys() == state.arrays.keys()
    for name, array in state.arrays.items():
        assert array.dtype == np.float32
        assert array.tobytes() == restored.arrays[name].tobytes()
    for name in SHAPES:
        assert parameters[name].tobytes() == again[name].tobytes()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_what_was_given_is_unchanged(rule):
    parameters, mean = _tensors(0), _tensors(1)
    state = rule.start(parameters)
    kept = {name: array.copy() for name, array in state.arrays.items()}
    rule.step(parameters, mean, state)
    assert all((parameters[name] == _tensors(0)[name]).all() for name in SHAPES)
    assert all((mean[name] == _tensors(1)[name]).all() for name in SHAPES)
    assert all((state.arrays[name] == kept[name]).all() for name in kept)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_what_does_not_fit_is_refused(rule):
    parameters = _tensors(0)
    state = rule.start(parameters)
    for mean in ({"a": parameters["a"]}, {**parameters, "b": np.zeros(6, np.float32)}):
        with pytest.raises(UpdateError, match="other tensors"):
            rule.step(parameters, mean, state)
    wrong = OuterState(0, {"momentum/other": np.zeros(3, np.float32)})
    with pytest.raises(UpdateError, match="journal of the outer optimizer"):
        rule.step(parameters, parameters, wrong)


@pytest.mark.parametrize("rule", [FedAvg(), Nesterov(), FedMom()], ids=lambda rule: rule.rule)
def test_a_step_out_of_float32_is_refused(rule):
    large = {"t": np.full(3, 3e38, np.float32)}
    with pytest.raises(UpdateError, match=r"'(momentum/|average/)?t' too large"):
        rule.step(large, large, rule.start(large))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (FedAvg, {"learning_rate": 0.0}),
        (Nesterov, {"momentum": 1.0}),
        (FedMom, {"learning_rate": float("inf")}),
        (FedAdam, {"tau": 0.0}),
        (FedAdam, {"unknown": 1}),
    ],
)
def test_settings_are_checked(kind, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        kind(**bad)
