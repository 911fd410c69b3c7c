"""Rounds of 'stacked' and 'fedex': all sides hold the true mean, the same to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import InputError, UpdateError
from mutirao.federated.aggregation.low_rank_rounds import (
    Trained,
    check_low_rank,
    fedex_step,
    round_product,
    stacked_step,
)
from mutirao.federated.aggregation.low_rank_state import (
    advance,
    factor_names,
    history_shapes,
    split_state,
    start_adapter,
    sum_as_adapter,
)
from mutirao.federated.aggregation.outer import FedAvg, Nesterov
from mutirao.federated.codec import CodecConfig, decode_tensors, encode_tensors
from mutirao.federated.plan import FederatedConfig

SHAPES = {
    "model.layers.0.q_proj.lora_A.default.weight": (4, 20),
    "model.layers.0.q_proj.lora_B.default.weight": (16, 4),
    "model.layers.0.down_proj.lora_A.default.weight": (4, 9),
    "model.layers.0.down_proj.lora_B.default.weight": (12, 4),
}
MODULES = ["model.layers.0.down_proj", "model.layers.0.q_proj"]
ALPHA = 8.0
EXPECTED_START = [-0.13719896972179413, -0.04265512898564339, -0.18981222808361053]


def _train(start, rng):
    """A site's work: another adapter, by some difference."""
    return {
        name: (0.1 * rng.normal(size=each.shape)).astype(np.float32) for name, each in start.items()
    }


def _product(tensors, module, scale):
    b = tensors[f"{module}.lora_B.default.weight"].astype(np.float64)
    return scale * b @ tensors[f"{module}.lora_A.default.weight"].astype(np.float64)


def _effect(state, module, scale=0.0):
    """What a state adds to a layer's weight, dense."""
    adapter, history = split_state(state)
    total = _product(adapter, module, scale) if adapter else 0.0
    if module in history:
        factors = history[module]
        total = total + factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return total


def _send(tensors, shapes, codec):
    return decode_tensors(encode_tensors(tensors, codec), shapes, codec)


def _far(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("num_rounds", [1, 4])
def test_stacked_rounds_hold_the_sum_of_true_means(num_rounds):
    rng = np.random.default_rng(0)
    ranks, weights = {"north": 4, "south": 2, "east": 1}, {"north": 5.0, "south": 1.0, "east": 2.0}
    scales = {site: ALPHA / rank for site, rank in ranks.items()}
    master, replica = {}, {}
    expected = dict.fromkeys(MODULES, 0.0)
    for number in range(1, num_rounds + 1):
        starts = {
            s: start_adapter(SHAPES, rank=r, seed=7, round_number=number) for s, r in ranks.items()
        }
        adapters = {site: Trained(starts[site], _train(starts[site], rng)) for site in ranks}
        for module in MODULES:
            means = [weights[s] * _product(adapters[s], module, scales[s]) for s in ranks]
            expected[module] = expected[module] + sum(means) / 8
        step = stacked_step(master, round_product(adapters, weights, scales))
        shapes = history_shapes(SHAPES, step.ranks)
        arrived = _send(step.tensors, shapes, CodecConfig(format="fp32"))
        master = advance(master, step.form, step.tensors)
        replica = advance(replica, step.form, arrived)
    assert all(master[name].tobytes() == replica[name].tobytes() for name in master)
    for module in MODULES:
        assert _far(_effect(replica, module), expected[module]) < 1e-6


@pytest.mark.parametrize("download", ["fp32", "bf16", "int8"])
def test_fedex_rounds_hold_the_true_mean_whatever_the_codec_does_to_the_means(download):
    rng = np.random.default_rng(1)
    codec, scale = CodecConfig(format=download), ALPHA / 4
    state = start_adapter(SHAPES, seed=7, round_number=1)
    weights = {"north": 3.0, "south": 1.0, "west": 4.0}
    exact = CodecConfig(format="fp32")

    def carry(name, change):
        return _send({name: change}, {name: change.shape}, codec)[name]

    for _ in range(4):
        adapters = {site: Trained(state, _train(state, rng)) for site in weights}
        expected = {}
        for module in MODULES:
            mean = sum(weights[s] * _product(adapters[s], module, scale) for s in weights) / 8
            old = _effect(state, module, scale) - _product(state, module, scale)
            expected[module] = old + mean
        step = fedex_step(state, adapters, weights, scale, carry=carry)
        shapes = history_shapes(SHAPES, step.ranks)
        history = {n: each for n, each in step.tensors.items() if n in shapes}
        arrived = _send(history, shapes, exact)
        arrived |= {n: carry(n, each) for n, each in step.tensors.items() if n not in shapes}
        if step.form == "whole":
            arrived = _send(step.tensors, {**SHAPES, **shapes}, exact)
        state = advance(state, step.form, arrived)
        for module in MODULES:
            assert _far(_effect(state, module, scale), expected[module]) < 1e-6


def test_long_histories_are_recompressed_and_stay_the_same_sum():
    rng = np.random.default_rng(2)
    state, forms = {}, []
    expected = np.zeros((12, 9))
    for number in range(1, 9):
        start = start_adapter(SHAPES, seed=0, round_number=number)
        adapters = {"one": Trained(start, _train(start, rng))}
        expected += _product(adapters["one"], MODULES[0], 2.0)
        step = stacked_step(state, round_product(adapters, {"one": 1.0}, {"one": 2.0}))
        state = advance(state, step.form, step.tensors)
        forms.append(step.form)
    assert "whole" in forms
    assert forms.count("change") > forms.count("whole")
    assert all(each.rank <= 2 * min(each.weight_shape) for each in split_state(state)[1].values())
    assert _far(_effect(state, MODULES[0]), expected) < 1e-6


def test_fedex_recompresses_too():
    rng = np.random.default_rng(6)
    state, forms = start_adapter(SHAPES, seed=0, round_number=1), []
    for _ in range(6):
        adapters = {site: Trained(state, _train(state, rng)) for site in "abc"}
        mean = sum(_product(adapters[site], MODULES[0], 2.0) for site in "abc") / 3
        expected = _effect(state, MODULES[0], 2.0) - _product(state, MODULES[0], 2.0) + mean
        step = fedex_step(
            state, adapters, dict.fromkeys("abc", 1.0), 2.0, carry=lambda _, v: np.round(v, 2)
        )
        tensors = step.tensors
        if step.form == "change":
            tensors = {n: np.round(v, 2) if "lora" in n else v for n, v in tensors.items()}
        state = advance(state, step.form, tensors)
        forms.append(step.form)
        assert _far(_effect(state, MODULES[0], 2.0), expected) < 1e-6
    assert set(forms) == {"change", "whole"}


@settings(deadline=None, max_examples=20)
@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 1000))
def test_bits_do_not_depend_on_who_answered_first(order, seed):
    start = start_adapter(SHAPES, seed=0, round_number=1)
    weights = {"a": 1.0, "b": 7.0, "c": 3.0, "d": 2.0}
    adapters = {
        site: Trained(start, _train(start, np.random.default_rng(seed + ord(site))))
        for site in "abcd"
    }
    shuffled = {site: adapters[site] for site in order}
    scales = dict.fromkeys("abcd", 2.0)
    steps = [
        stacked_step({}, round_product(each, weights, scales)) for each in (adapters, shuffled)
    ]
    steps += [fedex_step(start, each, weights, 2.0) for each in (adapters, shuffled)]
    for one, other in (steps[:2], steps[2:]):
        assert one.ranks == other.ranks
        assert all(one.tensors[n].tobytes() == other.tensors[n].tobytes() for n in one.tensors)


def test_start_is_the_same_everywhere_and_new_in_each_round():
    first = start_adapter(SHAPES, seed=1, round_number=1)
    name = "model.layers.0.q_proj.lora_A.default.weight"
    # Written down so that another version of NumPy that draws otherwise is found out.
    assert first[name][0, :3].tolist() == pytest.approx(EXPECTED_START, abs=0)
    assert first[name].dtype == np.float32
    assert np.abs(first[name]).max() <= 1 / np.sqrt(20)
    assert np.abs(first[name]).max() > 0.9 / np.sqrt(20)
    assert not any(values.any() for n, values in first.items() if "lora_B" in n)
    wider = start_adapter(SHAPES, rank=6, seed=1, round_number=1)
    assert wider[name].shape == (6, 20)
    assert (wider[name][:4] == first[name]).all()
    for seed, number in ((2, 1), (1, 2)):
        other = start_adapter(SHAPES, seed=seed, round_number=number)
        assert (other[name] != first[name]).any()


def test_result_is_one_adapter_of_the_rank_it_needs():
    rng = np.random.default_rng(3)
    state = start_adapter(SHAPES, seed=0, round_number=1)
    adapters = {site: Trained(state, _train(state, rng)) for site in "ab"}
    step = fedex_step(state, adapters, {"a": 1.0, "b": 1.0}, 2.0)
    state = advance(state, step.form, step.tensors)
    factors, rank, error = sum_as_adapter(state, scale=2.0)
    assert rank == 8
    assert error <= 2.0**-23
    for module in MODULES:
        assert factors[module].rank == 8
        dense = factors[module].b.astype(np.float64) @ factors[module].a.astype(np.float64)
        assert _far(dense, _effect(state, module, 2.0)) < 1e-6
    _, bounded, cost = sum_as_adapter(state, scale=2.0, max_rank=3)
    assert bounded == 3
    assert cost > 0.01
    assert sum_as_adapter({})[1:] == (1, 0.0)


def test_a_round_without_learning_sends_nothing():
    start = start_adapter(SHAPES, seed=0, round_number=1)
    still = {"a": Trained(start, {n: np.zeros_like(v) for n, v in start.items()})}
    step = stacked_step({}, round_product(still, {"a": 1.0}, {"a": 2.0}))
    assert (step.form, step.tensors, step.ranks) == ("change", {}, {})
    assert advance({}, step.form, step.tensors) == {}


def test_one_layer_and_site_are_read_at_a_time():
    start = start_adapter(SHAPES, seed=0, round_number=1)
    update = _train(start, np.random.default_rng(5))
    read = []

    class Slow(Trained):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    sites = {site: Slow(start, update) for site in "ab"}
    round_product(sites, {"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0})
    modules = [name.rsplit(".lora_", 1)[0] for name in read]
    assert modules == sorted(modules)
    assert len(read) == 8


def test_outer_optimizers_are_refused_in_one_sentence():
    check_low_rank(FederatedConfig(aggregation="fedex"))
    check_low_rank(FederatedConfig(aggregation="separate", outer=Nesterov()))
    for rule in ("fedex", "stacked"):
        for outer in (Nesterov(), FedAvg(learning_rate=0.5)):
            with pytest.raises(InputError, match=f"outer={outer.rule} with aggregation={rule}"):
                check_low_rank(
                    FederatedConfig(aggregation=rule, outer=outer, keeps_optimizer=False)
                )
    with pytest.raises(InputError, match="keeps_optimizer"):
        check_low_rank(FederatedConfig(aggregation="stacked"))
    check_low_rank(FederatedConfig(aggregation="stacked", keeps_optimizer=False))


def test_strangers_tensors_are_refused_by_name():
    start = start_adapter(SHAPES, seed=0, round_number=1)
    good = _train(start, np.random.default_rng(0))
    weights, scales = {"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0}
    lone = {n: v for n, v in good.items() if not n.endswith("q_proj.lora_A.default.weight")}
    with pytest.raises(UpdateError, match="q_proj"):
        round_product({"a": good, "b": lone}, weights, scales)
    fewer = {n: v for n, v in good.items() if "q_proj" not in n}
    with pytest.raises(UpdateError, match=r"a and b adapt different layers.*q_proj"):
        round_product({"a": good, "b": fewer}, weights, scales)
    with pytest.raises(UpdateError, match="a site sent no tensor"):
        fedex_step(start, {"a": good, "b": fewer}, weights, 2.0)
    name = "model.layers.0.q_proj.lora_B.default.weight"
    other = {**good, name: np.zeros((17, 4), np.float32)}
    with pytest.raises(UpdateError, match="do not fit"):
        round_product({"a": good, "b": other}, weights, scales)
    with pytest.raises(UpdateError, match=r"shape \(17, 4\)"):
        round_product({"a": Trained(start, other)}, weights, scales)
    narrow = {**good, name: np.zeros((16, 3), np.float32)}
    with pytest.raises(UpdateError, match="do not fit"):
        fedex_step(start, {"a": good, "b": narrow}, weights, 2.0)
    with pytest.raises(UpdateError, match="no factor"):
        factor_names({"embedding.weight": None})
    for empty in (lambda: round_product({}, {}, {}), lambda: fedex_step(start, {}, {}, 1.0)):
        with pytest.raises(UpdateError, match="no site"):
            empty()


def test_a_change_that_does_not_fit_is_refused():
    state = {
        "m.history_A": np.zeros((2, 3), np.float32),
        "m.history_B": np.zeros((4, 2), np.float32),
    }
    with pytest.raises(UpdateError, match="does not fit"):
        advance(state, "change", {"m.history_A": np.zeros((1, 5), np.float32)})
    with pytest.raises(UpdateError, match="does not fit"):
        advance(state, "change", {"m.lora_A": np.zeros((1, 5), np.float32)})
    wide = {"m.lora_A": np.zeros((2, 5), np.float32)}
    with pytest.raises(UpdateError, match="does not fit"):
        advance(wide, "change", {"m.lora_A": np.zeros((1, 5), np.float32)})
    with pytest.raises(UpdateError, match="half a history"):
        split_state({"m.history_A": np.zeros((2, 3), np.float32)})
    for ranks in ({"elsewhere": 1}, {MODULES[0]: -1}):
        with pytest.raises(UpdateError, match="not adapted"):
            history_shapes(SHAPES, ranks)
