"""Threads that come and go with how crowded the machine is."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess

import numpy as np
import pytest
from small_stores import SPECS, make_store, mixed_formats

from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.native.build import HERE

PROGRAM = """
#include "crowding.h"
static crowding c;
void begin(int most) { crowding_begin(&c, most); }
int learn(int mode, double seconds) { crowding_learn(&c, mode, seconds); return c.threads; }
"""


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    """The rule alone, compiled."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("crowding")
    (folder / "crowding.c").write_text(PROGRAM)
    command = [compiler, "-shared", "-fPIC", "-I", str(HERE), str(folder / "crowding.c")]
    subprocess.run([*command, "-o", str(folder / "crowding.so")], check=True)
    library = ctypes.CDLL(str(folder / "crowding.so"))
    library.learn.argtypes = [ctypes.c_int, ctypes.c_double]
    return library


def follow(rule, seconds_by_threads, num_passes, threads, *, noise=0.03, modes=(0,), seed=0):
    """Feed it passes that take so long with so many threads; return the threads of each."""
    rng, used = random.Random(seed), []
    for index in range(num_passes):
        used.append(threads)
        mode = modes[index % len(modes)]
        factor = (1 + noise * rng.uniform(-1, 1)) * (1 + mode)
        threads = rule.learn(mode, seconds_by_threads[threads] * factor)
    return used


QUIET = {1: 0.035, 2: 0.031}
CROWDED = {1: 0.036, 2: 0.087}


@pytest.mark.parametrize("modes", [(0,), (0, 1, 1, 1)])
def test_fewer_threads_while_it_is_crowded_and_all_of_them_after(rule, modes):
    rule.begin(2)
    assert follow(rule, QUIET, 300, 2, modes=modes).count(1) == 3  # tried once
    crowded = follow(rule, CROWDED, 600, 2, modes=modes)
    assert crowded[100:].count(1) > 0.9 * 500
    after = follow(rule, QUIET, 600, crowded[-1], modes=modes)
    assert after[300:].count(2) > 0.95 * 300


def test_more_threads_are_kept_where_they_are_faster_even_if_slow(rule):
    rule.begin(2)
    follow(rule, QUIET, 100, 2)
    used = follow(rule, {1: 0.12, 2: 0.087}, 600, 2)
    assert used[50:].count(2) > 0.9 * 550


def test_it_was_crowded_from_the_start(rule):
    rule.begin(2)
    used = follow(rule, CROWDED, 600, 2)
    assert used[20:].count(1) > 0.9 * 580


def test_many_threads(rule):
    rule.begin(16)
    seconds = {threads: 0.1 / threads for threads in range(1, 17)}
    assert follow(rule, seconds, 200, 16).count(16) == 197
    crowded = seconds | {16: 0.05, 15: 0.05}
    assert follow(rule, crowded, 400, 16)[-1] <= 14
    assert follow(rule, seconds, 2000, 13)[-1] == 16


def test_any_number_of_threads_at_any_time_gives_the_same(tmp_path):
    spec = SPECS["qwen2"]
    store = make_store(tmp_path, spec, mixed_formats(spec))
    tokens = np.random.default_rng(0).integers(0, 300, 24).tolist()
    rng = random.Random(1)
    for resident in ({}, dict.fromkeys(store.tensors, NOTHING)):
        placement = Placement(resident, num_threads=4, context=64, max_logit_rows=32)
        with NativeBackend(store, placement) as backend:
            backend.use_threads(1)
            assert backend.num_threads == 1
            expected = backend.run(tokens, 0, logits="all")
            end = len(tokens)
            for _ in range(150):
                backend.use_threads(rng.choice([1, 2, 3, 4, 9]))
                begin = rng.randrange(min(end + 1, len(tokens)))
                end = rng.choice([begin + 1, len(tokens)])
                got = backend.run(tokens[begin:end], begin, logits="all")
                np.testing.assert_array_equal(got, expected[begin:end])
            backend.use_threads(0)
            backend.run(tokens, 0)
            for position in range(24):
                backend.run(tokens[position : position + 1], position)
            assert 1 <= backend.num_threads <= 4
