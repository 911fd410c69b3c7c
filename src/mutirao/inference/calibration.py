"""Measure how much a draft suffers from each bit plane that is left out.

For every layer, and every way to drop planes from its attention, its gate and up, or its down
matrices, the layer alone is run again as the draft would: the relative squared error of what it
hands on is the local loss. How much an error at that depth changes the model's answer is
measured by adding noise of a known size there: KL divergence per relative squared error. Their
product is the loss that ``placement.split`` weighs against bytes; losses are taken as additive,
which small ones are. A few whole drafts then tie the sum to what counts, the share of tokens on
which draft and model agree.

Weights are streamed from the store meanwhile, so the memory needed is small; the result is kept
beside the store.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import ArtifactError
from mutirao.inference.architecture.program import MatMul, compile_program
from mutirao.inference.native.backend import NOTHING, Mode, NativeBackend, Placement
from mutirao.inference.planning.placement import multiplied, only_looked_up, split
from mutirao.inference.store.planes import find_format
from mutirao.inference.store.weight_store import WeightStore

FILE_NAME = "calibration.json"
VERSION = 2
NUM_SKIPPED = 8
"""First tokens, which are not counted: with so little context they are guesses."""
NUM_COMPARED = 48
"""Tokens whose whole distributions are compared; as many rows of logits are kept in memory."""
ROWS_AT_ONCE = 16
FULL_EVERY = 4
NOISE_EVERY = 4
NOISE = 0.02
"""Relative size of the noise that tells a layer's weight: about that of one dropped plane."""
SMALLEST_WEIGHT = 1e-9
"""Of a depth, in nats: below it is rounding."""
FRACTIONS = (0.95, 0.85, 0.75, 0.65, 0.55, 0.4, 0.3, 0.22)
"""Parts of the weights for which whole drafts are compared with the model; the last are of use to
split floats only, whose codes take less than half."""
TEXT = """\
A hospital keeps its records for twenty years. The archivist opened the oldest box and found \
letters, bills and a photograph of the first nurses. She wrote down what each page said, one \
line for one page, and asked the director which of them the museum should have.

def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

O rio sobe em março e desce em julho. Quem mora na margem planta feijão depois da cheia, \
porque a terra fica boa, e guarda as sementes para o ano seguinte. Two plus two is four, and \
the capital of Portugal is Lisbon.
"""
"""What the model is run on: prose, code and Portuguese."""

Floats = NDArray[np.float32]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Calibration:
    """What each plane is worth to a draft of one model."""

    losses: dict[str, dict[int, float]]
    """By matrix, by number of planes kept: expected KL divergence, in nats per token."""
    agreement: list[tuple[float, float]] = field(default_factory=list)
    """Whole drafts: summed loss, and the share of tokens on which the draft agreed."""
    num_tokens: int = 0
    """Tokens that were counted."""

    def expected_agreement(self, loss: float) -> float:
        """Return the share of tokens on which a draft of a given summed loss agrees."""
        points = sorted([(0.0, 1.0), *self.agreement])
        xs, ys = [math.sqrt(x) for x, _ in points], [y for _, y in points]
        return float(np.interp(math.sqrt(loss), xs, ys))

    def save(self, directory: Path) -> None:
        """Write it beside the store, whole or not at all."""
        path = directory / f"{FILE_NAME}.{os.getpid()}"
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}))
        path.replace(directory / FILE_NAME)

    @classmethod
    def load(cls, directory: Path) -> Calibration | None:
        """Read it again; None where there is none, or one of another version.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            return None
        try:
            read: dict[str, Any] = json.loads(path.read_text())
            if read.pop("version") != VERSION:
                return None
            losses = {
                str(name): {int(keeps): float(loss) for keeps, loss in by_planes.items()}
                for name, by_planes in read["losses"].items()
            }
            agreement = [(float(loss), float(share)) for loss, share in read["agreement"]]
            numbers = [loss for by_planes in losses.values() for loss in by_planes.values()]
            numbers += [number for pair in agreement for number in pair]
            if not all(math.isfinite(number) and number >= 0 for number in numbers):
                raise ValueError("a number in it is negative or none")
            return cls(losses, agreement, int(read["num_tokens"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error}); remove it and it is measured again"
            ) from None


def calibrate(
    store: WeightStore,
    tokens: Sequence[int],
    *,
    num_threads: int,
    direct: bool = True,
    progress: Progress | None = None,
) -> Calibration:
    """Measure a model's losses on some tokens of ordinary text.

    Args:
        store: the model.
        tokens: about a hundred; see TEXT.
        num_threads: to compute with.
        direct: read past the page cache.
        progress: told the part that is done, 0 to 1.

    Raises:
        InferenceError: the store cannot be read, or is damaged.
    """
    program = compile_program(store.spec)
    matrices = multiplied(program, store.tensors)
    nothing = {each.name: NOTHING for each in store.tensors.values()}
    placement = Placement(
        nothing,
        num_threads=num_threads,
        direct=direct,
        max_tokens=len(tokens),
        max_logit_rows=ROWS_AT_ONCE,
        context=len(tokens),
        ring_bytes=24 << 20,
    )
    with NativeBackend(store, placement) as backend:
        run = _Calibrator(backend, store, tokens)
        num_steps = store.spec.num_layers + 1
        losses: dict[str, dict[int, float]] = {}
        for step, measured in enumerate(run.losses()):
            losses |= measured
            if progress is not None:
                progress(min((step + 1) / num_steps, 1.0))
        agreement = []
        total = sum(each.num_bytes for each in matrices)
        lookups = only_looked_up(program, store.tensors)
        for fraction in FRACTIONS:
            choice = split(matrices, lookups, int(total * fraction), losses)
            if choice is not None:
                agreement.append((choice.loss, run.agreement(choice.resident)))
    return Calibration(losses, agreement, len(tokens) - NUM_SKIPPED)


class _Calibrator:
    """One calibration under way; everything is streamed, drafts read the first planes."""

    def __init__(self, backend: NativeBackend, store: WeightStore, tokens: Sequence[int]) -> None:
        self.backend, self.tokens, self.tensors = backend, list(tokens), store.tensors
        self.program = backend.program
        self.starts = self.program.layer_starts
        counted = range(NUM_SKIPPED, len(tokens))
        self.counted = list(counted)
        self.compared = list(counted[:: max(1, len(counted) // NUM_COMPARED)])
        self._run(0, self.starts[0])
        self.entries = [self._hidden()]
        for begin, end in zip(self.starts, self.starts[1:], strict=False):
            self._run(begin, end)
            self.entries.append(self._hidden())
        self.full = dict(self._log_probabilities(self.compared))
        self.answers = self._answers()

    def losses(self) -> Iterator[dict[str, dict[int, float]]]:
        """Yield the losses of each layer, and of the head, as they are measured.

        Every fourth layer is measured with any number of planes dropped, the others with one;
        how much faster losses grow with more is taken from the former.
        """
        depths = self._noise_weights()
        growth: dict[tuple[str, str, int], list[float]] = {}
        layers = list(range(len(self.starts) - 1))
        for layer in layers[::FULL_EVERY] + [each for each in layers if each % FULL_EVERY]:
            begin, end = self.starts[layer], self.starts[layer + 1]
            losses: dict[str, dict[int, float]] = {}
            for kind, names in self._groups(begin, end).items():
                most = len(self.tensors[names[0]].planes)
                whole = layer % FULL_EVERY == 0 or (*kind, 1) not in growth
                measured = {
                    keeps: depths[layer + 1] * self._error(begin, end, names, keeps, layer)
                    for keeps in range(most - 1, 0 if whole else most - 2, -1)
                }
                for keeps in range(most - 1, 0, -1):
                    if whole:
                        ratio = measured[keeps] / max(measured[most - 1], 1e-12)
                        growth.setdefault((*kind, keeps), []).append(ratio)
                    elif keeps not in measured:
                        mean_growth = float(np.mean(growth[*kind, keeps]))
                        measured[keeps] = measured[most - 1] * mean_growth
                losses |= self._shared(names, measured)
            yield losses
        begin, end = self.starts[-1], len(self.program.ops)
        for names in self._groups(begin, end).values():
            most = len(self.tensors[names[0]].planes)
            measured = {
                keeps: self._error(begin, end, names, keeps, None)
                for keeps in range(most - 1, 0, -1)
            }
            yield self._shared(names, measured)

    def agreement(self, resident: dict[str, int]) -> float:
        """Return the share of tokens on which a whole draft names the model's first choice."""
        for name, planes in resident.items():
            form = find_format(self.tensors[name].format)
            if 0 < planes < len(form.plane_widths) or (planes > 0 and form.split_from):
                self.backend.set_draft_planes(name, min(planes, len(form.code_widths)))
        self._restore(0)
        self._run(self.starts[0], self.starts[-1], "draft")
        agreed = np.mean(
            [a == b for a, b in zip(self._answers("draft"), self.answers, strict=True)]
        )
        for name in resident:
            self.backend.set_draft_planes(name, 0)
        return float(agreed)

    def _shared(
        self, names: Sequence[str], measured: dict[int, float]
    ) -> dict[str, dict[int, float]]:
        """Share a group's losses among its matrices by their bytes."""
        total = sum(self.tensors[name].num_bytes for name in names)
        return {
            name: {
                keeps: loss * self.tensors[name].num_bytes / total
                for keeps, loss in measured.items()
            }
            for name in names
        }

    def _groups(self, begin: int, end: int) -> dict[tuple[str, str], list[str]]:
        """Matrices of one part that are judged together: those of one input and one format."""
        groups: dict[tuple[str, str], list[str]] = {}
        for op in self.program.ops[begin:end]:
            if isinstance(op, MatMul) and not find_format(self.tensors[op.weight].format).is_float:
                key = (op.input, self.tensors[op.weight].format)
                groups.setdefault(key, []).append(op.weight)
        return groups

    def _error(
        self, begin: int, end: int, names: Sequence[str], keeps: int, layer: int | None
    ) -> float:
        """Return the relative squared error of a layer's output, or the head's KL divergence."""
        for name in names:
            self.backend.set_draft_planes(name, keeps)
        self._restore(len(self.entries) - 1 if layer is None else layer)
        if layer is None:
            divergence = self._divergence("draft")
        else:
            self._run(begin, end, "draft")
        for name in names:
            self.backend.set_draft_planes(name, 0)
        if layer is None:
            return divergence
        right, got = self.entries[layer + 1], self._hidden()
        squares = np.square(right - got).sum(1) / np.square(right).sum(1)
        return float(squares[NUM_SKIPPED:].mean())

    def _noise_weights(self) -> list[float]:
        """KL divergence per relative squared error of what enters each layer, and the head.

        Measured at some depths; between them its logarithm is taken to change evenly. What
        enters the first layer is left out: no matrix makes it, and it may count for much more.
        """
        rng = np.random.default_rng(0)
        measured: dict[int, float] = {}
        last = len(self.entries) - 1
        for depth in sorted({*range(1, last, NOISE_EVERY), last}):
            entry = self.entries[depth]
            noise = rng.standard_normal(entry.shape, np.float32)
            noise *= (
                NOISE * np.linalg.norm(entry, axis=1, keepdims=True) / math.sqrt(entry.shape[1])
            )
            self.backend.buffer("hidden")[: len(self.tokens)] = entry + noise
            self._run(self.starts[depth], self.starts[-1])
            measured[depth] = max(self._divergence() / NOISE**2, SMALLEST_WEIGHT)
        logarithms = np.log(list(measured.values()))
        values = np.interp(range(len(self.entries)), list(measured), logarithms)
        return [math.exp(value) for value in values]

    def _divergence(self, mode: Mode = "full") -> float:
        """KL divergence of the head's answers from the model's, in nats per token."""
        sums = [
            float((np.exp(self.full[row]) * (self.full[row] - got)).sum())
            for row, got in self._log_probabilities(self.compared, mode)
        ]
        return max(float(np.mean(sums)), 0.0)

    def _answers(self, mode: Mode = "full") -> list[int]:
        """Return the likeliest next token after each counted token."""
        return [int(logits.argmax()) for _, logits in self._head(self.counted, mode)]

    def _log_probabilities(
        self, rows: Sequence[int], mode: Mode = "full"
    ) -> Iterator[tuple[int, Floats]]:
        for row, logits in self._head(rows, mode):
            shifted = logits - logits.max()
            yield row, shifted - np.log(np.exp(shifted).sum())

    def _head(self, rows: Sequence[int], mode: Mode) -> Iterator[tuple[int, Floats]]:
        """Run the head on what the last layer left, some rows at a time; logits are a view."""
        logits = self.backend.buffer(self.program.logits)
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[begin : begin + ROWS_AT_ONCE]
            ops = (self.starts[-1], len(self.program.ops))
            self.backend.run_ops(self.tokens, 0, *ops, mode=mode, wanted=some)
            yield from zip(some, logits, strict=False)

    def _run(self, begin: int, end: int, mode: Mode = "full") -> None:
        self.backend.run_ops(self.tokens, 0, begin, end, mode=mode)

    def _hidden(self) -> Floats:
        return self.backend.buffer("hidden")[: len(self.tokens)].copy()

    def _restore(self, depth: int) -> None:
        self.backend.buffer("hidden")[: len(self.tokens)] = self.entries[depth]
