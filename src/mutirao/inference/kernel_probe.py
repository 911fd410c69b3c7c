"""Time the kernels: products in every arrangement of planes, attention, norms, barriers.

The C functions are in native/probe.c; they run the same kernels on as many threads as the
engine does, over matrices that no cache holds. Part of the probe.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InferenceError
from mutirao.inference.machine import PRODUCT_TOKENS, ProductSpeed, merged_widths
from mutirao.inference.native.library import ProbeMatrix, load_library
from mutirao.inference.plane_formats import FORMATS, PANEL_ROWS, Format
from mutirao.inference.timing import (
    MAX_SECONDS,
    ROUNDS,
    SHORT_REPETITIONS,
    lower_quartile,
    median_and_spread,
    room_bytes,
)

MATRIX_BYTES = 48 << 20
"""A matrix: larger than the caches of most machines; more where they say theirs is larger."""
MAX_MATRIX_BYTES = 192 << 20
MIN_MATRIX_BYTES = 4 << 20
KV_BYTES = 512 << 10
"""Keys and values that a core's cache holds (assumption)."""
MATRIX_COLUMNS = 4096
PRODUCT_S = 0.03
"""No product takes much longer: the matrix is smaller where there are many tokens."""
FILL = 0x2C
"""Bytes of the matrices: 0.066 as float16, so that no number is denormal or infinite."""

_SCALES_KINDS = {"": 0, "H": 1, "HM": 2, "K6": 3, "K8": 4}
_FLOAT_KINDS = {"F32": 1, "F16": 2, "BF16": 3}
_DRAFTED = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Formats that are timed in all arrangements, one for each number of bits."""


def arrangements(form: Format) -> list[tuple[int, ...]]:
    """Return the widths in which a matrix's planes may be multiplied; the whole, merged, first.

    With the first ``n`` planes resident, drafts multiply those, merged; full passes multiply
    those and the streamed ones.
    """
    if form.is_float:
        return [()]
    num_planes = len(form.plane_widths)
    found = [merged_widths(form, num_planes), form.plane_widths]
    for num in range(1, num_planes):
        resident = merged_widths(form, num)
        found += [resident, resident + form.plane_widths[num:]]
    return list(dict.fromkeys(found))


def measure_products(kernels: str, num_threads: int) -> tuple[ProductSpeed, ...]:
    """Time products of every format: all arrangements of some, the whole matrix of the others.

    Args:
        kernels: by name.
        num_threads: that multiply together.
    """
    cases = [
        (form, widths)
        for form in FORMATS.values()
        for widths in arrangements(form)[: None if form.name in _DRAFTED else 1]
    ]
    buffer = np.full(matrix_bytes(), FILL, np.uint8)
    times: dict[tuple[str, tuple[int, ...], int], list[float]] = {}
    estimates: dict[tuple[str, tuple[int, ...]], float] = {}
    started_s = time.perf_counter()
    for _ in range(ROUNDS):
        for form, widths in cases:
            for num_tokens in PRODUCT_TOKENS:
                most = PRODUCT_S / estimates.get((form.name, widths), 1e-12) / num_tokens
                cost = _time_product(kernels, num_threads, form, widths, num_tokens, buffer, most)
                if num_tokens == 1:
                    estimates[form.name, widths] = cost
                times.setdefault((form.name, widths, num_tokens), []).append(cost)
        if time.perf_counter() - started_s > MAX_SECONDS:
            break
    products = []
    for form, widths in cases:
        found = [times[form.name, widths, num] for num in PRODUCT_TOKENS]
        costs = tuple(map(lower_quartile, found))
        spread = statistics.median(median_and_spread(each)[1] for each in found)
        products.append(ProductSpeed(form.name, widths, costs, spread))
    return tuple(products)


def _time_product(
    kernels: str,
    num_threads: int,
    form: Format,
    widths: tuple[int, ...],
    num_tokens: int,
    buffer: NDArray[np.uint8],
    most_weights: float,
) -> float:
    """Return the seconds per weight of one product with a matrix of at most so many weights."""
    bits = sum(widths) if widths else form.bits
    panel_bytes = MATRIX_COLUMNS * PANEL_ROWS * bits // 8
    panel_bytes += MATRIX_COLUMNS // form.block_columns * form.scales_bytes
    per_panel = MATRIX_COLUMNS * PANEL_ROWS
    num_panels = max(min(buffer.nbytes // panel_bytes, int(most_weights / per_panel)), 2)
    matrix = ProbeMatrix(
        kind=_FLOAT_KINDS.get(form.name, 0),
        bits=form.bits,
        scales_kind=_SCALES_KINDS[form.scales],
        num_rows=num_panels * PANEL_ROWS,
        num_columns=MATRIX_COLUMNS,
        num_planes=max(len(widths), 1),
        widths=(ctypes.c_int32 * 5)(*(widths or (form.bits,))),
    )
    seconds = _quick_s(
        load_library().probe_matmul,
        *(kernels.encode(), num_threads, ctypes.byref(matrix)),
        *(buffer.ctypes.data, buffer.nbytes, num_tokens),
        num=1,
    )
    return seconds / (num_panels * per_panel)


def matrix_bytes() -> int:
    """Return the size of a matrix that no cache holds, as far as there is memory for it."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        cache_bytes = int(text.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        cache_bytes = 0
    wanted = min(max(MATRIX_BYTES, cache_bytes * 3 // 2), MAX_MATRIX_BYTES)
    return min(wanted, max(room_bytes(), MIN_MATRIX_BYTES))


def waited_s() -> float:
    """Return how long this thread, one of those that compute, has waited for a processor."""
    try:
        text = Path("/proc/thread-self/schedstat").read_text(encoding="ascii")
        return int(text.split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0  # the kernel does not keep it


def measure_attention(kernels: str, num_threads: int) -> tuple[float, float]:
    """Return the seconds per value of attention to keys in a cache, and what memory adds.

    As in the engine, keys and values lie in small pages, whose addresses are not at hand either.
    """
    num_bytes = matrix_bytes()
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = FILL
    head_dim, times = 128, []
    for num_heads, used_bytes in ((4 * num_threads, KV_BYTES * num_threads), (64, num_bytes)):
        num_positions = used_bytes // (4 * head_dim * num_heads) // 16 * 16
        seconds = _quick_s(
            load_library().probe_attention,
            *(kernels.encode(), num_threads, num_heads, head_dim, num_positions),
            *(buffer.ctypes.data, buffer.nbytes),
        )
        times.append(seconds / (num_heads * head_dim * num_positions))
    cached, cold = times
    return cached, max(cold - cached, 0.0)


def measure_rows(kernels: str, row_op: int) -> float:
    """Return the seconds per value, on one thread, of an op that takes rows apart.

    Args:
        kernels: by name.
        row_op: 0 RMS norm, 1 SiLU times a gate, 2 quantizing.
    """
    width, num_rows = 4096, 64
    rows = load_library().probe_rows
    return _quick_s(rows, kernels.encode(), 1, row_op, width, num_rows) / (width * num_rows)


def measure_loop(num_threads: int) -> float:
    """Return the seconds of handing out work to all threads and meeting at its end."""
    num_loops = 100
    return _quick_s(load_library().probe_barriers, num_threads, num_loops) / num_loops


def measure_logits(function: Callable[[NDArray[np.float32]], object]) -> float:
    """Time what Python does with a row of logits, as in ``decoding``."""
    row, seconds = np.zeros(1 << 17, np.float32), []
    for _ in range(SHORT_REPETITIONS):
        begin_s = time.perf_counter()
        function(row)
        seconds.append(time.perf_counter() - begin_s)
    return lower_quartile(seconds) / row.size


def _quick_s(
    function: Callable[..., int], *arguments: object, num: int = SHORT_REPETITIONS
) -> float:
    """Have a function of the library time itself some times; return the lower quartile."""
    seconds = (ctypes.c_double * num)()
    if function(*arguments, num, ctypes.byref(seconds)) != 0:
        raise InferenceError("no memory or no threads to probe the kernels with")
    return lower_quartile(list(seconds))
