"""Compressed models, as their manifests tell of them.

Numbers are those that ``mutirao compress`` measured when it wrote a model; files are not read
again, so that a page of large models is there at once. A model whose loss was not measured has
None, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from mutirao.artifact import Manifest, read_manifest
from mutirao.errors import ArtifactError, InputError
from mutirao.report.advice.document import Z_95, Interval, find_kind
from mutirao.report.pedigree import Ancestor, trace

KIND = "model"
LARGEST = 1e18
"""Bytes, seconds or nats; a number beyond is none that was measured."""


@dataclass(frozen=True)
class Heldout:
    """What compression cost on held-out text, in nats per token."""

    original: float
    rise: float
    standard_error: float
    divergence: float | None
    num_tokens: int

    @property
    def interval(self) -> Interval:
        """The rise with its 95 % interval."""
        half = Z_95 * self.standard_error
        return Interval(self.rise, self.rise - half, self.rise + half)


@dataclass(frozen=True)
class CompressedModel:
    """One model; None for what was not measured."""

    label: str
    """Its folder's name, with what it takes to tell it from the others."""
    folder: str
    sha256: str
    parent_sha256: str | None
    """Of the artifact that it was made from; None where that was none."""
    method: str
    weight_bits: float | None
    group_size: int | None
    bits_per_weight: float
    total_bytes: int
    original_bytes: int | None
    ideal_bytes: int | None
    """In a format for pruned, low-rank or shared weights, where that would take less."""
    compress_s: float | None
    peak_memory_bytes: int | None
    heldout: Heldout | None
    recipe: dict[str, JsonValue]
    lineage: tuple[Ancestor, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; sizes in bytes, losses in nats per token."""
        found = asdict(self)
        if self.heldout is not None:
            loss = self.heldout.original
            found["rise_share"] = {
                name: value / loss for name, value in asdict(self.heldout.interval).items()
            }
        return found


def is_model(folder: Path) -> bool:
    """Whether a folder is an artifact of kind 'model', compressed or not.

    Raises:
        ArtifactError: it is an artifact whose manifest is damaged.
    """
    return find_kind(folder) == KIND


def read_models(folders: Sequence[Path]) -> tuple[CompressedModel, ...]:
    """Read what the manifests of compressed models say, the smallest model last.

    Args:
        folders: at least one; a folder that is named twice counts once.

    Raises:
        InputError: one is no compressed model.
        ArtifactError: a manifest is damaged, or its numbers cannot be.
    """
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    labels = _labels(distinct)
    found = [_read(folder, label) for folder, label in zip(distinct, labels, strict=True)]
    return tuple(sorted(found, key=lambda each: -each.total_bytes))


def find_differences(models: Sequence[CompressedModel]) -> list[str]:
    """Return why rises of several models cannot be held against each other; empty where they can.

    Models that were made from one model and measured on one text have the same loss before.
    """
    reasons = []
    parents = {each.parent_sha256 for each in models if each.parent_sha256}
    if len(parents) > 1:
        reasons.append(f"they were made from {len(parents)} different models")
    before = [each.heldout for each in models if each.heldout is not None]
    losses = [each.original for each in before]
    if losses and max(losses) - min(losses) > 1e-3 * max(losses):
        reasons.append(
            f"the loss before was {min(losses):.4f} to {max(losses):.4f} nats per token, so they "
            "were not measured on the same model and text"
        )
    elif len({each.num_tokens for each in before}) > 1:
        reasons.append("they were measured on different numbers of tokens")
    return reasons


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(folder: Path, label: str) -> CompressedModel:
    if find_kind(folder) != KIND:
        raise InputError(
            f"{folder} is not a compressed model; name folders that `mutirao compress` wrote, or "
            "a single other folder"
        )
    manifest = read_manifest(folder)
    compress = manifest.recipe.get("compress")
    total_bytes = _number(manifest.metrics, "total_bytes")
    if not isinstance(compress, dict) or total_bytes is None:
        raise InputError(
            f"{folder} is a model that was not compressed; name folders that `mutirao compress` "
            "wrote"
        )
    bits_per_weight = _number(manifest.metrics, "bits_per_weight")
    if total_bytes <= 0 or bits_per_weight is None:
        raise ArtifactError(
            f"{folder} is damaged: its manifest says {total_bytes:g} bytes and no or no finite "
            "bits_per_weight; compress the model again"
        )
    group_size = compress.get("group_size")
    parent = manifest.parents.get("model")
    return CompressedModel(
        label=label,
        folder=str(folder),
        sha256=manifest.sha256,
        parent_sha256=parent.sha256 if parent is not None else None,
        method=str(compress.get("method", "unknown")),
        weight_bits=_number(manifest.metrics, "weight_bits"),
        group_size=group_size if isinstance(group_size, int) else None,
        bits_per_weight=bits_per_weight,
        total_bytes=int(total_bytes),
        original_bytes=_whole(manifest.metrics, "original_bytes"),
        ideal_bytes=_whole(manifest.metrics, "ideal_bytes"),
        compress_s=_number(manifest.metrics, "compress_s"),
        peak_memory_bytes=_whole(manifest.metrics, "peak_memory_bytes"),
        heldout=_heldout(manifest),
        recipe=dict(manifest.recipe),
        lineage=trace(folder),
    )


def _heldout(manifest: Manifest) -> Heldout | None:
    """Return what was measured; None where something that a rise takes is missing."""
    values = {
        name: _number(manifest.metrics, f"heldout.{name}")
        for name in ("original", "rise", "standard_error", "divergence", "num_tokens")
    }
    original, rise, error = (values[name] for name in ("original", "rise", "standard_error"))
    if original is None or rise is None or error is None or original <= 0:
        return None
    return Heldout(original, rise, error, values["divergence"], int(values["num_tokens"] or 0))


def _number(metrics: Mapping[str, JsonValue], name: str) -> float | None:
    value = metrics.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if -LARGEST < value < LARGEST else None  # not for what is no number, either


def _whole(metrics: Mapping[str, JsonValue], name: str) -> int | None:
    value = _number(metrics, name)
    return None if value is None else int(value)
