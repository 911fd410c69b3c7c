"""llama.cpp: its block formats (k- and i-quants), with an importance matrix, by llama-quantize.

Options: ``quantize`` (the program), ``types`` (which formats, each left in a folder of its own
inside ``out``), ``mixtures`` (the names of those to be mixed as llama.cpp mixes them; all others
are pure: every linear layer in the one type), ``fold`` (see below), ``imatrix`` (False: without),
``cache`` (where the importance matrix is kept for the next run).

The importance matrix is what llama-imatrix would collect, the mean square of each input of each
linear layer, but collected here by hooks on the same token windows that the other peers get:
llama-imatrix takes text only, and would cut it otherwise. Embeddings and head stay in bfloat16
(float32 where the model is), as with the others. Rows that no whole number of a format's blocks
fills are given another type by llama.cpp itself (for 576 columns: IQ4_NL, Q4_0 or Q5_0); the
figures tell how many weights have which type. Weights are computed back by llama-quantize too,
into float32.

With ``fold``, such rows are laid end to end until blocks fill them (4 rows of 576 columns make
9 blocks of 256), so that the quantizer itself can be measured at the bits its format has. Only
a block's outer scale is then shared by two rows, never its inner ones where 32 divides a row.
That is no model llama.cpp can run; the figures say so.

Runs in an environment of its own; see peers.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import subprocess
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from peer_result import Clock, Linear, Task, finish, read_tensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
"""By model_type; only llama's queries and keys are in another order in GGUF."""
BATCH_WINDOWS = 4
"""At a time through the model for the importance matrix."""
LARGEST_BLOCK = 256
"""Of all of llama.cpp's types."""
SECONDS = "seconds"
"""How long the kept mean squares took, kept beside them."""
FOLDED_NOTE = "rows laid end to end to fill blocks of 256: llama.cpp cannot run this model"


@dataclass(frozen=True)
class Names:
    """How the model's tensors are called in GGUF, and which of their rows are in another order."""

    architecture: Any
    num_blocks: int
    num_heads: dict[str, int]
    """Of queries and keys, by a part of the name; empty where the order is the same."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Names:
        """Read a model's configuration."""
        kind = config["model_type"]
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type={kind} is not supported (expected llama or qwen2)")
        heads = config["num_attention_heads"]
        reordered = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
        return cls(
            ARCHITECTURES[kind],
            config["num_hidden_layers"],
            reordered if kind == "llama" else {},
        )

    def in_gguf(self, names: list[str]) -> dict[str, str]:
        """Return the names in GGUF, by those in the model."""
        table = gguf.get_tensor_name_map(self.architecture, self.num_blocks)
        found = {name: table.get_name(name, (".weight", ".bias")) for name in names}
        if missing := [name for name, there in found.items() if there is None]:
            raise ValueError(f"GGUF has no name for {missing[0]}")
        return found

    def reorder(self, name: str, tensor: Tensor, *, back: bool = False) -> Tensor:
        """Put the rows of a query or key from two halves into pairs, or back."""
        for part, num_heads in self.num_heads.items():
            if part in name:
                sizes = (num_heads, -1, 2) if back else (num_heads, 2, -1)
                split = tensor.reshape(*sizes, *tensor.shape[1:])
                return split.transpose(1, 2).reshape(tensor.shape)
        return tensor


def main() -> None:
    task = Task.read()
    clock = Clock()
    config = json.loads((task.model / "config.json").read_text(encoding="utf-8"))
    names = Names.of(config)
    plain = task.scratch / "plain.gguf"
    with clock.step("load"):
        tensors = read_tensors(task.model)
        places = names.in_gguf(list(tensors))
        folds = _folds(tensors) if task.options.get("fold") else {}
        _write_gguf(plain, config, names, tensors, folds)
    importance = None
    if task.options.get("imatrix", True):
        importance = task.scratch / "imatrix.gguf"
        squares = _mean_squares_once(task, clock)
        folded = {places[n]: np.tile(each, folds.get(n, 1)) for n, each in squares.items()}
        _write_imatrix(importance, folded, task.windows())
    for type_name in task.options["types"]:
        own = Clock()
        own.seconds |= clock.seconds
        options = task.options | {"type": type_name}
        one = replace(task, out=task.out / type_name, options=options)
        _quantize(one, type_name, plain, importance, names, tensors, own)


def _quantize(
    task: Task,
    type_name: str,
    plain: Path,
    importance: Path | None,
    names: Names,
    tensors: dict[str, Tensor],
    clock: Clock,
) -> None:
    """Quantize to one type and write what became of it."""
    quantized = task.scratch / f"{type_name}.gguf"
    restored = task.scratch / f"{type_name}-restored.gguf"
    embeddings = "bf16" if _is_half(tensors) else "f32"
    flags = ["--token-embedding-type", embeddings, "--output-tensor-type", embeddings]
    if type_name not in task.options.get("mixtures", ()):
        # The type's own name as a mixture may stand for another one: pure IQ2_S is IQ2_XS.
        flags += ["--pure", "--tensor-type", f"blk={type_name.lower()}"]
    if importance is not None:
        flags += ["--imatrix", str(importance)]
    with clock.step("quantize"):
        log = _run(task, [*flags, str(plain), str(quantized), type_name])
    with clock.step("restore"):
        _run(task, ["--allow-requantize", str(quantized), str(restored), "F32"])
    places = names.in_gguf(list(tensors))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(quantized).tensors}
    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(restored).tensors}
    linears = {}
    notes = [line.strip() for line in log.splitlines() if "required fallback" in line]
    if task.options.get("fold"):
        notes.append(FOLDED_NOTE)
    for name, place in places.items():
        if not _is_linear(name, tensors[name]):
            continue
        values = torch.from_numpy(np.array(weights[place].data)).reshape(tensors[name].shape)
        num_bytes = int(stored[place].n_bytes)
        linears[name] = Linear(
            weight=names.reorder(name, values, back=True),
            kind=stored[place].tensor_type.name,
            num_bits=8 * num_bytes,
            stored_bytes=num_bytes,
        )
    finish(
        task,
        linears,
        {name: tensor for name, tensor in tensors.items() if name not in linears},
        clock,
        versions={
            "llama.cpp": str(task.options.get("version", "")),
            "transformers": importlib.metadata.version("transformers"),
        },
        file_bytes=quantized.stat().st_size,
        notes=notes,
    )
    quantized.unlink()
    restored.unlink()


def _run(task: Task, arguments: list[str]) -> str:
    command = [str(task.options["quantize"]), *arguments, str(task.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama-quantize failed: {(done.stderr + done.stdout)[-1500:]}")
    return done.stderr + done.stdout


def _is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and "embed_tokens" not in name and not name.startswith("lm_head")


def _folds(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return how many rows of each linear layer are laid end to end to fill whole blocks."""
    folds = {}
    for name, tensor in tensors.items():
        if _is_linear(name, tensor):
            num_rows = LARGEST_BLOCK // math.gcd(tensor.shape[1], LARGEST_BLOCK)
            folds[name] = num_rows if tensor.shape[0] % num_rows == 0 else 1
    return folds


def _is_half(tensors: dict[str, Tensor]) -> bool:
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


def _write_gguf(
    path: Path,
    config: dict[str, Any],
    names: Names,
    tensors: dict[str, Tensor],
    folds: dict[str, int],
) -> None:
    """Write the model without its tokenizer, which the quantizer does not look at.

    The script that comes with llama.cpp wants a tokenizer that it knows by its hash; a
    model with one of its own could not be measured.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[names.architecture])
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, place in names.in_gguf(list(tensors)).items():
        tensor = names.reorder(name, tensors[name])
        if name in folds:
            tensor = tensor.reshape(-1, tensor.shape[1] * folds[name])
        if tensor.ndim > 1 and tensor.dtype == torch.bfloat16:
            bits = tensor.contiguous().view(torch.int16).numpy()
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(place, bits.view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(place, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _mean_squares_once(task: Task, clock: Clock) -> dict[str, NDArray[np.float32]]:
    """Return the mean squares, from the cache where it has them; their seconds count again."""
    windows = task.windows()
    weights = [path.stat() for path in sorted(task.model.glob("*.safetensors"))]
    stamp = json.dumps([str(task.model), windows.shape, [[w.st_size, w.st_mtime] for w in weights]])
    digest = hashlib.sha256(stamp.encode() + windows.tobytes()).hexdigest()
    folder = Path(task.options.get("cache") or task.scratch)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"imatrix-{digest[:16]}.npz"
    if not path.is_file():
        with clock.step("imatrix"):
            squares = _mean_squares(task.model, windows)
        part = folder / f"part-{path.name}"
        np.savez(part, **squares, **{SECONDS: clock.seconds["imatrix"]})
        part.rename(path)
    with np.load(path, allow_pickle=False) as kept:
        squares = {name: kept[name] for name in kept.files}
    clock.seconds["imatrix"] = float(squares.pop(SECONDS))
    return squares


@torch.inference_mode()
def _mean_squares(path: Path, windows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Return, by the name of each linear layer's weight, the mean square of its inputs."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, local_files_only=True
    ).eval()
    sums: dict[str, Any] = defaultdict(float)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_linear(f"{name}.weight", module.weight):
            module.register_forward_pre_hook(
                lambda _module, inputs, name=f"{name}.weight": sums.__setitem__(
                    name, sums[name] + inputs[0].double().square().flatten(0, -2).sum(0)
                )
            )
    for batch in torch.from_numpy(windows).split(BATCH_WINDOWS):
        model.model(batch, use_cache=False)
    return {name: (each / windows.size).float().numpy() for name, each in sums.items()}


def _write_imatrix(
    path: Path, squares: dict[str, NDArray[np.float32]], windows: NDArray[np.int64]
) -> None:
    """Write it as llama-imatrix does: sums and counts of each tensor."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["token windows"])
    writer.add_uint32("imatrix.chunk_count", windows.shape[0])
    writer.add_uint32("imatrix.chunk_size", windows.shape[1])
    count = float(windows.size)
    for name, each in squares.items():
        writer.add_tensor(f"{name}.in_sum2", (each * count).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
