"""What a plan has to know of a model: its specification, and the sizes of its matrices.

Nothing is converted or loaded, and of a hub's repository only config.json is downloaded. Where
a description comes without weights, the formats that llama.cpp would give them are assumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mutirao.errors import FormatError
from mutirao.inference.architecture.architectures import spec_from_config
from mutirao.inference.architecture.model_spec import ModelSpec
from mutirao.inference.planning.quantization_mixes import USUAL, assumed_formats
from mutirao.inference.store.plane_formats import split_format
from mutirao.inference.store.source_weights import open_source
from mutirao.inference.store.store_index import INDEX_NAME, StoredTensor, plan_layout, read_index
from mutirao.inference.store.weight_store import store_directory
from mutirao.sources import GGUFSource, HubSource, PathSource, fetch, fetch_config, parse_source


@dataclass(frozen=True)
class PlannedModel:
    """A model, or one that could be made of a description."""

    name: str
    spec: ModelSpec
    quantization: str
    """Of llama.cpp where it is assumed; '' where the weights are there."""
    tensors: dict[str, StoredTensor]
    """Matrices by store name, as they lie or would lie in a weight store."""
    store: Path | None
    """Folder of the weight store, which need not be there yet; None without weights."""


def planned_models(text: str, quantizations: Sequence[str] = ()) -> list[PlannedModel]:
    """Read what a source names.

    Args:
        text: a GGUF file, a Hugging Face directory, a weight store, a config.json, or another
            source; see ``mutirao.sources``.
        quantizations: keys of ``quantization_mixes.MIXES`` to assume, whatever the weights
            are; none: the weights as they are or, where there are none, the usual ones.

    Returns:
        The model, or one for each quantization that was assumed.

    Raises:
        SourceError: the source is malformed or names nothing.
        FormatError: what it names is damaged, no model, or one that is not supported.
        InputError: unknown quantization.
    """
    path = _find(text)
    if path.is_dir() and not (path / INDEX_NAME).is_file() and not any(path.glob("*.safetensors")):
        path /= "config.json"
    if path.suffix == ".json":
        name, spec = path.resolve().parent.name, _read_config(path)
        return [_assumed(name, spec, each) for each in quantizations or USUAL]
    model = _with_weights(path)
    if quantizations:
        return [_assumed(model.name, model.spec, each) for each in quantizations]
    return [model]


def _with_weights(path: Path) -> PlannedModel:
    if (path / INDEX_NAME).is_file():
        index = read_index(path)
        return PlannedModel(path.name, index.spec, "", index.layout.tensors, path)
    with open_source(path) as source:
        spec = source.spec
        formats = {
            name: split_format(matrix.format, matrix.num_columns)
            for name, matrix in source.matrices.items()
        }
    tensors = plan_layout(spec, formats).tensors
    return PlannedModel(path.name, spec, "", tensors, store_directory(path))


def _find(text: str) -> Path:
    source = parse_source(text)
    if isinstance(source, HubSource):
        return fetch_config(source)
    if isinstance(source, PathSource | GGUFSource) and source.path.exists():
        return source.path  # not fetched: that would hash all of it
    return fetch(source).path


def _assumed(name: str, spec: ModelSpec, quantization: str) -> PlannedModel:
    tensors = plan_layout(spec, assumed_formats(spec, quantization)).tensors
    return PlannedModel(name, spec, quantization, tensors, None)


def _read_config(path: Path) -> ModelSpec:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(
            f"{path} cannot be read: {error.strerror} (expected a model's config.json, or a folder "
            "or a GGUF file with its weights)"
        ) from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is not valid JSON; download it again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is damaged (expected a JSON object)")
    return spec_from_config(config)
