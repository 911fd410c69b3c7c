"""The oracle: a Program interpreted in plain PyTorch.

The native kernel is tested against it and against its operations, and it runs in the kernel's
place where no compiler is. Each matrix is dequantized to float32 when first used and then kept,
four bytes per weight.

It rounds where the kernel rounds. Before a quantized matrix, activations are int8 codes with one
scale per block of 32 columns; before a float matrix they stay float32 (split floats are floats
when whole, codes in a draft); keys and values are
kept in float16. Sums are float32 in whatever order PyTorch takes, so agreement with the kernel is
to a tolerance. With ``exact_activations`` none of this rounding is done, which leaves the
mathematics of the model with its weights as they are.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mutirao.errors import InputError
from mutirao.inference.architecture import program as ops
from mutirao.inference.reference_operations import (
    activation,
    attention,
    layer_norm,
    matmul,
    quantize_activations,
    rms_norm,
    rope,
)
from mutirao.inference.store import planes

if TYPE_CHECKING:
    from mutirao.inference.store.weight_store import WeightStore

Logits = Literal["last", "all", "none"]
Mode = Literal["full", "draft"]

__all__ = [
    "Logits",
    "Mode",
    "Pass",
    "ReferenceBackend",
    "activation",
    "attention",
    "layer_norm",
    "matmul",
    "quantize_activations",
    "rms_norm",
    "rope",
]


@dataclass
class Pass:
    """One run of a program: its tokens and its buffers.

    Attributes:
        tokens: (T,) token ids.
        position: of the first token.
        logits: of which tokens they are wanted.
        mode: with all planes of the weights, or those of the draft.
        buffers: (T, width) float32 by name; after SelectRows, only the rows selected.
    """

    tokens: Tensor
    position: int
    logits: Logits
    mode: Mode
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """(T,) positions of the tokens."""
        return torch.arange(self.position, self.position + len(self.tokens))


class ReferenceBackend:
    """A model of a weight store, run by PyTorch on the CPU, with a KV cache of one sequence."""

    kernels = "none"
    """No native kernels; the other members that the engine asks for are as empty."""
    bytes_read = 0
    wait_s = 0.0

    def __init__(
        self,
        store: WeightStore,
        *,
        draft_planes: Mapping[str, int] | None = None,
        exact_activations: bool = False,
    ) -> None:
        """Prepare to run; weights are read when first used.

        Args:
            store: the model.
            draft_planes: how many planes, from the top, each matrix keeps in a draft; a matrix
                that is not named keeps all.
            exact_activations: leave activations and the KV cache in float32.

        Raises:
            InputError: ``draft_planes`` names an unknown matrix or planes that it does not have.
        """
        self.spec = store.spec
        self.program = ops.compile_program(store.spec)
        self.exact_activations = exact_activations
        self.num_cached = 0
        self._store = store
        self._vectors = {name: torch.from_numpy(v.copy()) for name, v in store.vectors.items()}
        self._matrices: dict[tuple[str, int], Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._draft_planes = dict(draft_planes or {})
        for name, num_planes in self._draft_planes.items():
            most = len(store.tensors[name].planes) if name in store.tensors else 0
            if not 1 <= num_planes <= most:
                raise InputError(
                    f"draft_planes[{name!r}]={num_planes} is not supported (expected 1 to {most} "
                    "planes of a matrix of the store)"
                )

    def close(self) -> None:
        """Give the weights back."""
        self._matrices.clear()

    def op_seconds(self) -> dict[str, float]:
        """Return nothing: operations are not timed here."""
        return {}

    @torch.inference_mode()
    def run(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        logits: Logits = "last",
        mode: Mode = "full",
    ) -> NDArray[np.float32]:
        """Run tokens through the model; their keys and values replace what lay there or after.

        Args:
            tokens: ids, none or more.
            position: of the first one, at most as many as there are tokens in the cache.
            logits: of the ``last`` token, of ``all``, or ``none`` (the head is left out).
            mode: ``full`` weights, or those of the ``draft``.

        Returns:
            (1, T or 0; vocab_size) float32: a row per token asked for, in their order.

        Raises:
            InputError: a token or position that the model or the cache does not have.
        """
        width = self.program.buffers[self.program.logits]
        state = self.begin(tokens, position, logits=logits, mode=mode)
        if not tokens:
            return np.empty((0, width), np.float32)
        for op in self.program.ops:
            if logits == "none" and isinstance(op, ops.SelectRows):
                break
            self.execute(op, state)
        self.num_cached = position + len(tokens)
        if logits == "none":
            return np.empty((0, width), np.float32)
        result: NDArray[np.float32] = state.buffers[self.program.logits].numpy()
        return result

    def begin(
        self, tokens: Sequence[int], position: int, *, logits: Logits = "last", mode: Mode = "full"
    ) -> Pass:
        """Return a pass whose operations can be executed one by one; arguments as for ``run``.

        Raises:
            InputError: as ``run``.
        """
        self._check(tokens, position, logits, mode)
        return Pass(torch.tensor(list(tokens), dtype=torch.long), position, logits, mode)

    def execute(self, op: ops.Op, state: Pass) -> None:
        """Execute one operation on a pass's buffers and on the KV cache."""
        _EXECUTE[type(op)](self, op, state)

    def matrix(self, name: str, mode: Mode = "full") -> Tensor:
        """Return a matrix, (rows, columns) float32, as it reads with the planes of a mode.

        Raises:
            ArtifactError: it was altered in the store, or cannot be read.
        """
        stored, num_planes = self._store.tensors[name], self._num_planes(name, mode)
        key = (name, num_planes)
        if key not in self._matrices:
            scales, codes = self._store.load(name)
            weight = planes.dequantize(
                scales, codes[:num_planes], stored.format, stored.num_rows, stored.num_columns
            )
            self._matrices[key] = torch.from_numpy(weight)
        return self._matrices[key]

    def _num_planes(self, name: str, mode: Mode) -> int:
        most = len(self._store.tensors[name].planes)
        return self._draft_planes.get(name, most) if mode == "draft" else most

    def _reads_codes(self, name: str, mode: Mode) -> bool:
        """Whether a matrix is multiplied as integer codes."""
        form = planes.find_format(self._store.tensors[name].format)
        is_whole = self._num_planes(name, mode) == len(form.plane_widths)
        return not form.is_float and not (form.split_from and is_whole)

    def _check(self, tokens: Sequence[int], position: int, logits: str, mode: str) -> None:
        if logits not in ("last", "all", "none") or mode not in ("full", "draft"):
            raise InputError(
                f"logits={logits!r}, mode={mode!r} is not supported (expected last, all or none; "
                "full or draft)"
            )
        if not 0 <= position <= self.num_cached:
            raise InputError(
                f"position={position} is not supported (expected 0 to {self.num_cached}, the "
                "tokens in the cache)"
            )
        if position + len(tokens) > self.spec.context_length:
            raise InputError(
                f"{position + len(tokens)} tokens do not fit into the model's context of "
                f"{self.spec.context_length}; give a shorter prompt or ask for fewer new tokens"
            )
        if any(not 0 <= token < self.spec.vocab_size for token in tokens):
            raise InputError(
                f"tokens from {min(tokens)} to {max(tokens)} are not the model's (expected 0 to "
                f"{self.spec.vocab_size - 1})"
            )

    def _embed(self, op: ops.Embed, state: Pass) -> None:
        rows = state.positions + op.position_offset if op.by_position else state.tokens
        embedded = self.matrix(op.weight, state.mode)[rows]
        state.buffers[op.out] = embedded + state.buffers[op.out] if op.accumulate else embedded

    def _scale(self, op: ops.Scale, state: Pass) -> None:
        state.buffers[op.buffer] = state.buffers[op.buffer] * op.factor

    def _rms_norm(self, op: ops.RMSNorm, state: Pass) -> None:
        weight = self._vectors[op.weight]
        state.buffers[op.out] = rms_norm(state.buffers[op.input], weight, op.eps, op.num_groups)

    def _layer_norm(self, op: ops.LayerNorm, state: Pass) -> None:
        weight, bias = self._vectors[op.weight], self._vectors[op.bias]
        state.buffers[op.out] = layer_norm(state.buffers[op.input], weight, bias, op.eps)

    def _matmul(self, op: ops.MatMul, state: Pass) -> None:
        weight = self.matrix(op.weight, state.mode)
        is_quantized = self._reads_codes(op.weight, state.mode)
        product = matmul(
            state.buffers[op.input],
            weight,
            None if op.bias is None else self._vectors[op.bias],
            quantize=is_quantized and not self.exact_activations,
        )
        state.buffers[op.out] = product + state.buffers[op.out] if op.accumulate else product

    def _rope(self, op: ops.Rope, state: Pass) -> None:
        state.buffers[op.buffer] = rope(
            state.buffers[op.buffer],
            state.positions,
            self._vectors[op.frequencies],
            num_heads=op.num_heads,
            interleaved=op.interleaved,
            factor=op.factor,
        )

    def _attention(self, op: ops.Attention, state: Pass) -> None:
        kind = torch.float32 if self.exact_activations else torch.float16
        for cache, buffer in ((self._keys, op.key), (self._values, op.value)):
            new = state.buffers[buffer].to(kind)
            kept = cache[op.layer][: state.position] if state.position else new[:0]
            cache[op.layer] = torch.cat((kept, new))
        state.buffers[op.out] = attention(
            state.buffers[op.query],
            self._keys[op.layer],
            self._values[op.layer],
            num_heads=op.num_heads,
            num_kv_heads=op.num_kv_heads,
            scale=op.scale,
            window=op.window,
        )

    def _activation(self, op: ops.Activation, state: Pass) -> None:
        factor = None if op.multiply_by is None else state.buffers[op.multiply_by]
        state.buffers[op.out] = activation(state.buffers[op.input], op.function, factor)

    def _add(self, op: ops.Add, state: Pass) -> None:
        state.buffers[op.out] = state.buffers[op.out] + state.buffers[op.input]

    def _select_rows(self, op: ops.SelectRows, state: Pass) -> None:
        rows = state.buffers[op.input]
        state.buffers[op.out] = rows[-1:] if state.logits == "last" else rows


_EXECUTE: dict[type, Callable[[ReferenceBackend, Any, Pass], None]] = {
    ops.Embed: ReferenceBackend._embed,
    ops.Scale: ReferenceBackend._scale,
    ops.RMSNorm: ReferenceBackend._rms_norm,
    ops.LayerNorm: ReferenceBackend._layer_norm,
    ops.MatMul: ReferenceBackend._matmul,
    ops.Rope: ReferenceBackend._rope,
    ops.Attention: ReferenceBackend._attention,
    ops.Activation: ReferenceBackend._activation,
    ops.Add: ReferenceBackend._add,
    ops.SelectRows: ReferenceBackend._select_rows,
}
