"""The native library, or a skip that says why it is not there; and its instruction sets."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from kernel_calls import INSTRUCTION_SETS, is_supported
from small_stores import skip_without_kernels

from mutirao.inference.native.library import load_library


@pytest.fixture(scope="session", autouse=True)
def library() -> ctypes.CDLL:
    skip_without_kernels()
    return load_library()


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[str]:
    """The name of an instruction set that this machine has."""
    if not is_supported(request.param):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_pytorch() -> Iterator[None]:
    """The oracle's small operations take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
