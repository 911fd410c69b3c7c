"""What a Hugging Face directory, plain or compressed by us, becomes as a GGUF file.

A plan says of each tensor which type it gets and how it is read; ``gguf_writer`` writes it.
Vectors are float32, matrices what was asked for:

    auto         as it is: 32 or 16 bits of a plain model; the very codes of a compressed one
    f32 … q8_0   every matrix in that type
    q4_0, q4_1   embedding and head, on which much hangs, in Q8_0

Blocks are 32 weights of a row. A matrix whose rows no whole number of them fills stays a float
matrix, and the plan says so. Codes of a compressed layer go into blocks unchanged wherever the
type that was asked for holds them (``gguf_blocks`` says what float16 changes).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError
from mutirao.formats.gguf_blocks import (
    BLOCK,
    FLOATS,
    Codes,
    convert,
    holds_codes,
    row_bytes,
    to_floats,
)
from mutirao.formats.gguf_description import (
    EMBEDDING,
    HEAD,
    ROPE_TABLE,
    GGUFDescription,
    Metadata,
    describe,
    gguf_names,
)
from mutirao.formats.gguf_vocabulary import vocabulary_metadata
from mutirao.formats.huggingface import check_model_directory, model_license
from mutirao.formats.layer_bits import LayerBits
from mutirao.formats.packed_rows import PARTS, PackedLayer, find_layer, packed_bits
from mutirao.formats.safetensors_reader import SafeTensor, read_model_tensors

WeightType = Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]


class Change(IntEnum):
    """What became of a weight, from nothing to much."""

    KEPT = 0
    CODES = 1
    """Codes are kept; scales and offsets went into float16."""
    ROUNDED_16 = 2
    ROUNDED_8 = 3
    ROUNDED_4 = 4


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file."""

    name: str
    type_name: str
    """Such as 'Q4_1'."""
    shape: tuple[int, ...]
    """Rows first."""
    change: Change
    read: Callable[[], NDArray[Any]]
    """Returns it as it is written: float32 of a vector, else (rows, bytes) uint8."""

    @property
    def num_bytes(self) -> int:
        """In the file, without padding."""
        rows = int(np.prod(self.shape[:-1]))
        return rows * row_bytes(self.type_name, self.shape[-1])


@dataclass(frozen=True)
class GGUFPlan:
    """What a file is to hold."""

    architecture: str
    metadata: Metadata
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    """Sentences about what is not as it was asked for, and why."""

    @property
    def size_bytes(self) -> int:
        """All tensors; the header comes on top."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def num_tensors_by_type(self) -> dict[str, int]:
        """Such as {'Q4_1': 210, 'F32': 61}."""
        return dict(Counter(tensor.type_name for tensor in self.tensors))

    @property
    def change(self) -> Change:
        """The largest change of any tensor."""
        return max(tensor.change for tensor in self.tensors)


def plan_gguf(folder: Path, weight_type: WeightType = "auto") -> GGUFPlan:
    """Say what a model becomes as a GGUF file; reads headers and zero points, no weights.

    Args:
        folder: a Hugging Face directory, plain or compressed (compressed-tensors).
        weight_type: see the module's docstring.

    Raises:
        FormatError: damaged, not supported, or, with ``auto``, compressed in a way that no GGUF
            block holds.
    """
    check_model_directory(folder)
    config = _read_config(folder)
    description = describe(config)
    bits = packed_bits(json.loads((folder / "config.json").read_bytes()))
    sources = _sources(folder, config, description, bits)
    tensors, notes = [], []
    for name in sources:
        tensor, note = _plan_tensor(description, name, sources, weight_type)
        tensors.append(tensor)
        notes += [note] if note else []
    if window := description.metadata.get(f"{description.architecture}.attention.sliding_window"):
        notes.append(
            f"attention has a window of {window} tokens, which llama.cpp does not read in this "
            "architecture: there, longer texts come out otherwise"
        )
    metadata: Metadata = {
        "general.name": folder.name or config.model_type,
        "general.quantization_version": 2,
        "general.file_type": _file_type(tensors),
        **({"general.license": license} if (license := model_license(folder)) else {}),
        **description.metadata,
        **vocabulary_metadata(folder, config.vocab_size, _ends(folder, config)),
    }
    return GGUFPlan(description.architecture, metadata, tuple(tensors), tuple(notes))


@dataclass(frozen=True)
class _Source:
    """A tensor of the model: plain, compressed, or computed."""

    plain: SafeTensor | None = None
    packed: PackedLayer | None = None
    values: NDArray[np.float32] | None = None

    @property
    def own_type(self) -> str:
        """The float type that it is nearest to."""
        return "BF16" if self.plain is None else self.plain.dtype

    def raw(self) -> NDArray[np.uint8]:
        """Return a plain tensor's bytes."""
        assert self.plain is not None
        return _read_rows(self.plain, 0, self.plain.shape[0])

    def codes(self) -> Codes:
        """Return a compressed layer's parts."""
        assert self.packed is not None
        return Codes(*self.packed.read_codes(_read_rows, 0, self.packed.shape[0]))

    def holds(self, type_name: str) -> bool:
        """Whether a block type holds a compressed layer's very codes."""
        return self.packed is not None and holds_codes(type_name, self.packed, _read_rows)

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers, in the tensor's shape."""
        if self.values is not None:
            return self.values
        if self.packed is not None:
            return self.codes().expand()
        assert self.plain is not None
        return to_floats(self.raw(), self.own_type).reshape(self.plain.shape)


def _read_rows(tensor: SafeTensor, begin: int, end: int) -> NDArray[np.uint8]:
    """Read some entries of a tensor's first dimension, as bytes."""
    size = tensor.num_bytes // max(1, tensor.shape[0])
    try:
        raw = np.fromfile(
            tensor.path, np.uint8, (end - begin) * size, offset=tensor.offset + begin * size
        )
    except OSError as error:
        raise FormatError(f"{tensor.path} cannot be read: {error.strerror}") from None
    if raw.size != (end - begin) * size:
        raise FormatError(f"{tensor.path} became shorter while it was read; make it again")
    return raw


def _sources(
    folder: Path, config: Any, description: GGUFDescription, bits: LayerBits | None
) -> dict[str, _Source]:
    """Return the sources of all tensors by GGUF name, in the file's order.

    Raises:
        FormatError: a tensor is missing, has no place, or is not of its shape or type.
    """
    stored = read_model_tensors(folder)
    packed = {
        name.rpartition(".")[0]
        for name in stored
        if bits is not None and name.endswith(f".{PARTS[0]}")
    }
    parts = {f"{layer}.{part}" for layer in packed for part in PARTS}
    whole = [*(name for name in stored if name not in parts), *(f"{n}.weight" for n in packed)]
    names = gguf_names(config, whole)
    places = {theirs: ours for ours, theirs in names.items()}
    if len(places) < len(names):
        raise FormatError(f"{folder} holds a tensor twice, under two names; make the model again")
    shapes = description.shapes | {
        name: (size,) for name, size in description.bias_sizes.items() if name in places
    }
    for name in places:
        if name not in shapes:
            raise FormatError(f"{folder}: tensor {places[name][:100]!r} has no place in this model")
    found = {}
    for name, shape in shapes.items():
        if name == ROPE_TABLE:
            found[name] = _Source(values=description.rope_divisors)
            continue
        if name not in places:
            raise FormatError(
                f"{folder} lacks the tensor of {name}, which its config.json calls for; download "
                "or make the model again"
            )
        layer = places[name].removesuffix(".weight")
        if bits is not None and layer in packed and len(shape) == 2:
            found[name] = _Source(
                packed=find_layer(stored, layer, (shape[0], shape[1]), bits.of(layer))
            )
            continue
        tensor = stored[places[name]]
        if tensor.dtype not in FLOATS or tensor.shape != shape:
            raise FormatError(
                f"{folder}: {places[name][:100]} is {tensor.dtype} of shape {tensor.shape} "
                f"(expected {' or '.join(FLOATS)} of {shape}, as config.json says)"
            )
        found[name] = _Source(plain=tensor)
    return found


def _plan_tensor(
    description: GGUFDescription, name: str, sources: dict[str, _Source], weight_type: WeightType
) -> tuple[PlannedTensor, str | None]:
    """Choose a tensor's type and how it is read; with a sentence if it is not what was asked."""
    source = sources[name]
    order = None if name == ROPE_TABLE else description.new_order(name)
    shape = description.shapes.get(name) or (description.bias_sizes[name],)
    if len(shape) == 1:
        return PlannedTensor(
            name, "F32", shape, Change.KEPT, lambda: _ordered(source.floats(), order)
        ), None
    wanted = _wanted_type(name, sources, weight_type)
    if source.holds(wanted):
        return PlannedTensor(
            name, wanted, shape, Change.CODES, lambda: _codes(source, order).blocks(wanted)
        ), None
    note = None
    if wanted not in FLOATS and shape[-1] % BLOCK:
        wanted = source.own_type
        note = (
            f"{name} stays in {wanted}: its rows of {shape[-1]} weights are no whole number of "
            f"blocks of {BLOCK}"
        )
    if source.plain is not None and wanted == source.own_type:
        return PlannedTensor(
            name,
            wanted,
            shape,
            Change.KEPT,
            lambda: _ordered(source.raw().reshape(shape[0], -1), order),
        ), note
    change = _change(source, wanted)

    def read() -> NDArray[np.uint8]:
        return convert(_ordered(source.floats(), order), wanted)

    return PlannedTensor(name, wanted, shape, change, read), note


def _wanted_type(name: str, sources: dict[str, _Source], weight_type: WeightType) -> str:
    if weight_type == "auto":
        return _exact_type(name, sources)
    if weight_type in ("q4_0", "q4_1") and name in (EMBEDDING, HEAD):
        return "Q8_0"
    return weight_type.upper()


def _exact_type(name: str, sources: dict[str, _Source]) -> str:
    """Return the type that holds a matrix as it is.

    Raises:
        FormatError: it is compressed and there is none that is not much larger.
    """
    source = sources[name]
    if source.packed is None:
        return source.own_type
    num_bits = source.packed.num_bits
    for type_name in {8: ("Q8_0",), 4: ("Q4_0", "Q4_1")}.get(num_bits, ()):
        if source.holds(type_name):
            return type_name
    packed = [each for each in sources.values() if each.packed is not None]
    holding = [
        type_name.lower()
        for type_name in ("Q4_1", "Q8_0")
        if all(each.holds(type_name) for each in packed)
    ]
    hint = (
        f"--type {' or '.join(holding)}, whose blocks hold its codes in more bits"
        if holding
        else "--type q8_0, which rounds again to 8 bits, a small loss"
    )
    raise FormatError(
        f"{name} has codes of {num_bits} bits in groups of {source.packed.group_size}, for "
        f"which GGUF has no plain block (expected 4 bits, or 8 around a zero of 128, in groups of "
        f"a multiple of 32); export with {hint}, with --type f16, or with --format huggingface"
    )


def _change(source: _Source, type_name: str) -> Change:
    if type_name == "F32":
        return Change.KEPT
    if type_name in FLOATS:
        return Change.ROUNDED_16
    return Change.ROUNDED_8 if type_name == "Q8_0" else Change.ROUNDED_4


def _codes(source: _Source, order: NDArray[np.intp] | None) -> Codes:
    codes = source.codes()
    return codes if order is None else codes.take(order)


def _ordered(values: NDArray[Any], order: NDArray[np.intp] | None) -> NDArray[Any]:
    return values if order is None else values[order]


def _file_type(tensors: list[PlannedTensor]) -> int:
    """Return llama.cpp's number of the type of most weights."""
    import gguf

    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type_name] += int(np.prod(tensor.shape))
    main = weights.most_common(1)[0][0]
    prefix = "ALL" if main == "F32" else "MOSTLY"
    return int(gguf.LlamaFileType[f"{prefix}_{main}"])


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise FormatError(f"{folder / 'config.json'} cannot be read: {first_line}") from None


def _ends(folder: Path, config: Any) -> tuple[int, ...]:
    """Return the tokens that end a generation, by generation_config.json or config.json."""
    ends = config.eos_token_id
    path = folder / "generation_config.json"
    try:
        if path.is_file():
            ends = json.loads(path.read_bytes()).get("eos_token_id", ends)
        return tuple(
            int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None
        )
    except (OSError, ValueError, TypeError, AttributeError):
        raise FormatError(
            f"the end-of-text tokens of {folder} cannot be read from {path.name} or config.json "
            "(expected a token id or a list of them); download the model again"
        ) from None
