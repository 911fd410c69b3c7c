"""From a round's adapters to the next state, for aggregation 'stacked' and 'fedex'.

Beside ``next_state``, which goes tensor by tensor: here factors go in pairs, and a state gets
wider with the rounds. Updates are read from their files one layer and site at a time; the state,
adapters and their history, is in memory. The coordinator's own state is what the sites hold, so
``global`` and ``replica`` are the same, and there is no outer optimizer. After a round whose
history was recompressed there is no change, and all sites get the state whole.

    work/state/000/adapter.safetensors    with 'stacked': the adapter's shapes; its state is empty

The arithmetic is in ``aggregation.low_rank_rounds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError
from mutirao.federated.aggregation.low_rank_rounds import (
    LOW_RANK_RULES,
    LowRankStep,
    Trained,
    fedex_step,
    round_product,
    stacked_step,
)
from mutirao.federated.aggregation.low_rank_state import (
    advance,
    history_ranks,
    shapes_at_rank,
    split_state,
    start_adapter,
)
from mutirao.federated.aggregation.updates import ParcelFile
from mutirao.federated.codec import (
    CodecConfig,
    Payload,
    Shapes,
    Tensors,
    decode_tensor,
    encode_tensor,
)
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.next_state import NextState, change_seed
from mutirao.federated.coordinator.state_files import writing
from mutirao.federated.messages import TENSOR_PREFIX
from mutirao.federated.plan import FederatedConfig, Plan
from mutirao.federated.site.replica import hash_tensors

MAX_RANK = 1024
"""As of ``LoRAConfig.rank``; a site says which it has, and that decides how much is decoded."""


def write_low_rank_start(
    journal: CoordinatorJournal,
    config: FederatedConfig,
    shapes: Shapes,
    read: Callable[[str], NDArray[np.float32]],
) -> None:
    """Keep the agreed start: the adapter for 'fedex', nothing but its shapes for 'stacked'.

    Args:
        journal: gets it as the state of round 0.
        config: names the aggregation.
        shapes: of the adapter's tensors, by name.
        read: gives one of them.
    """
    if config.aggregation == "stacked":
        with writing(journal.state_path(0, "adapter"), shapes, "F32") as file:
            for name in sorted(shapes):
                file.write(name, np.zeros(shapes[name], np.float32))
        shapes = {}
    journal.write_start(shapes, read, config.outer)


def trained_shapes(journal: CoordinatorJournal, number: int, config: FederatedConfig) -> Shapes:
    """Return the shapes of what sites train from the state after a round, at the plan's rank.

    Raises:
        ArtifactError: the journal is damaged.
    """
    if config.aggregation not in LOW_RANK_RULES:
        return journal.open_state(number, "global").shapes
    return journal.open_state(0, "adapter" if config.aggregation == "stacked" else "global").shapes


def site_shapes(shapes: Shapes, rank: int | None, config: FederatedConfig) -> Shapes:
    """Return the shapes of one site's update; ranks may differ where products are stacked.

    Raises:
        UpdateError: the rank is more than an adapter may have.
    """
    if rank is None or config.aggregation != "stacked":
        return shapes
    if rank > MAX_RANK:
        raise UpdateError(f"a site's adapter has rank {rank} (expected at most {MAX_RANK})")
    return shapes_at_rank(shapes, rank)


def sent_ranks(journal: CoordinatorJournal, number: int, *, whole: bool) -> dict[str, int]:
    """Return ``StateFields.ranks``: columns of the history that come with a state.

    Args:
        journal: has the state.
        number: of the round that it is the state after.
        whole: whether it travels whole, or as the change from the state before.
    """
    ranks = history_ranks(journal.open_state(number, "replica").shapes)
    if whole or not ranks:
        return ranks
    before = history_ranks(journal.open_state(number - 1, "replica").shapes)
    more = {module: rank - before.get(module, 0) for module, rank in ranks.items()}
    return {module: rank for module, rank in more.items() if rank}


class _Decoded(Mapping[str, NDArray[np.float32]]):
    """One site's update in its file, a tensor at a time."""

    def __init__(self, file: ParcelFile, shapes: Shapes, codec: CodecConfig) -> None:
        self._file, self._shapes, self._codec = file, shapes, codec

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        payload = self._file.payload(TENSOR_PREFIX + name)
        return decode_tensor(name, payload, self._shapes[name], self._codec)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_next_low_rank(
    journal: CoordinatorJournal,
    round_number: int,
    plan: Plan,
    files: Mapping[str, ParcelFile],
    weights: Mapping[str, float],
    *,
    source: CoordinatorJournal | None = None,
) -> NextState:
    """Write the files of the state after a round.

    Args:
        journal: gets the state.
        round_number: of the round, from 1.
        plan: what was agreed.
        files: the sites' accepted updates.
        weights: by site.
        source: has the state after the round before, where ``journal`` has not.

    Returns:
        The hashes of the new state.

    Raises:
        ArtifactError: the state before or an update is damaged.
        UpdateError: adapters do not fit together, or lead out of float32; nothing is kept.
    """
    config, earlier = plan.federated, source or journal
    file = earlier.open_state(round_number - 1, "replica")
    state = {name: file.read(name) for name in file.names}
    shapes = trained_shapes(earlier, 0, config)
    step, payloads = _make_step(plan, round_number, state, shapes, files, weights)
    arrived: Tensors = step.tensors
    if step.form == "change":
        arrived = {n: _decode(n, payloads[n], step.tensors[n], config) for n in payloads}
    new = advance(state, step.form, arrived)
    _write(journal, round_number, new, payloads if step.form == "change" else None)
    sha256 = hash_tensors(new)
    return NextState(sha256, sha256)


def _make_step(
    plan: Plan,
    round_number: int,
    state: Tensors,
    shapes: Shapes,
    files: Mapping[str, ParcelFile],
    weights: Mapping[str, float],
) -> tuple[LowRankStep, dict[str, Payload]]:
    """Return the step, and its tensors encoded if it is a change."""
    config, lora = plan.federated, plan.lora
    assert lora is not None
    seed = change_seed(round_number)

    def encode(name: str, values: NDArray[np.float32]) -> Payload:
        return encode_tensor(name, values, config.download, seed=seed)

    def carry(name: str, change: NDArray[np.float32]) -> NDArray[np.float32]:
        return _decode(name, encode(name, change), change, config)

    ranks = {site: int(file.fields.get("rank") or lora.rank) for site, file in files.items()}
    adapters: dict[str, Trained] = {}
    for site, file in files.items():
        own = site_shapes(shapes, ranks[site], config)
        if config.aggregation == "stacked":
            start = start_adapter(own, seed=plan.seed, round_number=round_number)
        else:
            start = split_state(state)[0]
        adapters[site] = Trained(start, _Decoded(file, own, config.upload))
    if config.aggregation == "stacked":
        scales = {site: lora.alpha / rank for site, rank in ranks.items()}
        step = stacked_step(state, round_product(adapters, weights, scales))
    else:
        step = fedex_step(state, adapters, weights, lora.alpha / lora.rank, carry=carry)
    if step.form == "whole":
        return step, {}
    return step, {name: encode(name, values) for name, values in sorted(step.tensors.items())}


def _decode(
    name: str, payload: Payload, like: NDArray[np.float32], config: FederatedConfig
) -> NDArray[np.float32]:
    return decode_tensor(name, payload, like.shape, config.download)


def _write(
    journal: CoordinatorJournal,
    round_number: int,
    state: Tensors,
    payloads: Mapping[str, Payload] | None,
) -> None:
    """Write a state, and the change that led to it unless it is to travel whole."""
    shapes = {name: values.shape for name, values in state.items()}
    for part in ("global", "replica"):
        with writing(journal.state_path(round_number, part), shapes, "F32") as file:
            for name, values in state.items():
                file.write(name, values)
    with writing(journal.state_path(round_number, "outer"), {}, "F32"):
        pass
    change = journal.state_path(round_number, "change")
    change.unlink(missing_ok=True)  # of a round that was begun before, with other sites
    if payloads is not None:
        with writing(change, {n: each.shape for n, each in payloads.items()}, "U8") as file:
            for name, payload in payloads.items():
                file.write(name, payload)
