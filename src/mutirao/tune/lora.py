"""LoRA through PEFT: attach to a frozen model, exchange as plain tensors, merge.

ΔW = (alpha / rank) · B A beside each chosen linear layer (Hu et al. 2021,
arXiv:2106.09685). With ``freeze_a`` only B is trained (FFA-LoRA, Sun et al. 2024,
arXiv:2403.12313): the mean of the sites' updates is then exact, since mean(Bᵢ) A is the
mean of Bᵢ A, and half as many bytes travel. ``qlora`` puts the frozen base into 4
bits; the aggregation of adapters of different ranks belongs to ``federated``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mutirao.artifact import Manifest, open_artifact, read_manifest, write_artifact
from mutirao.errors import FormatError, ShapeError
from mutirao.formats.huggingface import load_causal_lm, save_causal_lm
from mutirao.tune.config import LoRAConfig


def attach_lora(model: nn.Module, config: LoRAConfig, *, seed: int) -> Any:
    """Freeze ``model`` and put trainable low-rank updates beside its layers.

    Args:
        model: a Hugging Face causal model; changed in place.
        config: which layers, which rank.
        seed: of the initial A; every site must use the same one, since with ``freeze_a``
            A is never exchanged.

    Returns:
        The PEFT model; its trainable parameters are float32.

    Raises:
        FormatError: the model has none of the layers named.
    """
    from peft import LoraConfig, get_peft_model

    num_all = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    num_layers = min(config.num_layers or num_all, num_all)  # 0 means all
    torch.manual_seed(seed)
    try:
        peft_model = get_peft_model(
            model,
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=list(config.target_modules),
                layers_to_transform=list(range(num_all - num_layers, num_all)),
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        names = ", ".join(config.target_modules)
        raise FormatError(
            f"lora.target_modules={names} cannot be adapted in this model: {error}"
        ) from None
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad = not (config.freeze_a and "lora_A" in name)
    return peft_model


def adapter_state(peft_model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the trained part of the adapter: float32 tensors by name, sorted."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in sorted(peft_model.named_parameters())
        if parameter.requires_grad
    }


def load_adapter_state(peft_model: nn.Module, state: dict[str, Tensor]) -> None:
    """Set the trained part of the adapter, the inverse of ``adapter_state``.

    Raises:
        ShapeError: names or shapes differ from the model's; the model is unchanged.
    """
    own = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ShapeError(f"the adapter has other tensors than the model, for example {odd[0]}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ShapeError(
                f"adapter tensor {name} has shape {tuple(tensor.shape)} "
                f"(expected {tuple(own[name].shape)})"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def state_to_vector(state: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """Return all tensors as one float32 vector, in the order of their names."""
    parts = [state[name].detach().to(torch.float32).reshape(-1) for name in sorted(state)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def vector_to_state(vector: NDArray[np.float32], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vector's tensors by name; the inverse of ``state_to_vector``.

    Args:
        vector: (N,) all values.
        like: tensors whose names and shapes are taken.

    Raises:
        ShapeError: the vector has another length.
    """
    names = sorted(like)
    sizes = [like[name].numel() for name in names]
    if vector.size != sum(sizes):
        raise ShapeError(f"a state has {vector.size} values (expected {sum(sizes)})")
    pieces = torch.split(torch.from_numpy(np.array(vector, np.float32)), sizes)
    return {
        name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)
    }


def frozen_sha256(peft_model: nn.Module) -> str:
    """Return a hash of the adapter's frozen part, which all sites must share unseen."""
    digest = hashlib.sha256()
    for name, parameter in sorted(peft_model.named_parameters()):
        if "lora_" in name and not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(peft_model: Any, folder: Path, *, base_model: str) -> None:
    """Write a PEFT directory: configuration, weights and a model card.

    Args:
        peft_model: the model with its adapter.
        folder: existing folder to write into.
        base_model: what the adapter belongs to, for its configuration and card.
    """
    peft_model.peft_config["default"].base_model_name_or_path = base_model
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(
        f"---\nbase_model: {base_model}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        "tags: [lora, federated]\n---\n\n# Adapter\n\n"
        "A LoRA adapter trained with Mutirão; `manifest.json` beside this file says on what, "
        "with which settings, and from which base. Load it with "
        "`peft.PeftModel.from_pretrained(base, folder)`.\n",
        encoding="utf-8",
    )


def load_merged(base: Path, adapter: Path) -> tuple[Any, Any]:
    """Return the base model with an adapter folded into its weights, and its tokenizer.

    Args:
        base: a Hugging Face directory.
        adapter: a PEFT directory that belongs to it.

    Returns:
        The model, in bfloat16, and the tokenizer.
    """
    from peft import PeftModel

    # Summed in float32: in bfloat16 a small update would vanish against a large weight.
    model, tokenizer = load_causal_lm(base, dtype="float32")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.to(torch.bfloat16).eval(), tokenizer


def merge_adapter(base: Path, adapter: Path, out: Path) -> Manifest:
    """Fold an adapter into its base model and write the result as a model artifact.

    Args:
        base: artifact of kind 'model'.
        adapter: artifact of kind 'adapter', made from ``base``.
        out: folder of the new artifact of kind 'model', in bfloat16.

    Raises:
        ArtifactError: one of them is incomplete or was altered.
    """
    base_manifest = open_artifact(base, "model")
    open_artifact(adapter, "adapter")
    merged, tokenizer = load_merged(base, adapter)
    with write_artifact(out, "model", recipe=dict(base_manifest.recipe)) as writer:
        writer.add_parent("base", base)
        writer.add_parent("adapter", adapter)
        save_causal_lm(merged, tokenizer, writer.path)
    return read_manifest(out)
