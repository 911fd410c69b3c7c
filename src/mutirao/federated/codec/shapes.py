"""Named tensors, and the check that they are those that were agreed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError

Tensors: TypeAlias = Mapping[str, NDArray[np.float32]]
"""An update or a model's trained part: float32 arrays by name."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shapes that were agreed, by name."""

_MAX_NAME = 64
"""Characters of a stranger's name that are shown."""


def shapes_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors, by name."""
    return {name: array.shape for name, array in tensors.items()}


def count_values(shape: tuple[int, ...]) -> int:
    """Return how many values a tensor of this shape holds."""
    return math.prod(shape)


def check_names(names: Mapping[str, Any], shapes: Shapes, who: str) -> None:
    """Refuse tensors that are missing, or were not agreed.

    Args:
        names: what came, by name.
        shapes: what was agreed.
        who: begins the sentence, for example "site north".

    Raises:
        UpdateError: with the first such name.
    """
    for name in sorted(shapes.keys() - names.keys()):
        raise UpdateError(f"{who} sent no tensor {name!r} (expected {len(shapes)} tensors)")
    strangers = names.keys() - shapes.keys()
    for name in sorted(str(each)[:_MAX_NAME] for each in strangers):
        raise UpdateError(f"{who} sent a tensor {name!r} that was not agreed")


def check_tensors(tensors: Mapping[str, NDArray[Any]], shapes: Shapes, who: str) -> None:
    """Refuse tensors of other names, shapes or types than agreed, or with values not finite.

    Args:
        tensors: what came, by name.
        shapes: what was agreed.
        who: begins the sentence, for example "site north".

    Raises:
        UpdateError: with the name of the first such tensor.
    """
    check_names(tensors, shapes, who)
    for name, shape in shapes.items():
        array = tensors[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise UpdateError(
                f"{who} sent tensor {name!r} as {array.dtype} of shape {array.shape} "
                f"(expected float32 of shape {shape})"
            )
        if not is_finite(array):
            raise UpdateError(f"{who} sent tensor {name!r} with values that are not finite")


def is_finite(array: NDArray[Any]) -> bool:
    """Whether all values are finite; extremes tell it, without an array of answers."""
    with np.errstate(invalid="ignore"):
        largest, smallest = array.max(initial=0.0), array.min(initial=0.0)
    return bool(np.isfinite(largest) and np.isfinite(smallest))
