"""What sites hold in rounds of aggregation 'stacked' and 'fedex', by name.

A state is float32 tensors: those of the adapter, named as PEFT names them
(``<module>.lora_A.default.weight``), and for each adapted layer the history of what earlier
rounds learned, ``<module>.history_B`` (O, R) and ``<module>.history_A`` (R, I). How states
follow one another is told in ``low_rank_rounds``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError
from mutirao.federated.aggregation.low_rank import Factors, concatenate, recompress
from mutirao.federated.codec.shapes import Shapes, Tensors

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?P<end>(\.[^.]+)*)")
_HISTORY = re.compile(r"(?P<module>.+)\.history_(?P<factor>[AB])")


def start_adapter(
    shapes: Shapes, *, rank: int | None = None, seed: int, round_number: int
) -> dict[str, NDArray[np.float32]]:
    """Return the adapter that a round of 'stacked' starts from: A drawn anew, B zero.

    A is uniform within ±1/√I, as PEFT draws it, from the raw words of a Philox generator, whose
    stream is the same on every machine and version of NumPy.

    Args:
        shapes: of the adapter's tensors, by name, at any rank.
        rank: of this site; None for that of ``shapes``.
        seed: the plan's.
        round_number: from 1.
    """
    start = {}
    for name, size in (shapes_at_rank(shapes, rank) if rank else shapes).items():
        match = _match_factor(name)
        if match["factor"] == "B":
            start[name] = np.zeros(size, np.float32)
            continue
        text = repr((seed, round_number, match["module"])).encode()
        key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
        words = np.random.Philox(key=key).random_raw(size[0] * size[1])
        steps = (words >> np.uint64(40)).astype(np.float64)  # 24 bits, as float32 holds
        bound = 1 / np.sqrt(max(size[1], 1))
        start[name] = ((steps * 2.0**-23 - 1.0) * bound).astype(np.float32).reshape(size)
    return start


def advance(
    state: Tensors, form: Literal["change", "whole"], tensors: Tensors
) -> dict[str, NDArray[np.float32]]:
    """Return the next state, on every side from the same decoded tensors.

    Histories get more columns, adapters are added to, each value rounded once in float32; a
    layer may come into the history later than others.

    Raises:
        UpdateError: a tensor does not fit the state.
    """
    if form == "whole":
        return dict(sorted(tensors.items()))
    new = dict(state)
    for name, values in tensors.items():
        match = _HISTORY.fullmatch(name)
        old = state.get(name)
        try:
            if match is None:
                if state[name].shape != values.shape:
                    raise ValueError
                new[name] = np.asarray(state[name] + values, np.float32)
            elif old is not None:
                new[name] = np.concatenate([old, values], axis=int(match["factor"] == "B"))
            else:
                new[name] = values
        except (KeyError, ValueError):
            raise UpdateError(
                f"a change of tensor {name!r} of shape {values.shape} does not fit the state"
            ) from None
    return dict(sorted(new.items()))


def history_shapes(adapter: Shapes, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the shapes of history tensors that come with these ranks.

    Args:
        adapter: shapes of the adapter's tensors, by name.
        ranks: from ``StateFields.ranks``; a stranger's.

    Raises:
        UpdateError: a module is not adapted, or a rank is negative.
    """
    names = factor_names(dict.fromkeys(adapter))
    shapes: dict[str, tuple[int, int]] = {}
    for module, rank in sorted(ranks.items()):
        if module not in names or rank < 0:
            raise UpdateError(f"history of rank {rank} came for {module[:64]!r} (not adapted here)")
        name_b, name_a = names[module]
        shapes[f"{module}.history_A"] = (rank, adapter[name_a][1])
        shapes[f"{module}.history_B"] = (adapter[name_b][0], rank)
    return shapes


def history_ranks(shapes: Shapes) -> dict[str, int]:
    """Return the columns of each history in a state of these shapes, by module."""
    matches = {name: _HISTORY.fullmatch(name) for name in sorted(shapes)}
    return {
        match["module"]: shapes[name][0]
        for name, match in matches.items()
        if match and match["factor"] == "A"
    }


def shapes_at_rank(adapter: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors at another rank."""
    return {
        name: (rank, shape[1]) if _match_factor(name)["factor"] == "A" else (shape[0], rank)
        for name, shape in adapter.items()
    }


def split_state(state: Tensors) -> tuple[dict[str, NDArray[np.float32]], dict[str, Factors]]:
    """Return the adapter's tensors by name, and the history by module."""
    adapter = {name: values for name, values in state.items() if not _HISTORY.fullmatch(name)}
    modules = sorted({m["module"] for name in state if (m := _HISTORY.fullmatch(name))})
    try:
        history = {
            each: Factors(state[f"{each}.history_B"], state[f"{each}.history_A"])
            for each in modules
        }
    except KeyError as error:
        raise UpdateError(f"a state has half a history: no tensor {error}") from None
    return adapter, history


def sum_as_adapter(
    state: Tensors, *, scale: float = 1.0, max_rank: int | None = None
) -> tuple[dict[str, Factors], int, float]:
    """Return a state as one adapter: history plus adapter, filled up to one rank, with scale 1.

    Args:
        state: of 'stacked' or 'fedex'.
        scale: alpha / rank of its adapter.
        max_rank: bound of the rank, whatever it costs; None keeps all but rounding.

    Returns:
        Factors by module, in float32, for a PEFT file with r = lora_alpha = rank; the rank; and
        the largest relative error of a layer.
    """
    adapter, history = split_state(state)
    parts: dict[str, list[Factors]] = {module: [each] for module, each in history.items()}
    for module, (name_b, name_a) in factor_names(adapter).items():
        parts.setdefault(module, []).append(Factors(adapter[name_b], adapter[name_a], scale))
    sums = {m: recompress(concatenate(each), max_rank=max_rank) for m, each in parts.items()}
    rank = max((each.rank for each in sums.values()), default=0) or 1
    error = max((each.error for each in sums.values()), default=0.0)
    return (
        {module: _pad(each.factors.to_float32(), rank) for module, each in sums.items()},
        rank,
        error,
    )


def factor_names(tensors: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the names of B and A by module, in the order of modules; history is left out.

    Raises:
        UpdateError: a factor lacks the other, or a name is neither.
    """
    found: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        if _HISTORY.fullmatch(name) is None:
            match = _match_factor(name)
            found.setdefault(match["module"], {})[match["factor"]] = name
    for module, names in found.items():
        if len(names) != 2:
            raise UpdateError(f"layer {module[:200]!r} has one factor of two ({sorted(names)[0]})")
    return {module: (names["B"], names["A"]) for module, names in found.items()}


def history_tensors(factors: Mapping[str, Factors]) -> dict[str, NDArray[np.float32]]:
    """Return histories, by module, as tensors of a state."""
    tensors = {}
    for module, each in factors.items():
        tensors[f"{module}.history_A"] = each.a.astype(np.float32)
        tensors[f"{module}.history_B"] = each.b.astype(np.float32)
    return tensors


def _pad(factors: Factors, rank: int) -> Factors:
    more = rank - factors.rank
    return Factors(np.pad(factors.b, ((0, 0), (0, more))), np.pad(factors.a, ((0, more), (0, 0))))


def _match_factor(name: str) -> re.Match[str]:
    if match := _FACTOR.fullmatch(name):
        return match
    raise UpdateError(f"tensor {name[:200]!r} is no factor of an adapter (expected lora_A, lora_B)")
