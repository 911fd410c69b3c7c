"""Hugging Face model directories: checked without a framework, loaded and saved with one.

A directory holds config.json, safetensors (one file, or shards with an index), a tokenizer
and a model card. Only safetensors are read, never pickles, and no code that comes with a
model is run. The safetensors header is as github.com/huggingface/safetensors describes it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mutirao.artifact import write_atomic
from mutirao.errors import FormatError, explain_disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

Dtype = Literal["bfloat16", "float16", "float32"]


def check_model_directory(path: Path) -> None:
    """Check that a model directory is whole: configuration, weights and tokenizer.

    Raises:
        FormatError: a part is missing, damaged or truncated.
    """
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder (expected a Hugging Face model directory)")
    config = _read_json_object(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise FormatError(f"{path / 'config.json'} names no model_type, so it is no model's")
    for weights in _weight_files(path):
        check_safetensors(weights)
    if not any((path / name).is_file() for name in TOKENIZER_NAMES):
        raise FormatError(f"{path} holds no tokenizer (expected {TOKENIZER_NAMES[0]})")


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file's header is readable and all its data is there.

    Raises:
        FormatError: missing, damaged or truncated.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size_bytes
            if header_bytes > min(size_bytes - 8, MAX_HEADER_BYTES):
                raise FormatError(f"{path} is truncated or no safetensors file: its header is cut")
            header = json.loads(file.read(header_bytes))
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        expected_bytes = 8 + header_bytes + max(ends, default=0)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise FormatError(f"{path} has a damaged safetensors header; make it again") from None
    if expected_bytes != size_bytes:
        raise FormatError(
            f"{path} has {size_bytes} bytes (its header says {expected_bytes}), so it is "
            "truncated or damaged; make it again"
        )


def load_causal_lm(
    path: Path, dtype: Dtype = "bfloat16"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a directory, for evaluation.

    Raises:
        FormatError: damaged, incomplete, or an architecture that transformers lacks.
    """
    check_model_directory(path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(path, **safe)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), use_safetensors=True, **safe
            )
    except (ValueError, KeyError, OSError, ImportError) as error:  # a package that it is read with
        first_line = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path} cannot be loaded by transformers: {first_line}") from error
    return model.eval(), tokenizer


def save_causal_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base_model: str | None = None,
    license: str | None = None,
    description: str = "",
) -> None:
    """Save a model, its tokenizer and a model card as a Hugging Face directory.

    Args:
        model: any transformers model; its dtype is kept.
        tokenizer: saved with its chat template.
        folder: written into; created if missing.
        base_model: what it was made from, for the card.
        license: SPDX identifier in lower case, for the card; None where it is not known.
        description: a paragraph for the card.

    Raises:
        DiskFullError: no room left in ``folder``.
    """
    with explain_disk_errors(folder), without_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_atomic(folder / "README.md", _model_card(model, base_model, license, description))


def model_license(folder: Path) -> str | None:
    """Return the licence that a directory's model card names in its front matter, if any."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    for line in lines[1 : lines.index("---", 1)]:
        key, _, value = line.partition(":")
        if key == "license":
            return value.strip().strip("\"'") or None
    return None


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; ours say what matters."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _model_card(
    model: PreTrainedModel, base_model: str | None, license: str | None, description: str
) -> str:
    front = {
        "base_model": base_model,
        "library_name": "transformers",
        "license": license,
        "pipeline_tag": "text-generation",
    }
    # A JSON string is a YAML string, whatever characters a name has.
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    dtype = str(model.dtype).removeprefix("torch.")
    facts = f"{model.num_parameters():,} parameters in {dtype}, written by Mutirão."
    name = Path(model.config._name_or_path).name or model.config.model_type
    body = [f"# {name}", *([description] if description else []), facts]
    return "\n".join(["---", *lines, "---", ""]) + "\n" + "\n\n".join(body) + "\n"


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise FormatError(f"{folder} holds no {WEIGHTS_NAME} (pickled weights are not read)")
    shards = _read_json_object(folder / INDEX_NAME).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise FormatError(f"{folder / INDEX_NAME} is damaged: its weight_map names no shards")
    return [folder / name for name in sorted(names)]


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise FormatError(f"{path} is damaged (expected a JSON object)")
    return document
