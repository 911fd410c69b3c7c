"""From a round's mean update to the next state, one tensor in memory at a time.

For each tensor, in the order of names: the mean, the outer step, and the change that the sites
get. The change is encoded, and what is decoded from it is added to the replica, here as at the
sites. What encoding lost is still in the difference of the two and goes out with the next
round. The same mean and the same state before give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.federated.aggregation.fold import Directions, Mean
from mutirao.federated.aggregation.outer import OuterState
from mutirao.federated.codec import Shapes, count_payload_bytes, decode_tensor, encode_tensor
from mutirao.federated.coordinator.journal import CoordinatorJournal, outer_kinds
from mutirao.federated.coordinator.state_files import StateFile, StateWriter, writing
from mutirao.federated.plan import FederatedConfig
from mutirao.federated.site.replica import add_change, update_hash

_SEED_BYTES = 7
"""So that a seed is a positive int64."""


PARTS = ("global", "replica", "outer")
"""Parts of a state that the next one is made of."""


@dataclass(frozen=True)
class NextState:
    """What a round led to."""

    global_sha256: str
    """Hash of the coordinator's state."""
    replica_sha256: str
    """Hash of what the sites will hold."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the next state."""

    new_global: NDArray[np.float32]
    new_replica: NDArray[np.float32]
    outer: dict[str, NDArray[np.float32]]
    change: NDArray[np.uint8]


def write_next_state(
    journal: CoordinatorJournal,
    round_number: int,
    config: FederatedConfig,
    mean: Mean,
    *,
    directions: Directions | None = None,
    source: CoordinatorJournal | None = None,
) -> NextState:
    """Write the four files of the state after a round.

    Args:
        journal: gets the state.
        round_number: of the round, from 1.
        config: outer step and download.
        mean: gives the round's mean update.
        directions: hears every tensor of it, for the record.
        source: has the state after the round before, where ``journal`` has not.

    Returns:
        The hashes of the new state.

    Raises:
        ArtifactError: the state before is damaged.
        UpdateError: the step leads out of float32; nothing of the round may be kept.
    """
    before = {part: (source or journal).open_state(round_number - 1, part) for part in PARTS}
    shapes = before["global"].shapes
    hashes = {part: hashlib.sha256() for part in ("global", "replica")}
    with _writing_state(journal, round_number, config, shapes) as files:
        for name in shapes:
            mean_update = mean(name)
            if directions is not None:
                directions.add(name, mean_update)
            tensor = _step_tensor(name, mean_update, before, round_number, config)
            del mean_update
            files["global"].write(name, tensor.new_global)
            files["replica"].write(name, tensor.new_replica)
            files["change"].write(name, tensor.change)
            for key, values in tensor.outer.items():
                files["outer"].write(key, values)
            update_hash(hashes["global"], name, tensor.new_global)
            update_hash(hashes["replica"], name, tensor.new_replica)
            del tensor
    return NextState(hashes["global"].hexdigest(), hashes["replica"].hexdigest())


@contextmanager
def _writing_state(
    journal: CoordinatorJournal, round_number: int, config: FederatedConfig, shapes: Shapes
) -> Iterator[dict[str, StateWriter]]:
    kinds = outer_kinds(config.outer)
    layouts: dict[str, Shapes] = {
        "global": shapes,
        "replica": shapes,
        "outer": {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()},
        "change": {
            name: (count_payload_bytes(shape, config.download),) for name, shape in shapes.items()
        },
    }
    with ExitStack() as stack:
        yield {
            part: stack.enter_context(
                writing(
                    journal.state_path(round_number, part),
                    layout,
                    "U8" if part == "change" else "F32",
                )
            )
            for part, layout in layouts.items()
        }


def _step_tensor(
    name: str,
    mean: NDArray[np.float64],
    before: Mapping[str, StateFile],
    round_number: int,
    config: FederatedConfig,
) -> _Tensor:
    kept = {f"{kind}/{name}" for kind in outer_kinds(config.outer)}
    state = OuterState(round_number - 1, {key: before["outer"].read(key) for key in kept})
    parameters = {name: before["global"].read(name)}
    new, outer = config.outer.step(parameters, {name: mean}, state)
    replica = before["replica"].read(name)
    change = encode_tensor(
        name, new[name] - replica, config.download, seed=change_seed(round_number)
    )
    decoded = decode_tensor(name, change, replica.shape, config.download)
    new_replica = add_change({name: replica}, {name: decoded})[name]
    return _Tensor(new[name], new_replica, outer.arrays, change)


def change_seed(round_number: int) -> int:
    """Return the seed of stochastic rounding of a round's change; nothing in it is secret."""
    digest = hashlib.sha256(f"mutirao change {round_number}".encode()).digest()
    return int.from_bytes(digest[:_SEED_BYTES], "little")
