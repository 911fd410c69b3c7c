"""The C library, loaded by ctypes.

An installed package brings it along; in a checkout, or where the sources have changed since,
it is compiled when it is first wanted (about half a minute). Where there is neither a library
nor a compiler, ``load_library`` says so and inference falls back to plain PyTorch. Plain ctypes,
so that the interpreter's lock is free while C runs, and one build serves all Python versions.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
from pathlib import Path

from mutirao.console import console
from mutirao.environment import cache_directory
from mutirao.errors import MissingKernelError
from mutirao.inference.native.build import HERE, CompileError, compile_library, library_name


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return the library, compiled first if need be.

    Raises:
        MissingKernelError: it is switched off (MUTIRAO_KERNELS=none), or cannot be had.
    """
    if os.environ.get("MUTIRAO_KERNELS") == "none":
        raise MissingKernelError("the native kernels are switched off by MUTIRAO_KERNELS=none")
    return _declare(ctypes.CDLL(str(_find_or_compile())))


def built_library() -> Path | None:
    """Return the library of the sources as they are; None where it is yet to be compiled."""
    places = (HERE / library_name(), cache_directory() / "kernels" / library_name())
    return next((path for path in places if path.is_file()), None)


def _find_or_compile() -> Path:
    if built := built_library():
        return built
    path = cache_directory() / "kernels" / library_name()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            console.print("compiling the inference kernels, once", style="dim")
            try:
                compile_library(path)
            except CompileError as error:
                raise MissingKernelError(f"there are no native kernels: {error}") from None
    return path


class Extent(ctypes.Structure):
    """A range of the weight store's file, in bytes; mirrors weights.h."""

    _fields_ = (
        ("offset", ctypes.c_int64),
        ("num_bytes", ctypes.c_int64),
        ("first_checksum", ctypes.c_int64),
    )


class TensorDescription(ctypes.Structure):
    """A matrix, and how much of it is resident; mirrors weights.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "bits", "scales_kind")),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_columns", "num_planes")),
        ("widths", ctypes.c_int32 * 5),
        *((name, ctypes.c_int32) for name in ("resident_planes", "whole_kind", "joined")),
        ("centre", ctypes.c_float),
        ("scales", Extent),
        ("planes", Extent * 5),
    )


class OpDescription(ctypes.Structure):
    """An operation of a program; mirrors engine.c."""

    _fields_ = (
        *((n, ctypes.c_int32) for n in ("kind", "input", "out", "weight", "bias", "other")),
        *((n, ctypes.c_int32) for n in ("third", "accumulate", "layer", "num_heads")),
        *((n, ctypes.c_int32) for n in ("num_kv_heads", "head_dim", "width", "window")),
        *((n, ctypes.c_int32) for n in ("flag", "amount")),
        ("factor", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


class ProbeMatrix(ctypes.Structure):
    """A matrix in one arrangement of planes, for the probe; mirrors probe.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "bits", "scales_kind")),
        *((n, ctypes.c_int32) for n in ("num_rows", "num_columns", "num_planes", "whole_kind")),
        ("widths", ctypes.c_int32 * 5),
    )


class Settings(ctypes.Structure):
    """What an engine is made for; mirrors engine.c."""

    _fields_ = (
        *((n, ctypes.c_int32) for n in ("num_threads", "num_readers", "direct", "queued")),
        *((n, ctypes.c_int32) for n in ("max_tokens", "num_layers", "num_kv_heads", "head_dim")),
        ("max_positions", ctypes.c_int32),
        ("ring_bytes", ctypes.c_int64),
        ("piece_bytes", ctypes.c_int64),
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures: dict[str, tuple[object, list[object]]] = {
        "engine_best_kernels": (text, []),
        "engine_create": (pointer, [text, text, ctypes.POINTER(Settings)]),
        "engine_error": (text, [pointer]),
        "engine_kernels": (text, [pointer]),
        "engine_describe": (
            number,
            [
                *(pointer, ctypes.POINTER(TensorDescription), number),
                *(pointer, pointer, number, pointer, pointer, number),
                *(ctypes.POINTER(OpDescription), number, pointer, ctypes.c_int64),
            ],
        ),
        "engine_load": (number, [pointer]),
        "engine_cancel": (None, [pointer]),
        "engine_bytes_loaded": (ctypes.c_int64, [pointer]),
        "engine_bytes_read": (ctypes.c_int64, [pointer]),
        "engine_is_queued": (number, [pointer]),
        "engine_wait_s": (ctypes.c_double, [pointer]),
        "engine_op_s": (ctypes.c_double, [pointer, number]),
        "engine_num_pieces": (number, [pointer]),
        "engine_threads": (number, [pointer]),
        "engine_use_threads": (None, [pointer, number]),
        "engine_set_draft_planes": (None, [pointer, number, number]),
        "engine_destroy": (None, [pointer]),
        "engine_run": (number, [*(pointer, pointer), *([number] * 5), pointer, number]),
        "engine_buffer": (pointer, [pointer, number, ctypes.POINTER(ctypes.c_int32)]),
        "kernels_matmul": (
            number,
            [
                *(text, ctypes.POINTER(TensorDescription), number, pointer, pointer, number),
                *(pointer, number, pointer, number, pointer, number),
            ],
        ),
        "probe_matmul": (
            number,
            [
                *(text, number, ctypes.POINTER(ProbeMatrix), pointer, ctypes.c_int64),
                *(number, number, pointer),
            ],
        ),
        "probe_attention": (
            number,
            [text, *([number] * 4), pointer, ctypes.c_int64, number, pointer],
        ),
        "probe_rows": (number, [text, *([number] * 5), pointer]),
        "probe_barriers": (number, [number, number, number, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
