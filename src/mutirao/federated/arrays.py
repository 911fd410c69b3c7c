"""Named arrays in safetensors files, written atomically, for the journals of both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mutirao.artifact import write_atomic
from mutirao.errors import ArtifactError


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to one safetensors file, atomically."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, save(contiguous))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        arrays: dict[str, NDArray[Any]] = load(path.read_bytes())
        return arrays
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"the journal {path} is damaged ({error}); remove {path.parent} to train anew"
        ) from None
