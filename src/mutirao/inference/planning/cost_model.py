"""Predict how fast a model runs in a placement, before it is loaded or even downloaded.

A pass is followed op by op: each takes what the probe measured for its kernel, and streamed
pieces come at the disk's speed, as far ahead as the ring has room. So a pass takes the longer of
computing and reading, and besides what of one the other cannot hide: the pieces that lie too
close together, the last bytes that nothing follows. With speculation a cycle is k drafts on the
resident planes and one full pass over k + 1 tokens, which yields on average
(1 - a^(k+1)) / (1 - a) tokens where each drafted token is kept with probability a (Leviathan et
al. 2023, arXiv:2211.17192, section 3.1). All times are in seconds, all sizes in bytes.

Left out: a disk that slows down under others, and what the operating system does meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mutirao.errors import InputError
from mutirao.inference.architecture.model_spec import ModelSpec
from mutirao.inference.native.backend import Placement
from mutirao.inference.planning.machine import Machine
from mutirao.inference.planning.pass_costs import PassCosts, Step

if TYPE_CHECKING:
    from mutirao.inference.store.store_index import StoredTensor

PROMPT_TOKENS = 128
"""Of the prompt whose time to first token is predicted, unless told otherwise."""
TYPICAL_POSITION = 256
"""Of generated tokens: after a prompt of 128, in the middle of an answer of 256."""
MAX_DRAFT = 15
"""Longest draft that is considered: 16 tokens in a pass."""
ALIKE = 0.999
WARM_CYCLES = 2
"""Cycles until the ring is as full as it will be; the one after them is timed."""


@dataclass(frozen=True)
class Prediction:
    """What is expected of a model in a placement, once it has been loaded."""

    tokens_per_s: float
    """While generating, past the first tokens."""
    seconds_per_token: float
    bytes_per_token: float
    """Read from the disk for each generated token."""
    time_to_first_token_s: float
    """Of a prompt of ``prompt_tokens``."""
    prompt_tokens: int
    draft_length: int
    """Tokens drafted for each full pass; 0 without speculation."""
    acceptance: float | None
    """Probability that a drafted token is kept, as was given."""
    tokens_per_pass: float
    """Expected for each full pass."""
    pass_s: float
    """A full pass over ``draft_length`` + 1 tokens, with the waiting in it."""
    draft_s: float
    """Drafting one token; 0 without speculation."""
    breakdown: Mapping[str, float]
    """Seconds per token of 'products', 'attention', 'other' (norms, activations, quantizing,
    barriers, choosing a token), 'reading' (processor time), 'drafts' and 'waiting' (for the
    disk); their sum is ``seconds_per_token``."""


def predict(
    machine: Machine,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    placement: Placement,
    *,
    draft_length: int = 0,
    acceptance: float | None = None,
    position: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Prediction:
    """Predict a placement's speed.

    Args:
        machine: probed with as many threads as the placement has.
        spec: the model.
        tensors: its matrices, by store name: of a ``WeightStore``, or of ``plan_layout``.
        placement: what is resident, ring, pieces, readers.
        draft_length: tokens that the resident planes draft for each full pass; 0: none.
        acceptance: probability that a drafted token is kept, 0 to 1; needed with drafts.
        position: of the generated token, which attention sees that many before; None: 256, or
            the middle of a shorter context.
        prompt_tokens: of the prompt for the time to first token.

    Raises:
        InputError: drafts without a draft, a bad acceptance, other threads than were probed.
    """
    _check(machine, placement, draft_length, acceptance)
    model = PassCosts(machine, spec, tensors, placement)
    where = _position(placement, position)
    full = model.steps(draft_length + 1, where)
    drafts_s = draft_length * model.draft_s(where) if draft_length else 0.0
    cycle_s = steady_s([Step(drafts_s), *full.steps], model.ring_bytes)
    yielded = expected_tokens(acceptance or 0.0, draft_length)
    parts = {**full.parts, "drafts": drafts_s}
    parts["waiting"] = cycle_s - sum(parts.values())
    return Prediction(
        tokens_per_s=yielded / cycle_s,
        seconds_per_token=cycle_s / yielded,
        bytes_per_token=full.num_bytes / yielded,
        time_to_first_token_s=_prompt_s(model, prompt_tokens),
        prompt_tokens=prompt_tokens,
        draft_length=draft_length,
        acceptance=acceptance,
        tokens_per_pass=yielded,
        pass_s=cycle_s - drafts_s,
        draft_s=drafts_s / draft_length if draft_length else 0.0,
        breakdown={name: seconds / yielded for name, seconds in parts.items()},
    )


def predict_best_draft(
    machine: Machine,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    placement: Placement,
    acceptance: float,
    *,
    position: int | None = None,
    max_length: int = MAX_DRAFT,
) -> Prediction:
    """Predict a placement with the draft length that suits it; see ``predict``."""
    _check(machine, placement, max_length, acceptance)
    model = PassCosts(machine, spec, tensors, placement)
    where = _position(placement, position)
    draft_s = model.draft_s(where)

    def cycle_s(length: int) -> float:
        steps = [Step(length * draft_s), *model.steps(length + 1, where).steps]
        return steady_s(steps, model.ring_bytes)

    length = choose_draft_length(acceptance, cycle_s, max_length)
    return predict(
        machine,
        spec,
        tensors,
        placement,
        draft_length=length,
        acceptance=acceptance,
        position=position,
    )


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Return the tokens that one full pass yields on average: 1 to ``draft_length`` + 1."""
    if acceptance >= 1.0:
        return draft_length + 1.0
    return float((1.0 - acceptance ** (draft_length + 1)) / (1.0 - acceptance))


def choose_draft_length(
    acceptance: float, cycle_s: Callable[[int], float], max_length: int = MAX_DRAFT
) -> int:
    """Return the draft length of most tokens per second, the shortest of those that are alike.

    Args:
        acceptance: probability that a drafted token is kept, 0 to 1.
        cycle_s: seconds that drafting so many tokens and checking them takes.
        max_length: longest draft.
    """
    lengths = range(max_length + 1)
    speeds = [expected_tokens(acceptance, length) / cycle_s(length) for length in lengths]
    return next(length for length in lengths if speeds[length] >= ALIKE * max(speeds))


def steady_s(steps: Sequence[Step], ring_bytes: int) -> float:
    """Return the seconds of one cycle of steps that is repeated for ever.

    Bytes are read one after the other, ahead of their use, as long as the ring has room; those
    of a step leave the ring when its computing ends.
    """
    clocks = _Clocks(ring_bytes)
    for _ in range(WARM_CYCLES):
        clocks.run(steps)
    before_s = clocks.compute_s
    clocks.run(steps)
    return clocks.compute_s - before_s


def once_s(steps: Iterable[Step], ring_bytes: int) -> float:
    """Return the seconds of some steps after which reading begins anew."""
    clocks = _Clocks(ring_bytes)
    clocks.run(steps)
    return clocks.compute_s


class _Clocks:
    """When computing and reading have come how far."""

    def __init__(self, ring_bytes: int) -> None:
        self.ring_bytes = ring_bytes
        self.compute_s = self.read_s = 0.0
        self.used_bytes = 0
        self.held: deque[tuple[float, int]] = deque()

    def run(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if step.num_bytes:
                while self.held and self.used_bytes + step.num_bytes > self.ring_bytes:
                    free_at_s, num_bytes = self.held.popleft()
                    self.used_bytes -= num_bytes
                    self.read_s = max(self.read_s, free_at_s)
                self.read_s += step.read_s
                self.compute_s = max(self.compute_s, self.read_s)
            self.compute_s += step.compute_s
            if step.num_bytes:
                self.used_bytes += step.num_bytes
                self.held.append((self.compute_s, step.num_bytes))


def _position(placement: Placement, position: int | None) -> int:
    return min(TYPICAL_POSITION, placement.context // 2) if position is None else position


def _prompt_s(model: PassCosts, num_tokens: int) -> float:
    """Return the seconds until the first token after a prompt, which is taken in chunks."""
    size, total_s = model.placement.max_tokens, 0.0
    for begin in range(0, num_tokens, size):
        is_last = begin + size >= num_tokens
        chunk = min(size, num_tokens - begin)
        followed = model.steps(chunk, begin, num_logits=int(is_last))
        total_s += once_s(followed.steps, model.ring_bytes)
    return total_s


def _check(
    machine: Machine, placement: Placement, draft_length: int, acceptance: float | None
) -> None:
    if placement.num_threads != machine.num_threads:
        raise InputError(
            f"the probe computed with {machine.num_threads} threads and the placement has "
            f"{placement.num_threads}; probe with as many"
        )
    if draft_length < 0 or (draft_length and acceptance is None):
        raise InputError(f"drafts of {draft_length} tokens need an acceptance from 0 to 1")
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise InputError(f"acceptance={acceptance} is not accepted (expected 0 to 1)")
