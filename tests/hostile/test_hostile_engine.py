"""An engine whose store changes under it, whose model is no model, and that is stopped anywhere.

Every fault ends in an error that says so, in bounded time, and leaves the process usable.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_stores import SPECS, make_store, mixed_formats, skip_without_kernels
from synthetic_gguf import child_environment, engine_home, write_synthetic_gguf

from mutirao.errors import INTERRUPTED_EXIT_CODE, InferenceError, InputError
from mutirao.inference import Engine
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.store.weight_store import WeightStore

MUTIRAO = str(Path(sys.executable).parent / "mutirao")
SPEC = dataclasses.replace(SPECS["llama"], vocab_size=700, ffn_dim=768)
TOKENS = list(range(12))
LIMIT_S = 20.0
"""Longest that anything here may take."""


@pytest.fixture(autouse=True)
def in_bounded_time() -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < LIMIT_S


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A store of every format, and what it gives."""
    skip_without_kernels()
    store = make_store(tmp_path_factory.mktemp("store"), SPEC, mixed_formats(SPEC))
    with NativeBackend(store, placement({})) as backend:
        return store, backend.run(TOKENS, 0)


@pytest.fixture
def store(right, tmp_path) -> WeightStore:
    """A copy to be harmed."""
    shutil.copytree(right[0].directory, tmp_path / "store")
    return dataclasses.replace(right[0], directory=tmp_path / "store")


@pytest.fixture(autouse=True)
def still_usable(request):
    """After every fault, the right store gives what it gave."""
    yield
    if "right" in request.fixturenames:
        store, expected = request.getfixturevalue("right")
        with NativeBackend(store, placement(dict.fromkeys(store.tensors, 1))) as backend:
            np.testing.assert_array_equal(backend.run(TOKENS, 0), expected)


def placement(resident, **changes):
    small = {"context": 64, "num_readers": 3, "ring_bytes": 1 << 20, "piece_bytes": 1 << 14}
    return Placement(resident, **small | changes)


def flip(store: WeightStore, offset: int) -> None:
    with store.weights_path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


READING = [{"queued": False}, {"queued": True}, {"direct": False}]


# --- Weights that were altered -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["blk.0.attn_q", "blk.1.ffn_down", "output"])
def test_altered_resident_weights(store, name):
    rng = random.Random(0)
    for extent in store.tensors[name].extents:
        place = extent.offset + rng.randrange(extent.num_bytes)
        flip(store, place)
        with pytest.raises(InferenceError, match="damaged: a checksum does not match") as raised:
            NativeBackend(store, placement({}))
        assert str(store.directory) in str(raised.value)
        flip(store, place)
    NativeBackend(store, placement({})).close()


@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("name", ["blk.0.attn_q", "blk.1.ffn_down", "output"])
def test_altered_streamed_weights(store, name, reading):
    rng = random.Random(0)
    for extent in store.tensors[name].extents:
        place = extent.offset + rng.randrange(extent.num_bytes)
        flip(store, place)
        resident = dict.fromkeys(store.tensors, NOTHING)
        with NativeBackend(store, placement(resident, **reading)) as backend:
            for _ in range(2):
                with pytest.raises(InferenceError, match="a checksum does not match"):
                    backend.run(TOKENS, 0)
        flip(store, place)


@pytest.mark.parametrize("reading", READING)
def test_altered_weights_of_which_reading_was_given_up(store, reading):
    """Passes without the head give up what they have begun to read of it, at any point.

    They may come upon the damage while they read ahead; the head's own pass must.
    """
    flip(store, store.tensors["output"].planes[-1].offset)
    for _ in range(30):
        where = placement(dict.fromkeys(store.tensors, NOTHING), **reading | {"num_readers": 1})
        damaged = pytest.raises(InferenceError, match="checksum")
        with NativeBackend(store, where) as backend, damaged:
            run_the_head_at_last(backend)


def run_the_head_at_last(backend):
    for _ in range(4):
        backend.run(TOKENS, 0, logits="none")
    backend.run(TOKENS, 0)


@pytest.mark.parametrize("reading", READING)
def test_altered_lower_planes_of_split_weights(store, reading):
    tensor = store.tensors["blk.1.ffn_up"]
    flip(store, tensor.planes[-1].offset)
    resident = {name: len(each.planes) - 1 for name, each in store.tensors.items()}
    with NativeBackend(store, placement(resident, **reading)) as backend:
        assert np.isfinite(backend.run(TOKENS, 0, mode="draft")).all()
        with pytest.raises(InferenceError, match="a checksum does not match"):
            backend.run(TOKENS, 0)


def test_bytes_that_nothing_reads_may_be_anything(store, right):
    """The padding between extents."""
    extent = store.tensors["blk.0.attn_k"].scales
    assert extent.end - extent.offset > extent.num_bytes
    flip(store, extent.offset + extent.num_bytes)
    with NativeBackend(store, placement({"blk.0.attn_k": NOTHING})) as backend:
        np.testing.assert_array_equal(backend.run(TOKENS, 0), right[1])


# --- Files that end, or are not there ----------------------------------------------------------


def test_a_store_that_is_cut_before_it_is_loaded(store):
    size = store.weights_path.stat().st_size
    for length in (size - 4096, size // 2, 4096, 0):
        os.truncate(store.weights_path, length)
        with pytest.raises(InferenceError, match=r"cannot be read, or is truncated.*delete"):
            NativeBackend(store, placement({}))


@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("resident", [NOTHING, 0, 1])
def test_a_store_that_is_cut_while_it_is_streamed(store, reading, resident):
    kept = dict.fromkeys(store.tensors, resident)
    with NativeBackend(store, placement(kept, **reading)) as backend:
        backend.run(TOKENS[:4], 0)
        os.truncate(store.weights_path, store.weights_path.stat().st_size // 3)
        begin = time.monotonic()
        for _ in range(3):
            with pytest.raises(InferenceError, match="cannot be read"):
                run_one_by_one(backend)
        assert time.monotonic() - begin < LIMIT_S / 2


def run_one_by_one(backend):
    """What was read ahead may serve the first of them."""
    for position in range(4, 12):
        backend.run(TOKENS[position : position + 1], position)


def test_rows_of_an_embedding_that_is_cut(store):
    with NativeBackend(store, placement({"token_embd": NOTHING})) as backend:
        backend.run([5], 0)
        os.truncate(store.weights_path, store.tensors["token_embd"].planes[0].offset + 100)
        with pytest.raises(InferenceError, match="cannot be read, or is truncated"):
            backend.run([600], 1)


def test_a_store_that_is_deleted_while_it_is_streamed(store, right):
    with NativeBackend(store, placement(dict.fromkeys(store.tensors, NOTHING))) as backend:
        store.weights_path.unlink()
        np.testing.assert_array_equal(backend.run(TOKENS, 0), right[1])
    with pytest.raises(InferenceError, match="cannot be opened"):
        NativeBackend(store, placement({}))
    store.weights_path.mkdir()
    with pytest.raises(InferenceError, match=r"cannot be (opened|read)"):
        NativeBackend(store, placement({}))


# --- Many at once, closed at any time ----------------------------------------------------------


def test_closing_while_another_thread_runs(right):
    store, expected = right
    for pause_s in np.linspace(0.0, 0.03, 30):
        backend = NativeBackend(store, placement(dict.fromkeys(store.tensors, 1)))
        ended = []

        def run(backend=backend, ended=ended):
            try:
                while True:
                    np.testing.assert_array_equal(backend.run(TOKENS, 0), expected)
            except InferenceError as error:
                ended.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(pause_s)
        backend.close()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        assert "closed" in ended[0]


def test_engines_that_come_and_go_leave_nothing(right):
    store, _ = right

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = None
    for index in range(60):
        resident = dict.fromkeys(store.tensors, index % 3 - 1)
        changes = {"queued": index % 2 == 0}
        with NativeBackend(store, placement(resident, **changes)) as backend:
            if index % 4:
                backend.run(TOKENS, 0, logits="none")
        before = before or count()
    assert count() == before


def test_tokens_that_no_model_has(right):
    store, expected = right
    rng = random.Random(0)
    with NativeBackend(store, placement({"token_embd": NOTHING}, max_logit_rows=8)) as backend:
        for _ in range(300):
            tokens = [rng.choice([0, 5, 699, 700, -1, 2**31, -(2**40)]) for _ in range(3)]
            position = rng.choice([0, 1, 3, 60, 64, -1, 2**31])
            try:
                backend.run(tokens, position, logits=rng.choice(["all", "last", "none"]))
            except InputError:
                continue
            assert all(0 <= token < 700 for token in tokens)
        np.testing.assert_array_equal(backend.run(TOKENS, 0), expected)


# --- Models that are none ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with engine_home(tmp_path_factory.mktemp("home") / "mutirao") as home:
        yield home


def test_weights_that_are_no_numbers(home, tmp_path):
    """Scales beyond float16: infinite, so that nothing comes out of the model."""
    with np.errstate(over="ignore"):
        path = write_synthetic_gguf(tmp_path / "infinite.gguf", deviation=1e9)
    with Engine.open(path) as engine:
        for temperature in (0.0, 1.0):
            with pytest.raises(InferenceError, match="logits are not numbers"):
                engine.generate("The", max_new_tokens=5, temperature=temperature)


def test_an_engine_on_an_altered_store(home, tmp_path):
    path = write_synthetic_gguf(tmp_path / "model.gguf")
    with Engine.open(path) as engine:
        expected = engine.generate("The", max_new_tokens=5).text
        store = engine.store
    flip(store, store.tensors["blk.1.ffn_up"].planes[0].offset + 1000)
    with pytest.raises(InferenceError, match=re.escape(str(store.directory))):
        Engine.open(path)
    result = mutirao(home, "run", str(path), "--prompt", "The", "--max-new-tokens", "5")
    assert result.returncode == 1
    assert "a checksum does not match" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    shutil.rmtree(store.directory)
    with Engine.open(path) as engine:
        assert engine.generate("The", max_new_tokens=5).text == expected


def mutirao(home, *arguments):
    return subprocess.run(
        [MUTIRAO, *arguments],
        env=child_environment(home),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=60,
    )


# --- Interrupts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_path(tmp_path_factory):
    """A model that would write for a long time."""
    path = tmp_path_factory.mktemp("model") / "long.gguf"
    return write_synthetic_gguf(path, hidden=1024, inner=2816, num_layers=4, context=100_000)


def num_threads_of(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("Threads:")[1].split()[0])


@pytest.mark.parametrize("when", ["generating", "streaming", "reading the prompt"])
def test_interrupts_end_a_command_with_130(home, long_path, when):
    prompt = "The" if when != "reading the prompt" else "x" * 60_000
    options = ["--max-new-tokens", "30000", "--context", "90000", "--prompt", prompt]
    if when == "streaming":
        least = mutirao(home, "run", str(long_path), "--memory", "1MB", *options).stderr
        least_mb = int(re.search(r"at least\s+(\d+)\s+MB", least)[1])
        options += ["--memory", f"{least_mb + 5}MB"]
    process = subprocess.Popen(
        [MUTIRAO, "run", str(long_path), *options],
        env=child_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        if when == "reading the prompt":
            while num_threads_of(process) == 1:
                time.sleep(0.01)
            time.sleep(0.3)
        else:
            assert process.stdout.read(1)
            time.sleep(0.2)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED_EXIT_CODE
    assert b"Traceback" not in stderr
