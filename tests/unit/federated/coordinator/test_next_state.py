"""The next state: bit for bit that of all values at once, in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from mutirao.errors import UpdateError
from mutirao.federated.aggregation.outer import FedAdam, FedAvg, FedMom, Nesterov, OuterState
from mutirao.federated.arrays import read_arrays
from mutirao.federated.codec import CodecConfig, decode_tensors
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.next_state import change_seed, write_next_state
from mutirao.federated.plan import FederatedConfig
from mutirao.federated.site.replica import hash_tensors

RULES = [FedAvg(learning_rate=0.7), Nesterov(), FedMom(), FedAdam()]
SIZE = 200_003  # several stretches, and a part of one


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _start(folder, outer, tensors):
    journal = CoordinatorJournal(folder)
    shapes = {name: values.shape for name, values in tensors.items()}
    journal.write_start(shapes, tensors.__getitem__, outer)
    return journal


@pytest.mark.parametrize("outer", RULES, ids=lambda outer: outer.rule)
def test_a_large_tensor_steps_as_a_whole(tmp_path, outer):
    rng = np.random.default_rng(0)
    tensors = {
        "large": rng.normal(size=SIZE).astype(np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    journal = _start(tmp_path, outer, tensors)
    download = CodecConfig(format="int4", rounding="stochastic")
    config = FederatedConfig(outer=outer, download=download)
    state = OuterState(0, outer.start(tensors).arrays)
    expected = tensors
    for number in (1, 2):
        means = {name: rng.normal(size=values.shape) for name, values in tensors.items()}
        found = write_next_state(journal, number, config, means.__getitem__)
        expected, state = outer.step(expected, means, state)
        assert found.global_sha256 == hash_tensors(expected)
        kept = read_arrays(journal.state_path(number, "outer"))
        assert kept.keys() == state.arrays.keys()
        assert all(kept[key].tobytes() == state.arrays[key].tobytes() for key in kept)
        before = read_arrays(journal.state_path(number - 1, "replica"))
        payloads = read_arrays(journal.state_path(number, "change"))
        shapes = {name: values.shape for name, values in tensors.items()}
        change = decode_tensors(payloads, shapes, download)
        after = {name: before[name] + change[name] for name in before}
        assert found.replica_sha256 == hash_tensors(after)


def test_rounding_is_drawn_anew_in_each_round():
    assert len({change_seed(number) for number in range(1, 100)}) == 99


@pytest.mark.parametrize("outer", RULES, ids=lambda outer: outer.rule)
def test_memory_is_that_of_the_largest_tensor(tmp_path, outer):
    size, peaks = 2_000_000, []
    for number in (1, 3):
        tensors = {f"t{i}": np.ones(size, np.float32) for i in range(number)}
        journal = _start(tmp_path / str(number), outer, tensors)
        config = FederatedConfig(outer=outer, download=CodecConfig(format="int8"))
        tracemalloc.start()
        write_next_state(journal, 1, config, lambda name: np.full(size, 0.1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[1] <= 24 * size


def test_a_step_out_of_float32_leaves_nothing(tmp_path):
    tensors = {"x": np.full(3, 3e38, np.float32)}
    journal = _start(tmp_path, FedAvg(), tensors)
    with pytest.raises(UpdateError, match="too large for float32"):
        write_next_state(journal, 1, FederatedConfig(), lambda name: np.full(3, 3e38))
    assert not list((tmp_path / "state" / "001").iterdir())
