"""GGUF files: checked from their header alone, and converted to Hugging Face directories.

The check walks the header as the GGUF specification (versions 2 and 3, github.com/ggml-org/
ggml, docs/gguf.md) lays it out, and believes no count or length before it has compared it
with the bytes that are there. The conversion dequantizes through transformers to bfloat16.
Nested arrays, big-endian and split files are refused.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutirao.errors import FormatError
from mutirao.formats.huggingface import save_causal_lm, without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_STRINGS = 1 << 21
"""Most strings in a header: room for the largest vocabularies of 2026 with their merges
(under a million together, an assumption), and a few seconds of reading at the worst."""
MAX_REASON_LENGTH = 300
MAX_DIMENSIONS = 4
"""GGML_MAX_DIMS of ggml.h."""

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY, _UINT32 = 8, 9, 4


@dataclass(frozen=True)
class GGUFSummary:
    """What a GGUF file holds, from its header."""

    architecture: str
    """llama.cpp's name for it, such as 'llama'."""
    name: str
    """The model's own name; may be empty."""
    license: str
    """Its licence as the file says it; may be empty."""
    num_tensors: int
    num_parameters: int
    """Elements of all tensors."""
    num_tensors_by_type: dict[str, int]
    """How many tensors are of each quantization type, such as {'Q4_1': 210, 'F32': 61}."""
    size_bytes: int
    """Size of the file in bytes."""

    @property
    def main_type(self) -> str:
        """The quantization type of most tensors, those in float32 (norms) left out."""
        counts = {kind: num for kind, num in self.num_tensors_by_type.items() if kind != "F32"}
        return max(counts, key=lambda kind: (counts[kind], kind), default="F32")


@dataclass(frozen=True)
class _Tensor:
    """One tensor's entry in the header."""

    name: str
    type_name: str
    num_elements: int
    offset: int
    """From the start of the tensor data, in bytes."""
    num_bytes: int


class _Damaged(Exception):
    """What is wrong with a file, without its name; becomes a FormatError."""


def check_gguf(path: Path) -> GGUFSummary:
    """Walk a GGUF file's header and check that all its tensor data is there.

    Raises:
        FormatError: not a GGUF file, truncated, damaged, or of an unsupported version.
    """
    if not path.is_file():
        raise FormatError(f"{path} is not a file (expected a GGUF file)")
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise _Damaged(f"does not begin with {MAGIC.decode()!r}, so it is no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _summarize(_Cursor(data), size_bytes)
    except OSError as error:
        raise FormatError(
            f"{path} cannot be read: {error.strerror} (expected a GGUF file)"
        ) from None
    except _Damaged as error:
        # Names in a hostile file may be long, or hold control characters.
        reason = "".join(c if c.isprintable() else "?" for c in str(error)[:MAX_REASON_LENGTH])
        raise FormatError(f"{path} {reason}; download or convert it again") from None


def convert_gguf(path: Path, out: Path) -> None:
    """Dequantize a GGUF model to a Hugging Face directory in bfloat16.

    Args:
        path: the GGUF file, with its tokenizer inside.
        out: folder to write into; created if missing.

    Raises:
        FormatError: damaged, or an architecture or tokenizer that transformers cannot read.
        DiskFullError: no room left in ``out``.
    """
    summary = check_gguf(path)
    try:
        model, tokenizer = _load(path)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise FormatError(
            f"{path} ({summary.architecture}) cannot be converted by transformers: {error}"
        ) from error
    types = ", ".join(f"{num} {kind}" for kind, num in summary.num_tensors_by_type.items())
    save_causal_lm(
        model,
        tokenizer,
        out,
        license=summary.license or None,
        description=f"Dequantized from {path.name} (tensors: {types}).",
    )


class _Cursor:
    """Reads little-endian values in order, each only after its bytes are known to be there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.position = len(MAGIC)
        self.num_strings = 0
        self._data = data
        self._size = len(data)

    def take(self, num_bytes: int, what: str) -> int:
        """Step over bytes and return where they began."""
        if num_bytes > self._size - self.position:
            raise _Damaged(
                f"is truncated or damaged: {what} needs {num_bytes} bytes at byte "
                f"{self.position} of {self._size}"
            )
        begin = self.position
        self.position += num_bytes
        return begin

    def number(self, layout: str, what: str) -> int | float:
        begin = self.take(struct.calcsize(layout), what)
        value: int | float = struct.unpack_from(layout, self._data, begin)[0]
        return value

    def count(self, layout: str, what: str, smallest_bytes: int) -> int:
        """Read how many entries follow, and refuse more than there are bytes for."""
        num = int(self.number(layout, what))
        if num * smallest_bytes > self._size - self.position:
            raise _Damaged(
                f"is truncated or damaged: it announces {num} {what} in the "
                f"{self._size - self.position} bytes that follow"
            )
        return num

    def skip_string(self, what: str) -> tuple[int, int]:
        self.num_strings += 1
        if self.num_strings > MAX_STRINGS:
            raise _Damaged(f"is damaged: it holds more than {MAX_STRINGS} strings")
        num_bytes = self.count("<Q", f"bytes of {what}", 1)
        return self.take(num_bytes, what), num_bytes

    def string(self, what: str) -> str:
        begin, num_bytes = self.skip_string(what)
        try:
            return self._data[begin : begin + num_bytes].decode()
        except UnicodeDecodeError:
            raise _Damaged(f"is damaged: {what} is not UTF-8") from None


def _summarize(cursor: _Cursor, size_bytes: int) -> GGUFSummary:
    _check_version(int(cursor.number("<I", "the version")))
    num_tensors = cursor.count("<Q", "tensors", 24)
    num_pairs = cursor.count("<Q", "metadata pairs", 13)
    metadata = _read_metadata(cursor, num_pairs)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"is damaged: its alignment is {alignment!r} (expected a power of 2)")
    tensors = [_read_tensor(cursor) for _ in range(num_tensors)]
    data_begin = -(-cursor.position // alignment) * alignment
    _check_layout(tensors, alignment, size_bytes - data_begin)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _Damaged("is damaged: its metadata name no general.architecture")
    types = [tensor.type_name for tensor in tensors]
    return GGUFSummary(
        architecture=architecture,
        name=str(metadata.get("general.name", "")),
        license=str(metadata.get("general.license", "")),
        num_tensors=num_tensors,
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        num_tensors_by_type={kind: types.count(kind) for kind in dict.fromkeys(types)},
        size_bytes=size_bytes,
    )


def _check_version(version: int) -> None:
    if version in SUPPORTED_VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in SUPPORTED_VERSIONS:
        raise _Damaged("is big-endian, which is not supported (expected little-endian)")
    raise _Damaged(f"has GGUF version {version}, which is not supported (expected 2 or 3)")


def _read_metadata(cursor: _Cursor, num_pairs: int) -> dict[str, Any]:
    """Read the metadata; arrays are stepped over, their values left out."""
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise _Damaged(f"is damaged: it has {key} twice")
        kind = int(cursor.number("<I", f"the type of {key}"))
        if kind == _STRING and key.startswith("general."):
            metadata[key] = cursor.string(key)
        elif kind == _STRING:
            cursor.skip_string(key)
        elif kind == _ARRAY:
            _skip_array(cursor, key)
        elif kind in _SCALARS:
            metadata[key] = cursor.number(_SCALARS[kind], key)
        else:
            raise _Damaged(f"is damaged: {key} is of the unknown type {kind}")
    return metadata


def _skip_array(cursor: _Cursor, key: str) -> None:
    kind = int(cursor.number("<I", f"the type of {key}"))
    if kind == _STRING:
        for _ in range(cursor.count("<Q", f"strings in {key}", 8)):
            cursor.skip_string(f"a string of {key}")
    elif kind in _SCALARS:
        width = struct.calcsize(_SCALARS[kind])
        cursor.take(cursor.count("<Q", f"values in {key}", width) * width, key)
    else:
        raise _Damaged(f"has an array {key} of type {kind}, which is not supported")


def _read_tensor(cursor: _Cursor) -> _Tensor:
    name = cursor.string("a tensor's name")
    num_dimensions = int(cursor.number("<I", f"the rank of {name}"))
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _Damaged(f"is damaged: {name} has {num_dimensions} dimensions (expected 1 to 4)")
    shape = [int(cursor.number("<Q", f"the shape of {name}")) for _ in range(num_dimensions)]
    type_name, block_size, block_bytes = _block(
        int(cursor.number("<I", f"the type of {name}")), name
    )
    offset = int(cursor.number("<Q", f"the offset of {name}"))
    num_elements = math.prod(shape)
    if num_elements == 0 or shape[0] % block_size:
        raise _Damaged(
            f"is damaged: {name} has shape {shape} (expected rows of whole {type_name} blocks of "
            f"{block_size})"
        )
    return _Tensor(name, type_name, num_elements, offset, num_elements // block_size * block_bytes)


def _block(kind: int, name: str) -> tuple[str, int, int]:
    """Return a quantization type's name, its elements per block and its bytes per block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantization = GGMLQuantizationType(kind)
        return (quantization.name, *GGML_QUANT_SIZES[quantization])
    except (ValueError, KeyError):
        raise _Damaged(f"has tensor {name} of type {kind}, which is not supported") from None


def _check_layout(tensors: list[_Tensor], alignment: int, data_bytes: int) -> None:
    """Check that tensors lie aligned, apart from each other, and inside the file."""
    if not tensors:
        raise _Damaged("holds no tensors, so it is not a model")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Damaged("is damaged: two of its tensors have one name")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset % alignment or tensor.offset < end:
            raise _Damaged(
                f"is damaged: {tensor.name} lies at {tensor.offset}, unaligned or over another"
            )
        end = tensor.offset + tensor.num_bytes
        if end > data_bytes:
            raise _Damaged(
                f"is truncated: {tensor.name} ends at byte {end} of the tensor data, of which "
                f"only {max(data_bytes, 0)} are there"
            )


def _load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load model (bfloat16, evaluation mode) and tokenizer out of a GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # The automatic class would parse the whole file once more only to find this one.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**place, local_files_only=True)
    with _one_reading():
        config = AutoConfig.from_pretrained(**place, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=torch.float32, local_files_only=True
        )
    # transformers would refuse to save what it still takes for a quantized model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = path.stem
    vars(model.config).pop("_model_name_or_path", None)
    _mend_tokenizer(tokenizer, path, model.config.max_position_embeddings)
    return model.bfloat16().eval(), tokenizer


def _mend_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path, max_length: int) -> None:
    """Restore what a GGUF says of its tokenizer and transformers (5.19) leaves out."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(path))
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        # llama.cpp splits off each digit first; without it '\n\n1' becomes other tokens
        # than those that the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.model_max_length = max_length
    tokenizer.init_kwargs = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name not in ("local_files_only", "is_local", "name_or_path")
    }
    tokenizer.name_or_path = path.stem


@contextmanager
def _one_reading() -> Iterator[None]:
    """Let transformers parse a GGUF once, quietly: 7 s instead of 14 s for 135 M parameters.

    It asks for the parsed file twice and for the same table of names once per submodule (397
    times); both are remembered here (2 CPU cores, transformers 5.19, gguf 0.19).
    It replaces names in their modules meanwhile, so only one thread may convert at a time.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    with ExitStack() as stack:
        stack.enter_context(without_progress_bars())
        for module, name, substitute in (
            (gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
            (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
            (loader, "tqdm", functools.partial(loader.tqdm, disable=True)),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, substitute)
        yield
