"""GGUF files: checked from their header alone, and converted to Hugging Face directories.

The header is walked in ``gguf_header``; the conversion dequantizes through transformers to
bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mutirao.errors import FormatError
from mutirao.formats.gguf_header import read_gguf_header
from mutirao.formats.huggingface import Dtype, save_causal_lm, without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_TOLD = ("general.architecture", "general.name", "general.license")


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


def check_gguf(path: Path) -> GGUFSummary:
    """Walk a GGUF file's header and check that all its tensor data is there.

    Raises:
        FormatError: not a GGUF file, truncated, damaged, or of an unsupported version.
    """
    header = read_gguf_header(path, lambda key: key in _TOLD)
    types = [tensor.type_name for tensor in header.tensors.values()]
    return GGUFSummary(
        architecture=header.architecture,
        name=str(header.metadata.get("general.name", "")),
        license=str(header.metadata.get("general.license", "")),
        num_tensors=len(header.tensors),
        num_parameters=sum(tensor.num_elements for tensor in header.tensors.values()),
        num_tensors_by_type={kind: types.count(kind) for kind in dict.fromkeys(types)},
        size_bytes=header.size_bytes,
    )


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
        model, tokenizer = load_gguf(path)
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


def load_gguf(
    path: Path, dtype: Dtype = "bfloat16"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model in evaluation mode, and its tokenizer, out of a GGUF file by transformers.

    Args:
        path: the file, checked before (``check_gguf``).
        dtype: of the weights in memory.
    """
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
    return model.to(getattr(torch, dtype)).eval(), tokenizer


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
