"""What is predicted against sums done by hand, a slow simulation, and what the engine reads."""

import itertools
import random

import pytest
from small_machine import small_machine
from small_stores import SPECS, make_store, mixed_formats

from mutirao.errors import InputError, MissingKernelError
from mutirao.inference.architecture.model_spec import matrix_shapes
from mutirao.inference.architecture.program import compile_program
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.native.library import load_library
from mutirao.inference.planning.cost_model import (
    choose_draft_length,
    expected_tokens,
    once_s,
    predict,
    predict_best_draft,
    steady_s,
)
from mutirao.inference.planning.machine import DiskSpeed
from mutirao.inference.planning.pass_costs import PassCosts, Step, cut_pieces
from mutirao.inference.planning.placement import multiplied
from mutirao.inference.store.store_index import plan_layout

SPEC = SPECS["llama"]
TENSORS = plan_layout(SPEC, dict.fromkeys(matrix_shapes(SPEC), "Q4_K")).tensors
PROGRAM = compile_program(SPEC)
WEIGHTS = sum(
    -(-each.num_rows // 16) * 16 * each.num_columns for each in multiplied(PROGRAM, TENSORS)
)
STREAMED_BYTES = sum(each.num_bytes for each in multiplied(PROGRAM, TENSORS))


def _placement(num_planes=None, **settings):
    resident = {}
    if num_planes is not None:
        resident = {each.name: num_planes for each in multiplied(PROGRAM, TENSORS)}
    return Placement(resident, context=256, **{"piece_bytes": 1 << 14, **settings})


# ---- Drafts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.83, 1.0])
@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_expected_tokens_is_the_mean_over_all_outcomes(acceptance, length):
    mean = 0.0
    for kept in itertools.product([True, False], repeat=length):
        probability = 1.0
        for each in kept:
            probability *= acceptance if each else 1 - acceptance
        run = next((i for i, each in enumerate(kept) if not each), length)
        mean += probability * (run + 1)
    assert expected_tokens(acceptance, length) == pytest.approx(mean)


def test_nothing_is_drafted_where_drafts_are_never_kept_or_cost_as_much_as_passes():
    assert choose_draft_length(0.0, lambda length: 1.0 + 0.01 * length) == 0
    assert choose_draft_length(0.9, lambda length: 1.0 + 1.0 * length) == 0


def test_drafts_are_long_where_they_cost_nothing():
    assert choose_draft_length(0.9, lambda length: 1.0, max_length=7) == 7


def test_the_draft_length_is_the_best_of_all():
    def cycle_s(length):
        return 1.0 + 0.2 * length

    rates = [expected_tokens(0.8, length) / cycle_s(length) for length in range(16)]
    assert choose_draft_length(0.8, cycle_s) == rates.index(max(rates)) > 0


# ---- Reading ahead ------------------------------------------------------------------------------


def _simulated_s(steps, ring_bytes, bytes_per_s, num_cycles):
    """When each cycle ends, found in small ticks of time; pieces lie in the ring whole."""
    tick = 1e-5
    queue = [step for _ in range(num_cycles) for step in steps]
    streamed = [step for step in queue if step.num_bytes]
    read, held, arrived, ends = 0, 0, 0, []
    partly, time_s, busy_s = 0.0, 0.0, 0.0
    index, waiting_for = 0, 0
    while index < len(queue):
        time_s += tick
        if read < len(streamed):
            if partly == 0.0 and held + streamed[read].num_bytes <= ring_bytes:
                held += streamed[read].num_bytes
                partly = tick * bytes_per_s
            elif partly > 0.0:
                partly += tick * bytes_per_s
            if partly >= streamed[read].num_bytes:
                read, arrived, partly = read + 1, arrived + 1, 0.0
        step = queue[index]
        if step.num_bytes and arrived <= waiting_for:
            continue
        busy_s += tick
        if busy_s >= step.compute_s:
            busy_s = 0.0
            if step.num_bytes:
                held -= step.num_bytes
                waiting_for += 1
            index += 1
            if index % len(steps) == 0:
                ends.append(time_s)
    return ends[-1] - ends[-2]


@pytest.mark.parametrize("seed", range(6))
def test_steady_state_is_that_of_a_simulation_in_small_ticks(seed):
    rng = random.Random(seed)
    bytes_per_s = 1e6
    steps = []
    for _ in range(rng.randint(4, 12)):
        num_bytes = rng.choice([0, 0, 1000, 3000, 5000])
        steps.append(Step(rng.uniform(1e-3, 6e-3), num_bytes / bytes_per_s, num_bytes))
    ring_bytes = rng.choice([5000, 8000, 20_000])
    expected = _simulated_s(steps, ring_bytes, bytes_per_s, 6)
    assert steady_s(steps, ring_bytes) == pytest.approx(expected, rel=0.05)


def test_computing_hides_reading_and_reading_hides_computing():
    spread = [Step(2e-3), Step(1e-3, 1e-3, 1000)] * 4
    assert steady_s(spread, 4000) == pytest.approx(12e-3)
    slow = [Step(2e-3), Step(1e-3, 5e-3, 1000)] * 4
    assert steady_s(slow, 4000) == pytest.approx(20e-3)


def test_pieces_that_lie_close_together_are_hidden_less_than_those_that_are_spread():
    apart = [Step(2e-3), Step(1e-3, 3e-3, 1000)] * 4
    together = [Step(8e-3), *([Step(1e-3, 3e-3, 1000)] * 4)]
    assert steady_s(apart, 2000) == pytest.approx(12e-3)
    assert steady_s(together, 2000) > 14e-3
    assert steady_s(together, 4000) == pytest.approx(12e-3)


def test_the_first_pass_waits_for_its_first_bytes():
    assert once_s([Step(1e-3, 5e-3, 1000), Step(1e-3)], 4000) == pytest.approx(7e-3)


# ---- Passes -------------------------------------------------------------------------------------


def test_all_resident_takes_the_time_of_its_weights():
    found = predict(small_machine(), SPEC, TENSORS, _placement())
    assert found.seconds_per_token == pytest.approx(WEIGHTS * 1e-9, rel=1e-3)
    assert found.bytes_per_token == 0
    assert found.tokens_per_s == pytest.approx(1 / found.seconds_per_token)


def test_a_slow_disk_takes_the_time_of_its_bytes():
    slow = small_machine(reads=tuple(DiskSpeed(1 << 14, readers, 1e6, 0.0) for readers in (1, 8)))
    found = predict(slow, SPEC, TENSORS, _placement(NOTHING))
    assert found.bytes_per_token == pytest.approx(STREAMED_BYTES, rel=0.05)
    assert found.bytes_per_token >= STREAMED_BYTES
    assert found.seconds_per_token >= STREAMED_BYTES / 1e6
    assert found.breakdown["waiting"] == pytest.approx(found.seconds_per_token, rel=0.2)


def test_rows_that_are_not_in_memory_are_looked_up_by_small_reads():
    place = _placement()
    streamed = Placement({"token_embd": NOTHING}, context=place.context)
    machine = small_machine(reads=(DiskSpeed(1 << 16, 1, 1e9, 0.0),))
    costs = [
        PassCosts(machine, SPEC, TENSORS, each).steps(1, 0).parts["other"]
        for each in (place, streamed)
    ]
    assert costs[1] - costs[0] == pytest.approx(4 * 2**16 / 1e9, rel=1e-3)  # scales and 3 planes


def test_small_reads_are_slower():
    machine = small_machine(
        reads=tuple(
            DiskSpeed(chunk, readers, speed, 0.0)
            for chunk, speed in ((1 << 16, 1e8), (1 << 20, 1e9))
            for readers in (1, 8)
        )
    )
    assert machine.read_bytes_per_s(1 << 18, 8) == pytest.approx(5.5e8)
    assert machine.read_bytes_per_s(1 << 15, 8) == pytest.approx(5e7)
    assert machine.read_bytes_per_s(1 << 24, 8) == 1e9


def test_parts_add_up():
    found = predict(
        small_machine(read_cpu_s_per_byte=1e-10),
        SPEC,
        TENSORS,
        _placement(1),
        draft_length=3,
        acceptance=0.7,
    )
    assert sum(found.breakdown.values()) == pytest.approx(found.seconds_per_token)
    assert found.tokens_per_pass == pytest.approx(expected_tokens(0.7, 3))
    assert found.breakdown["drafts"] == pytest.approx(3 * found.draft_s / found.tokens_per_pass)
    assert found.breakdown["reading"] > 0


def test_a_draft_is_a_token_and_a_check_is_one_pass_over_all_of_them():
    machine = small_machine()
    alone = predict(machine, SPEC, TENSORS, _placement())
    checked = predict(machine, SPEC, TENSORS, _placement(), draft_length=7, acceptance=0.5)
    assert checked.draft_s == pytest.approx(alone.seconds_per_token, rel=1e-3)
    assert checked.pass_s == pytest.approx(4.5 * alone.seconds_per_token, rel=1e-3)


def test_tiles_of_many_tokens_are_those_of_the_kernels():
    machine = small_machine()
    times = {num: machine.product_s("Q4_K", (4,), 10**9, num) for num in range(1, 33)}
    assert times[1] == pytest.approx(1.0)
    assert times[8] == pytest.approx(4.5)
    assert times[16] == pytest.approx(8.5)
    again = (32.5 - 8.5) / 3  # of sixteen that follow others
    assert times[32] == pytest.approx(8.5 + again)
    assert times[20] == pytest.approx(8.5 + again / 8.5 * 2.5)
    assert times[12] == pytest.approx(4.5 + again / 8.5 * 2.5)


def test_the_best_draft_is_at_least_as_fast_as_none():
    slow = small_machine(reads=tuple(DiskSpeed(1 << 14, readers, 2e7, 0.0) for readers in (1, 8)))
    best = predict_best_draft(slow, SPEC, TENSORS, _placement(2), 0.9)
    none = predict(slow, SPEC, TENSORS, _placement(2))
    assert best.draft_length > 0
    assert best.tokens_per_s > 2 * none.tokens_per_s
    assert predict_best_draft(slow, SPEC, TENSORS, _placement(2), 0.0).draft_length == 0


def test_a_long_prompt_takes_a_pass_for_each_chunk():
    machine, place = small_machine(), _placement(max_tokens=64)
    one = predict(machine, SPEC, TENSORS, place, prompt_tokens=64).time_to_first_token_s
    three = predict(machine, SPEC, TENSORS, place, prompt_tokens=192).time_to_first_token_s
    assert 2.5 * one < three < 3 * one  # the head computes one token only, once


def test_bad_settings_are_refused():
    machine = small_machine()
    with pytest.raises(InputError, match="2 threads and the placement has 3"):
        predict(machine, SPEC, TENSORS, _placement(num_threads=3))
    with pytest.raises(InputError, match="need an acceptance"):
        predict(machine, SPEC, TENSORS, _placement(), draft_length=2)
    with pytest.raises(InputError, match=r"acceptance=1\.5"):
        predict(machine, SPEC, TENSORS, _placement(), draft_length=2, acceptance=1.5)
    with pytest.raises(InputError, match=r"has none of blk\.0\.attn_q"):
        predict(machine, SPEC, TENSORS, _placement(NOTHING), draft_length=2, acceptance=0.5)


def test_many_pieces_are_joined_without_changing_the_sums(monkeypatch):
    machine, place = small_machine(), _placement(NOTHING, piece_bytes=1 << 12)
    apart = PassCosts(machine, SPEC, TENSORS, place).steps(1, 0)
    monkeypatch.setattr("mutirao.inference.planning.pass_costs.MAX_PIECES", 10)
    joined = PassCosts(machine, SPEC, TENSORS, place).steps(1, 0)
    assert len(joined.steps) < len(apart.steps)
    assert joined.num_bytes == apart.num_bytes
    assert joined.parts["products"] == pytest.approx(apart.parts["products"], rel=1e-6)


# ---- The engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_planes", [NOTHING, 0, 1, 2])
@pytest.mark.parametrize("piece_bytes", [1 << 12, 1 << 15])
def test_the_engine_reads_what_is_predicted(tmp_path, num_planes, piece_bytes):
    try:
        load_library()
    except MissingKernelError as error:
        pytest.skip(str(error))
    spec = SPECS["qwen2"]
    store = make_store(tmp_path, spec, mixed_formats(spec))
    matrices = multiplied(compile_program(spec), store.tensors)
    place = Placement(
        {each.name: num_planes for each in matrices},
        num_threads=2,
        num_readers=3,
        direct=False,
        context=64,
        ring_bytes=1 << 17,
        piece_bytes=piece_bytes,
    )
    num_pieces = sum(len(cut_pieces(each, num_planes, piece_bytes)) for each in matrices)
    followed = PassCosts(small_machine(), spec, store.tensors, place).steps(1, 0)
    passes = 5
    with NativeBackend(store, place) as backend:
        assert backend._library.engine_num_pieces(backend._handle) == num_pieces
        for position in range(passes):
            backend.run([position + 1], position)
        read = backend.bytes_read
    # Looked-up rows are read besides, and the ring is filled for a pass that does not come.
    assert passes * followed.num_bytes <= read
    assert read <= passes * followed.num_bytes + place.ring_bytes + passes * 10_000
