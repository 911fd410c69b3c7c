"""From a round's mean update to the next state, one tensor in memory at a time.

For each tensor, in the order of names: the mean, the outer step, and the change that the sites
get. The change is encoded, and what is decoded from it is added to the replica, here as at the
sites. What encoding lost is still in the difference of the two and goes out with the next
round. The same mean and the same state before give the same bytes. Where groups of sites take
turns, the change leads from what the next group was given last, and so does the replica.

Memory: about 20 bytes for each value of the largest tensor, however many sites and tensors.
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
from mutirao.federated.codec.blocks import stretches
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
        source: has the states before, where ``journal`` has not.

    Returns:
        The hashes of the new state.

    Raises:
        ArtifactError: the state before is damaged.
        UpdateError: the step leads out of float32; nothing of the round may be kept.
    """
    numbers = dict.fromkeys(PARTS, round_number - 1) | {"replica": config.basis(round_number)}
    before = {part: (source or journal).open_state(numbers[part], part) for part in PARTS}
    shapes = before["global"].shapes
    hashes = {part: hashlib.sha256() for part in ("global", "replica")}
    with _writing_state(journal, round_number, config, shapes) as files:
        for name in shapes:
            new = _step_tensor(name, mean, directions, before, files["outer"], round_number, config)
            update_hash(hashes["global"], name, new)
            files["global"].write(name, new)
            replica = before["replica"].read(name)
            change, new_replica = _change_tensor(name, new, replica, round_number, config)
            update_hash(hashes["replica"], name, new_replica)
            files["replica"].write(name, new_replica)
            files["change"].write(name, change)
            del new, replica, change, new_replica  # before the next one's are made
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
    mean: Mean,
    directions: Directions | None,
    before: Mapping[str, StateFile],
    outer_file: StateWriter,
    round_number: int,
    config: FederatedConfig,
) -> NDArray[np.float32]:
    """Make the outer step of one tensor, a stretch at a time; return its new values."""
    mean_update = mean(name)
    if directions is not None:
        directions.add(name, mean_update)
    values, mean_N = before["global"].read(name), mean_update.reshape(-1)
    kept = {
        key: before["outer"].read(key)
        for key in (f"{kind}/{name}" for kind in outer_kinds(config.outer))
    }
    values_N = values.reshape(-1)
    for part in stretches(values_N.size):
        state = OuterState(round_number - 1, {key: kept[key].reshape(-1)[part] for key in kept})
        new, stepped = config.outer.step({name: values_N[part]}, {name: mean_N[part]}, state)
        values_N[part] = new[name]
        for key, array in stepped.arrays.items():
            kept[key].reshape(-1)[part] = array
    for key, array in kept.items():
        outer_file.write(key, array)
    return values


def _change_tensor(
    name: str,
    new: NDArray[np.float32],
    replica: NDArray[np.float32],
    round_number: int,
    config: FederatedConfig,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return what leads from the replica towards the new values, and the replica after it."""
    codec = config.download
    change = encode_tensor(name, new - replica, codec, seed=change_seed(round_number))
    decoded = decode_tensor(name, change, replica.shape, codec)
    return change, add_change({name: replica}, {name: decoded})[name]


def change_seed(round_number: int) -> int:
    """Return the seed of stochastic rounding of a round's change; nothing in it is secret."""
    digest = hashlib.sha256(f"mutirao change {round_number}".encode()).digest()
    return int.from_bytes(digest[:_SEED_BYTES], "little")
