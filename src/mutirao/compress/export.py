"""Write a model for other programs: one GGUF file, or a plain Hugging Face directory.

GGUF is what llama.cpp, the many programs on top of it, and the engine here read; a compressed
model's codes go into it as they are where a block type holds them. A plain directory is what any
library opens, its compressed weights expanded. Both are artifacts: a folder with ``model.gguf``
or the directory's files, a model card, and a manifest with what was measured (``export_check``).
Nothing counts before it was read back and compared; then it appears at once, or not at all.

The check holds the model in float32, source and export one after the other: four bytes per weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue

from mutirao.artifact import MANIFEST_NAME, ArtifactWriter, open_artifact, write_artifact
from mutirao.compress.export_check import (
    TOLERANCES,
    Parity,
    ReadLogits,
    check_tokens,
    compare,
    directory_logits,
    gguf_logits,
    refuse_beyond_tolerance,
    text_windows,
)
from mutirao.config import Config
from mutirao.console import format_bytes, part_progress
from mutirao.environment import release_memory
from mutirao.errors import FormatError, InputError
from mutirao.formats.compressed_tensors import is_packed, load_packed
from mutirao.formats.gguf_plan import Change, GGUFPlan, WeightType, plan_gguf
from mutirao.formats.gguf_vocabulary import read_tokenizer
from mutirao.formats.gguf_writer import write_gguf
from mutirao.formats.huggingface import (
    Dtype,
    check_model_directory,
    load_causal_lm,
    model_license,
    save_causal_lm,
)

GGUF_NAME = "model.gguf"
DTYPES: dict[WeightType, Dtype] = {
    "auto": "bfloat16",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
}
"""Of a plain directory; what a compressed model stands for is bfloat16 by default, as it is where
such models are opened."""


class ExportConfig(Config):
    """What a model is exported as."""

    format: Literal["gguf", "huggingface"] = "gguf"
    """One GGUF file, or a plain Hugging Face directory."""
    weight_type: WeightType = "auto"
    """Number format of the matrices. ``auto``: of GGUF, whatever keeps the weights as they are; of
    a directory, bf16. q8_0, q4_0 and q4_1 are GGUF's."""
    check: bool = True
    """Read the export back and compare logits, and of GGUF tokens, with the source."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest accepted mean KL divergence from the source, nats per token; none: by what was done
    to the weights."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write."""

    format: str
    num_tensors_by_type: dict[str, int]
    size_bytes: int
    """Of all weights."""
    check_bytes: int
    """Memory that comparing takes, for weights in float32."""
    notes: tuple[str, ...]
    """What is not as it was asked for, and why."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``json`` can write."""
        return {**vars(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    """The artifact's folder."""
    model_path: Path
    """What programs are pointed at: the GGUF file, or the folder."""
    plan: ExportPlan
    parity: Parity | None
    """None where it was not checked."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``json`` can write."""
        return {
            "path": str(self.path),
            "model": str(self.model_path),
            **self.plan.to_json(),
            "parity": None if self.parity is None else self.parity.model_dump(mode="json"),
        }


def plan_export(path: Path, config: ExportConfig, out: Path | None = None) -> ExportPlan:
    """Say what an export would write.

    Args:
        path: a Hugging Face directory, plain or compressed.
        config: see ``ExportConfig``.
        out: where it would be written; None where that is not known yet.

    Raises:
        FormatError: it is no model, damaged, or cannot be written so.
        InputError: the format has no such number format, or ``out`` is no place for an artifact.
    """
    if out is not None:
        _check_places(path, out)
    if config.format == "gguf":
        return _plan_of_gguf(plan_gguf(path, config.weight_type))
    check_model_directory(path)
    dtype = _dtype(config)
    num_tensors, num_weights = _count_weights(path)
    size_bytes = num_weights * getattr(torch, dtype).itemsize
    return ExportPlan("huggingface", {dtype: num_tensors}, size_bytes, 4 * num_weights, ())


def export_model(
    path: Path, out: Path, config: ExportConfig, *, read_logits: ReadLogits = gguf_logits
) -> Export:
    """Write a model as an artifact of kind 'gguf' or, as a directory, of kind 'model'.

    The manifest's metrics say ``total_bytes``, ``num_tensors_by_type``, ``notes`` and, where it
    was checked, all of ``Parity`` under ``parity``.

    Args:
        path: model artifact, or any Hugging Face directory, plain or compressed.
        out: folder of the new artifact; an older one there is replaced on success.
        config: see ``ExportConfig``.
        read_logits: reads a GGUF file back for the check; see ``export_check``.

    Raises:
        InputError: ``out`` is no place for an artifact, or the format has no such number format.
        FormatError: ``path`` is no model, is damaged, or cannot be written so.
        ArtifactError: ``path`` was altered since it was written; or what was written does not
            predict what ``path`` predicts.
        DiskFullError: no room; ``out`` is as it was.
    """
    _check_places(path, out)
    is_artifact = (path / MANIFEST_NAME).is_file()
    if is_artifact:
        open_artifact(path, "model")
    recipe: dict[str, JsonValue] = {"export": config.model_dump(mode="json")}
    kind = "gguf" if config.format == "gguf" else "model"
    with write_artifact(out, kind, recipe=recipe) as writer:
        if is_artifact:
            writer.add_parent("model", path)
        write = _write_gguf if config.format == "gguf" else _write_directory
        plan, parity = write(path, writer, config, read_logits)
        writer.metrics |= {
            "total_bytes": plan.size_bytes,
            "num_tensors_by_type": dict(plan.num_tensors_by_type),
            "notes": list(plan.notes),
            "parity": None if parity is None else parity.model_dump(mode="json"),
        }
    model_path = out / GGUF_NAME if config.format == "gguf" else out
    return Export(out, model_path, plan, parity)


def _check_places(path: Path, out: Path) -> None:
    """Refuse to write over a folder that is not ours, or over the model itself."""
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder (expected a Hugging Face model directory)")
    source, target = path.resolve(), out.resolve()
    if target == source or target in source.parents:
        raise InputError(f"--out {out} holds the model itself; name another folder")
    is_ours = (target / MANIFEST_NAME).is_file()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_ours and not is_empty:
        raise InputError(
            f"--out {out} exists and is no artifact, so it is not written over; name a new folder"
        )


def _write_gguf(
    path: Path, writer: ArtifactWriter, config: ExportConfig, read_logits: ReadLogits
) -> tuple[ExportPlan, Parity | None]:
    plan = plan_gguf(path, config.weight_type)
    file = writer.path / GGUF_NAME
    with part_progress(f"writing {GGUF_NAME}") as progress:
        write_gguf(plan, file, progress)
    told = _plan_of_gguf(plan)
    parity = None
    if config.check:
        check_tokens(path, file)
        parity = _parity(path, file, config, plan.change, read_logits)
    card = _gguf_card(path, told, plan.architecture, parity)
    (writer.path / "README.md").write_text(card, encoding="utf-8")
    return told, parity


def _write_directory(
    path: Path, writer: ArtifactWriter, config: ExportConfig, _: ReadLogits
) -> tuple[ExportPlan, Parity | None]:
    plan, dtype = plan_export(path, config), _dtype(config)
    is_compressed = is_packed(path)
    load = load_packed if is_compressed else load_causal_lm
    model, tokenizer = load(path, dtype=dtype)
    made = "Expanded from the compressed model" if is_compressed else "Written from"
    save_causal_lm(
        model,
        tokenizer,
        writer.path,
        license=model_license(path),
        description=f"{made} {path.name}; any library that reads safetensors opens it.",
    )
    del model
    release_memory()
    parity = None
    if config.check:
        change = Change.KEPT if dtype == "float32" else Change.ROUNDED_16
        parity = _parity(path, writer.path, config, change, directory_logits)
    return plan, parity


def _parity(
    source: Path, export: Path, config: ExportConfig, change: Change, read_logits: ReadLogits
) -> Parity:
    """Measure, and refuse what is too far off."""
    from transformers import AutoConfig

    context = AutoConfig.from_pretrained(str(source), local_files_only=True).max_position_embeddings
    windows: Sequence[Sequence[int]] = text_windows(read_tokenizer(source), context)
    expected = directory_logits(source, windows)
    release_memory()
    tolerance = TOLERANCES[change] if config.tolerance is None else config.tolerance
    parity = compare(expected, read_logits(export, windows), tolerance)
    refuse_beyond_tolerance(parity)
    return parity


def _plan_of_gguf(plan: GGUFPlan) -> ExportPlan:
    num_weights = sum(math.prod(tensor.shape) for tensor in plan.tensors)
    return ExportPlan(
        "gguf", plan.num_tensors_by_type, plan.size_bytes, 4 * num_weights, plan.notes
    )


def _count_weights(path: Path) -> tuple[int, int]:
    """Return how many tensors and how many numbers a model has, without loading any."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(str(path), local_files_only=True),
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path} cannot be read by transformers: {first_line}") from None
    return len(list(model.parameters())), model.num_parameters()


def _gguf_card(path: Path, told: ExportPlan, architecture: str, parity: Parity | None) -> str:
    """Return the model card of a GGUF file."""
    license = model_license(path)
    front = ["library_name: gguf", "pipeline_tag: text-generation"]
    front += [f"license: {json.dumps(license)}"] if license else []
    types = ", ".join(f"{num} {kind}" for kind, num in told.num_tensors_by_type.items())
    body = [
        f"# {path.name} as GGUF",
        f"`{GGUF_NAME}`, architecture {architecture}, {format_bytes(told.size_bytes)} of weights "
        f"(tensors: {types}), written by Mutirão. llama.cpp and what stands on it run it, and "
        f"`mutirao run {GGUF_NAME}`.",
        *told.notes,
    ]
    if parity is not None:
        body.append(
            f"Read back and compared with its source on {parity.num_tokens} tokens: mean KL "
            f"divergence {parity.mean_kl_nats:.2g} nats per token, largest difference of a logit "
            f"{parity.max_logit_difference:.2g}, the same likeliest token at "
            f"{100 * parity.same_top_share:.1f} % of positions."
        )
    return "\n".join(["---", *front, "---", ""]) + "\n" + "\n\n".join(body) + "\n"


def _dtype(config: ExportConfig) -> Dtype:
    if config.weight_type not in DTYPES:
        raise InputError(
            f"export.weight_type={config.weight_type} is not supported with format huggingface "
            f"(expected one of {', '.join(DTYPES)}); use --format gguf"
        )
    return DTYPES[config.weight_type]
