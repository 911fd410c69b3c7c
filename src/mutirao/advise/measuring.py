"""What ways of rounding cost a model on held-out text, one by one; resumable.

The model is rounded in memory, scored beside itself as it was, and put back. One line for each way
is kept in a file that bears the hash of the weights, the text and the windows, so that a second
advice on the same model and text measures nothing twice.

Shapes: W windows, T tokens, D channels.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutirao.advise.kept import KeptLines
from mutirao.advise.ways import Way
from mutirao.artifact import sha256_of_file
from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import TUNE, TuneConfig
from mutirao.compress.loss import CompressionLoss, compare_losses, compare_states, window_states
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.rounding.grid import quantize_weight
from mutirao.compress.training.tuning import tune_grids
from mutirao.compress.windows import Windows
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.head import split_model

METHODS_VERSION = 3
"""To be raised with every change of a way of rounding: older measures are then not used."""


@dataclass(frozen=True)
class Measured:
    """What one way costs."""

    way: Way
    loss: CompressionLoss

    @property
    def is_clear(self) -> bool:
        """Whether the rise is at least five standard errors."""
        return self.loss.rise >= 5 * self.loss.standard_error


class Bench:
    """A model that can be rounded, measured and put back."""

    def __init__(self, model: Any, windows: Windows) -> None:
        """Score the model as it is.

        Args:
            model: a transformers causal model; it is as it was after each measurement.
            windows: of text, to look at and to measure on.
        """
        self.model, self.windows = model, windows
        self.layers = linear_layers(model)
        self._kept = {name: each.detach().clone() for name, each in model.named_parameters()}
        self._states_WTD = window_states(model, windows.heldout)
        self._probed_WTD = self._states_WTD[:0]

    def round(self, way: Way) -> None:
        """Round the model.

        Raises:
            InputError: the way tunes, and TRL is not installed.
        """
        if way.method == "rtn":
            self.round_layers(dict.fromkeys(self.layers, way.bits), way.group_size)
            return
        ids_WT = self.windows.calibration
        rounder = way.method.removesuffix(f",{TUNE}")
        codes = round_by_blocks(self.model, rounder, way.bits, way.group_size, ids_WT)
        if rounder != way.method:
            tune_grids(self.model, codes, self._original(), ids_WT, TuneConfig())

    def _original(self) -> Any:
        """Return another model with the weights that this one had."""
        original = copy.deepcopy(self.model)
        self._put_back(original)
        return original

    @torch.no_grad()
    def round_layers(self, bits: Mapping[str, int], group_size: int | None) -> None:
        """Round some layers to nearest, each to its bits."""
        for name, width in bits.items():
            layer = self.layers[name]
            layer.weight.copy_(quantize_weight(layer.weight, width, group_size).expand())

    def restore(self) -> None:
        """Put the model's own weights back."""
        self._put_back(self.model)

    @torch.no_grad()
    def _put_back(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self._kept[name])

    @torch.inference_mode()
    def score(self) -> CompressionLoss:
        """Compare the model as it is now with what it was, on the held-out windows."""
        return self._compare(self.windows.heldout, self._states_WTD)

    @torch.inference_mode()
    def keep_probed(self, num_windows: int) -> None:
        """Remember what the model, as it is now, makes of some of the windows to look at."""
        self._probed_WTD = window_states(self.model, self.windows.calibration[:num_windows])

    @torch.inference_mode()
    def probe(self) -> float:
        """Return the divergence on the windows that were kept, in nats per token."""
        ids_WT = self.windows.calibration[: len(self._probed_WTD)]
        return self._compare(ids_WT, self._probed_WTD).divergence

    def _compare(self, ids_WT: Tensor, states_WTD: Tensor) -> CompressionLoss:
        # The head is not rounded, and may be one with the embedding, which is not either.
        head = split_model(self.model)[1]
        after = head, window_states(self.model, ids_WT)
        return compare_losses(*compare_states((head, states_WTD), after, ids_WT))

    def measure(self, way: Way) -> Measured:
        """Return what one way costs; the model is as it was afterwards, whatever happens."""
        try:
            self.round(way)
            return Measured(way, self.score())
        finally:
            self.restore()


def fingerprint(path: Path, windows: Iterable[Tensor] = ()) -> str:
    """Return a hash of a model's weights, and of windows; what was found of them belongs to it."""
    digest = hashlib.sha256(f"{METHODS_VERSION} {fast_dtype()}".encode())
    for file in sorted([*path.glob("*.safetensors"), path / "config.json"]):
        digest.update(sha256_of_file(file).encode())
    for ids_WT in windows:
        digest.update(repr(tuple(ids_WT.shape)).encode() + ids_WT.numpy().tobytes())
    return digest.hexdigest()[:24]


def measure_ways(bench: Bench, ways: Iterable[Way], path: Path) -> Iterator[Measured]:
    """Yield what each way costs; what ``path`` has is not measured again.

    Args:
        bench: see ``Bench``.
        ways: in the order in which they are measured.
        path: file of what was measured, of the same model and windows.

    Raises:
        DiskFullError: no room to keep a measure; those before it are kept.
    """
    known = {each.way: each for each in read_measured(path)}
    for way in ways:
        if way not in known:
            known[way] = bench.measure(way)
            KeptLines(path).add(asdict(way) | known[way].loss._asdict())
        yield known[way]


def read_measured(path: Path) -> list[Measured]:
    """Return what a file has; a line that a kill cut is left out."""
    found = []
    for values in KeptLines(path).read():
        try:
            way = Way(*(values.pop(name) for name in ("method", "bits", "group_size")))
            found.append(Measured(way, CompressionLoss(**values)))
        except (TypeError, KeyError):
            continue
    return found
