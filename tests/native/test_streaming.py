"""Streamed weights give the very logits of resident ones, however they are cut and read."""

from __future__ import annotations

import dataclasses
import os
import random
import threading

import numpy as np
import pytest
from small_stores import SPECS, make_store, mixed_formats
from tiny_gguf import FLOATS, SPLITS

from mutirao.errors import InferenceError
from mutirao.inference.native.backend import ALL_PLANES, NOTHING, NativeBackend, Placement
from mutirao.inference.planning.memory_use import least_ring_bytes

SPEC = dataclasses.replace(SPECS["llama"], vocab_size=700, ffn_dim=768)
"""Matrices of up to three slabs of 256 rows."""
TOKENS = np.random.default_rng(1).integers(0, 700, 21).tolist()
LARGEST_SLAB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Every quantized format; one matrix of each float format, whole and split."""
    formats = mixed_formats(SPEC)
    floats = ("blk.0.attn_v", "blk.1.ffn_up", "output", "blk.0.ffn_down", "blk.1.attn_output")
    for name, form in zip(floats, (*FLOATS, *SPLITS), strict=True):
        formats[name] = form
    return make_store(tmp_path_factory.mktemp("store"), SPEC, formats)


@pytest.fixture(scope="module")
def expected(store):
    with NativeBackend(store, placement({})) as backend:
        return backend.run(TOKENS, 0, logits="all")


def placement(resident, **changes):
    small = {"context": 32, "max_logit_rows": 32, "num_readers": 3, "ring_bytes": 4 << 20}
    return Placement(resident, **small | {"piece_bytes": 1 << 16} | changes)


def check(store, expected, resident, **changes):
    """Run chunks of several sizes, parts of them again, and drafts in between."""
    with NativeBackend(store, placement(resident, **changes)) as backend:
        np.testing.assert_array_equal(backend.run(TOKENS, 0, logits="all"), expected)
        np.testing.assert_array_equal(backend.run(TOKENS[:1], 0), expected[:1])
        backend.run(TOKENS[1:3], 1, mode="draft")
        got = backend.run(TOKENS[1:4], 1, logits="all")
        np.testing.assert_array_equal(got, expected[1:4])
        backend.run(TOKENS[4:], 4, logits="none")
        np.testing.assert_array_equal(backend.run(TOKENS[-1:], 20), expected[-1:])
        return backend.bytes_read


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("planes", [NOTHING, 0, 1, 2, 3, 4, 5])
def test_any_number_of_planes(store, expected, planes, direct):
    resident = dict.fromkeys(store.tensors, planes)
    for num_threads in (1, 2, 3):
        check(store, expected, resident, direct=direct, num_threads=num_threads)


@pytest.mark.parametrize("joined", [True, False])
def test_all_resident_reads_nothing(store, expected, joined):
    assert check(store, expected, {"token_embd": ALL_PLANES}, joined=joined) == 0


def test_any_mixture(store, expected):
    rng = random.Random(0)
    for _ in range(25):
        resident = {
            name: rng.choice([NOTHING, *range(len(tensor.planes) + 1), ALL_PLANES])
            for name, tensor in store.tensors.items()
        }
        changes = {
            "num_threads": rng.choice([1, 2, 3]),
            "num_readers": rng.choice([1, 2, 8]),
            "ring_bytes": rng.choice([LARGEST_SLAB, (1 << 20) + 4096, 1 << 24]),
            "piece_bytes": rng.choice([1, 1 << 14, 1 << 18]),
            "max_tokens": rng.choice([3, 64]),
            "direct": rng.random() < 0.5,
            "joined": rng.random() < 0.5,
            "kernels": rng.choice(["", "scalar"]),
        }
        if changes["max_tokens"] == 3:
            with NativeBackend(store, placement(resident, **changes)) as backend:
                np.testing.assert_array_equal(backend.run(TOKENS, 0), expected[-1:])
        else:
            check(store, expected, resident, **changes)


def has_room(store, where):
    try:
        NativeBackend(store, where).close()
    except InferenceError as error:
        if "read-ahead is smaller than one piece" in str(error):
            return False
        raise
    return True


def least_ring(store, resident, piece_bytes):
    """Find the smallest ring, in pages, that this placement can be streamed through."""
    low, high = 0, 1 << 12
    while high - low > 1:
        middle = (low + high) // 2
        changes = {"ring_bytes": middle * 4096, "piece_bytes": piece_bytes}
        if has_room(store, placement(resident, **changes)):
            high = middle
        else:
            low = middle
    return high * 4096


@pytest.mark.parametrize("piece_bytes", [1, 1 << 16])
@pytest.mark.parametrize("planes", [NOTHING, 2])
def test_rings_down_to_a_single_piece(store, expected, planes, piece_bytes):
    resident = dict.fromkeys(store.tensors, planes)
    least = least_ring(store, resident, piece_bytes)
    assert least <= least_ring_bytes(SPEC, store.tensors, piece_bytes)
    for ring_bytes in (least, least + 4096, 2 * least - 4096, 2 * least):
        for num_readers in (1, 2, 8):
            changes = {"ring_bytes": ring_bytes, "num_readers": num_readers}
            check(store, expected, resident, piece_bytes=piece_bytes, **changes)


def test_bytes_read_are_those_of_the_streamed_extents(store, expected):
    resident = dict.fromkeys(store.tensors, NOTHING) | {"token_embd": ALL_PLANES}
    with NativeBackend(store, placement(resident, ring_bytes=LARGEST_SLAB)) as backend:
        backend.run(TOKENS, 0)
        before = backend.bytes_read
        for _ in range(10):
            backend.run(TOKENS, 0)
        a_pass = (backend.bytes_read - before) / 10
        streamed = sum(tensor.num_bytes for tensor in store.tensors.values())
        streamed -= store.tensors["token_embd"].num_bytes
        num_reads = sum(2 * len(tensor.extents) for tensor in store.tensors.values()) * 3
        ahead = LARGEST_SLAB / 10  # what the ring held when counting began and ended
        assert streamed - ahead <= a_pass <= streamed + num_reads * 4096 + ahead
        assert backend.wait_s > 0


def test_reads_by_a_queue_of_the_kernel(store, expected):
    for planes in (NOTHING, 0, 2):
        resident = dict.fromkeys(store.tensors, planes)
        with NativeBackend(store, placement(resident, queued=True)) as backend:
            if not backend.is_queued:
                pytest.skip("io_uring is not allowed here")
        for changes in ({}, {"ring_bytes": LARGEST_SLAB, "piece_bytes": 1}, {"num_readers": 1}):
            check(store, expected, resident, queued=True, **changes)
            check(store, expected, resident, queued=True, direct=False, **changes)


def test_drafts_read_nothing(store):
    resident = {name: min(2, len(tensor.planes)) for name, tensor in store.tensors.items()}
    with NativeBackend(store, placement(resident, ring_bytes=LARGEST_SLAB)) as backend:
        full = backend.run(TOKENS, 0)
        draft = backend.run(TOKENS, 0, mode="draft")
        assert np.abs(full - draft).max() > 0.01
        # Reading ahead ends when the ring is full; the embedding's rows are read each time.
        for _ in range(100):
            before = backend.bytes_read
            backend.run(TOKENS, 0, mode="draft")
            if backend.bytes_read - before < 1 << 18:
                break
        else:
            pytest.fail("drafts go on reading")
        np.testing.assert_array_equal(backend.run(TOKENS, 0), full)


@pytest.mark.parametrize("name", SPLITS)
def test_drafts_of_resident_split_floats_read_their_codes(name, tmp_path):
    store = make_store(tmp_path, SPEC, name)
    codes = dict.fromkeys(store.tensors, 4)
    with NativeBackend(store, placement(codes)) as backend:
        expected = backend.run(TOKENS, 0, mode="draft")
        full = backend.run(TOKENS, 0)
    with NativeBackend(store, placement({})) as backend:
        np.testing.assert_array_equal(backend.run(TOKENS, 0, mode="draft"), expected)
        np.testing.assert_array_equal(backend.run(TOKENS, 0), full)
    with NativeBackend(store, placement({}, joined=True)) as backend:
        np.testing.assert_array_equal(backend.run(TOKENS, 0, mode="draft"), full)


def test_drafts_of_streamed_matrices_read_their_first_planes(store):
    nothing = dict.fromkeys(store.tensors, NOTHING)
    for name, tensor in store.tensors.items():
        if tensor.scales is None or name == "token_embd":
            continue
        for planes in range(1, len(tensor.planes)):
            # Joined, as the other split floats are read whole where they are streamed.
            with NativeBackend(store, placement({name: planes}, joined=True)) as backend:
                right = backend.run(TOKENS, 0, mode="draft")
            with NativeBackend(store, placement(nothing)) as backend:
                backend.set_draft_planes(name, planes)
                np.testing.assert_array_equal(backend.run(TOKENS, 0, mode="draft"), right)
                backend.set_draft_planes(name, 0)
                assert np.abs(backend.run(TOKENS, 0, mode="draft") - right).max() > 1e-4


def test_a_file_system_without_direct_reads(store, expected, tmp_path):
    shared = "/dev/shm"
    if not os.access(shared, os.W_OK):
        pytest.skip(f"{shared} cannot be written")
    path = f"{shared}/mutirao-test-{os.getpid()}"
    os.mkdir(path)
    try:
        content = store.weights_path.read_bytes()
        with open(f"{path}/weights.bin", "wb") as file:
            file.write(content)
        other = dataclasses.replace(store, directory=type(store.directory)(path))
        check(other, expected, dict.fromkeys(store.tensors, 2), direct=True)
    finally:
        for name in os.listdir(path):
            os.remove(f"{path}/{name}")
        os.rmdir(path)


def test_a_path_that_is_no_text(store, expected, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    os.link(store.weights_path, f"{folder}/weights.bin")
    other = dataclasses.replace(store, directory=type(store.directory)(folder))
    check(other, expected, dict.fromkeys(store.tensors, 2))


@pytest.mark.parametrize("num_readers", [0, -1, 65])
def test_numbers_of_readers_that_are_not_supported(store, num_readers):
    with pytest.raises(InferenceError, match="1 to 64 threads"):
        NativeBackend(store, placement({"output": NOTHING}, num_readers=num_readers))


def test_several_engines_at_a_time(store, expected):
    results = {}

    def run(index):
        resident = dict.fromkeys(store.tensors, index - 1)
        with NativeBackend(store, placement(resident, num_threads=2)) as backend:
            results[index] = [backend.run(TOKENS, 0, logits="all") for _ in range(5)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        for got in results[index]:
            np.testing.assert_array_equal(got, expected)
