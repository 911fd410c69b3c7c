"""The choice: candidates within a budget, which of them no other beats, and the one to take.

A candidate's rise is what was measured of it; where nothing was, what the law foretells. A budget
of loss is kept by the upper end of the 95 % interval, not by the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mutirao.advise.checkpoint_law import CheckpointLaw
from mutirao.advise.config import Budget
from mutirao.advise.measuring import Measured
from mutirao.advise.ways import Shape, Way
from mutirao.console import format_bytes
from mutirao.errors import InputError, OutOfRangeError
from mutirao.precision.fit import Prediction

Z_95 = 1.96


@dataclass(frozen=True)
class Speed:
    """What the engine is predicted to do with such bits."""

    quantization: str
    """The GGUF format that stands for the way."""
    resident_bytes: int
    """Peak of the process with all weights in memory."""
    least_bytes: int
    """Peak of the process with weights streamed from flash."""
    tokens_per_s: float | None
    """Within the memory that was asked for; None where it does not run there."""


@dataclass(frozen=True)
class Candidate:
    """A way of rounding with all that is known of it."""

    way: Way
    noise: float
    """Of rounding this model to nearest on the way's grids; see ``ways.relative_noise``."""
    total_bytes: int
    bits_per_weight: float
    predicted: Prediction | None
    """Rise by the law, in nats per token; None outside of what was calibrated."""
    measured: Measured | None
    speed: Speed | None = None
    is_pareto: bool = False
    """Whether no other candidate has both fewer bytes and a smaller rise."""

    @property
    def rise(self) -> Prediction:
        """The rise with its 95 % interval: measured, or else predicted."""
        if self.measured is None:
            assert self.predicted is not None
            return self.predicted
        loss = self.measured.loss
        half = Z_95 * loss.standard_error
        return Prediction(loss.rise, loss.rise - half, loss.rise + half)

    @property
    def memory_bytes(self) -> int:
        """Memory to run in, with all weights resident."""
        return self.speed.resident_bytes if self.speed else self.total_bytes

    @property
    def least_bytes(self) -> int:
        """Memory to run in, with weights streamed from flash where there is an engine for it."""
        return self.speed.least_bytes if self.speed else self.total_bytes

    def fits(self, budget: Budget, loss: float, *, streamed: bool = False) -> bool:
        """Say whether it keeps to a budget; ``loss`` is the model's own."""
        limits = (
            (budget.memory_bytes, self.least_bytes if streamed else self.memory_bytes),
            (budget.disk_bytes, self.total_bytes),
            (None if budget.loss_share is None else budget.loss_share * loss, self.rise.high),
        )
        return all(limit is None or value <= limit for limit, value in limits)


def list_candidates(
    shape: Shape,
    law: CheckpointLaw,
    ways: Sequence[Way],
    noises: dict[Way, float],
    measured: Sequence[Measured],
) -> list[Candidate]:
    """Return what is known of each way; those of which nothing is, are left out."""
    known = {each.way: each for each in measured}
    found = []
    for way in ways:
        try:
            predicted = law.predict(way, noises[way])
        except OutOfRangeError:
            predicted = None
        if predicted is None and way not in known:
            continue
        total_bytes = shape.count_bytes(way.bits, way.group_size)
        found.append(
            Candidate(
                way,
                noises[way],
                total_bytes,
                8 * total_bytes / shape.num_weights,
                predicted,
                known.get(way),
            )
        )
    return found


def mark_pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates by bytes, those marked that no other beats."""
    found: list[Candidate] = []
    least = float("inf")
    for each in sorted(candidates, key=lambda one: (one.total_bytes, one.rise.mean)):
        found.append(replace(each, is_pareto=each.rise.mean < least))
        least = min(least, each.rise.mean)
    return found


def choose(candidates: Sequence[Candidate], budget: Budget, loss: float) -> Candidate:
    """Return the candidate to take.

    With a budget of loss the one with the fewest bytes, else the one with the smallest rise; all
    within the budget. Those that are all in memory go before those that are streamed from flash.

    Args:
        candidates: at least one.
        budget: what must be kept to.
        loss: of the model as it is, in nats per token.

    Raises:
        InputError: none keeps to the budget; the message says what would.
    """
    fitting = [each for each in candidates if each.fits(budget, loss)] or [
        each for each in candidates if each.fits(budget, loss, streamed=True)
    ]
    if not fitting:
        raise InputError(_impossible(candidates, budget, loss))
    if budget.loss_share is not None:
        return min(fitting, key=lambda each: (each.total_bytes, each.rise.high))
    return min(fitting, key=lambda each: (each.rise.mean, each.total_bytes))


def _impossible(candidates: Sequence[Candidate], budget: Budget, loss: float) -> str:
    smallest = min(candidates, key=lambda each: (each.least_bytes, each.total_bytes))
    gentlest = min(candidates, key=lambda each: each.rise.high)
    asked = []
    if budget.memory_bytes is not None:
        asked.append(f"{format_bytes(budget.memory_bytes)} of memory")
    if budget.disk_bytes is not None:
        asked.append(f"{format_bytes(budget.disk_bytes)} of disk")
    if budget.loss_share is not None:
        asked.append(f"a rise of at most {budget.loss_share:.2%}")
    return (
        f"no way of rounding keeps to {' and '.join(asked)} (the smallest, {smallest.way}, takes "
        f"{format_bytes(smallest.least_bytes)} to run, {format_bytes(smallest.total_bytes)} of "
        f"disk, and costs up to {smallest.rise.high / loss:.2%}; the gentlest, {gentlest.way}, "
        f"{format_bytes(gentlest.least_bytes)}, {format_bytes(gentlest.total_bytes)} and up to "
        f"{gentlest.rise.high / loss:.2%}); allow more, or take a smaller model"
    )


def explain(chosen: Candidate, candidates: Sequence[Candidate], budget: Budget, loss: float) -> str:
    """Return the recommendation and its reason, as one sentence."""
    half = (chosen.rise.high - chosen.rise.low) / 2
    how = "measured" if chosen.measured else "predicted"
    sentence = (
        f"Take {chosen.way}: {format_bytes(chosen.total_bytes)}, and the loss rises by "
        f"{chosen.rise.mean / loss:.2%} ± {half / loss:.2%} ({how})"
    )
    others = [each for each in candidates if each.way != chosen.way]
    if budget.loss_share is not None:
        smaller = [each for each in others if each.total_bytes < chosen.total_bytes]
        if smaller:
            rival = min(smaller, key=lambda each: each.rise.high)
            return (
                f"{sentence}; of the smaller ones the best, {rival.way}, may cost "
                f"{rival.rise.high / loss:.2%}, over the {budget.loss_share:.2%} allowed."
            )
        return f"{sentence}; nothing smaller is known."
    better = [each for each in others if each.rise.mean < chosen.rise.mean]
    if better:
        rival = min(better, key=lambda each: each.total_bytes)
        return (
            f"{sentence}; the next better, {rival.way}, takes {format_bytes(rival.total_bytes)} "
            f"and {format_bytes(rival.memory_bytes)} to run, over the budget."
        )
    return f"{sentence}; nothing that was considered costs less."
