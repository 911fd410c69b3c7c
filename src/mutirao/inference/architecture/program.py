"""Turn a model's specification into a Program: a flat list of operations on named buffers.

Two interpreters run it, the native kernel and ``reference.py``, so a model is described once.
Buffers hold float32 in shape (num_tokens, width); weights, biases and frequencies are named as in
the weight store. ``ops[layer_starts[i]:layer_starts[i + 1]]`` is layer i; what precedes layer 0
embeds the tokens, what follows the last layer is the head. Between them only ``hidden`` carries
anything over, so a part of a program can be run alone.

An operation's input and output may be one buffer wherever each row is computed from the same row
(norms, activations). Differences between architectures are values of ModelSpec, never names.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from mutirao.inference.architecture.model_spec import ModelSpec, RopeSpec


@dataclass(frozen=True)
class Embed:
    """out = (or, accumulating, +=) the weight's row of each token.

    Attributes:
        weight: matrix of (rows, width of out).
        out: buffer.
        by_position: rows by position + position_offset, not by token id.
        position_offset: rows before that of position 0.
        accumulate: add to what out holds.
    """

    weight: str
    out: str
    by_position: bool = False
    position_offset: int = 0
    accumulate: bool = False


@dataclass(frozen=True)
class Scale:
    """buffer *= factor."""

    buffer: str
    factor: float


@dataclass(frozen=True)
class RMSNorm:
    """out = weight * input / sqrt(mean(input ** 2) + eps) (Zhang & Sennrich 2019).

    Each row is num_groups groups of equal width, normalised apart; the weight, as wide as a
    group, is shared by them.
    """

    input: str
    out: str
    weight: str
    eps: float
    num_groups: int = 1


@dataclass(frozen=True)
class LayerNorm:
    """out = weight * (input - mean) / sqrt(variance + eps) + bias (Ba et al. 2016)."""

    input: str
    out: str
    weight: str
    bias: str
    eps: float


@dataclass(frozen=True)
class MatMul:
    """out = (or, accumulating, +=) input @ W.T + bias, W of (width of out, width of input)."""

    weight: str
    input: str
    out: str
    bias: str | None = None
    accumulate: bool = False


@dataclass(frozen=True)
class Rope:
    """Turn each head's first rotary_dim values by position * frequency, in place.

    Pair i is (i, i + rotary_dim / 2), or (2i, 2i + 1) where interleaved: (x, y) becomes
    factor * (x cos a - y sin a, x sin a + y cos a), a = position * frequencies[i] in float32.
    Values beyond rotary_dim stay as they are, factor included.
    """

    buffer: str
    num_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    frequencies: str
    factor: float


@dataclass(frozen=True)
class Attention:
    """Store key and value in layer's cache at the tokens' positions; then causal attention.

    out = softmax(scale * query . keys) . values, for each head; query head h reads key/value head
    h // (num_heads / num_kv_heads). The cache is float16, and what is read is what was stored.
    A token at position p sees keys p - window + 1 to p, or 0 to p where window is None.
    """

    query: str
    key: str
    value: str
    out: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None


@dataclass(frozen=True)
class Activation:
    """out = function(input), times the buffer multiply_by where one is named.

    ``silu``: x / (1 + exp(-x)); ``gelu``: x Phi(x), by the error function; ``gelu_tanh``: its
    approximation by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415); ``relu``: max(x, 0).
    """

    input: str
    out: str
    function: str
    multiply_by: str | None = None


@dataclass(frozen=True)
class Add:
    """out += input."""

    input: str
    out: str


@dataclass(frozen=True)
class SelectRows:
    """out = those rows of input whose logits are wanted; buffers after it have only them."""

    input: str
    out: str


Op = Embed | Scale | RMSNorm | LayerNorm | MatMul | Rope | Attention | Activation | Add | SelectRows


@dataclass(frozen=True)
class Program:
    """A forward pass.

    Attributes:
        buffers: width of each buffer, in float32 values per token.
        ops: in order of execution.
        layer_starts: index of each layer's first op, and of the head's: num_layers + 1 of them.
        logits: the buffer that holds the result, (rows selected, vocab_size).
    """

    buffers: dict[str, int]
    ops: tuple[Op, ...]
    layer_starts: tuple[int, ...]
    logits: str


def compile_program(spec: ModelSpec) -> Program:
    """Write out a model's forward pass, from token ids to logits."""
    ops = list(_embedding(spec))
    layer_starts = []
    for layer in range(spec.num_layers):
        layer_starts.append(len(ops))
        ops += _attention_branch(spec, layer)
        ops += _mlp_branch(spec, layer)
    layer_starts.append(len(ops))
    ops += _head(spec)
    return Program(_buffers(spec), tuple(ops), tuple(layer_starts), "logits")


def _buffers(spec: ModelSpec) -> dict[str, int]:
    kv_dim = spec.num_kv_heads * spec.head_dim
    buffers = {
        "hidden": spec.d_model,
        "query": spec.num_heads * spec.head_dim,
        "key": kv_dim,
        "value": kv_dim,
        "attended": spec.num_heads * spec.head_dim,
        "up": spec.ffn_dim,
        "selected": spec.d_model,
        "logits": spec.vocab_size,
    }
    if spec.norm_placement != "after":
        buffers["normed"] = spec.d_model
    if spec.gated_ffn:
        buffers["gate"] = spec.ffn_dim
    if spec.norm_placement == "both":
        buffers["branch"] = spec.d_model
    if spec.embedding_dim != spec.d_model:
        buffers |= {"embedded": spec.embedding_dim, "projected": spec.embedding_dim}
    return buffers


def _embedding(spec: ModelSpec) -> Iterator[Op]:
    if spec.embedding_dim == spec.d_model:
        yield Embed("token_embd", "hidden")
    else:
        yield Embed("token_embd", "embedded")
        yield MatMul("project_in", "embedded", "hidden")
    if spec.embedding_scale != 1.0:
        yield Scale("hidden", spec.embedding_scale)
    if spec.position_offset is not None:
        yield Embed("position_embd", "hidden", True, spec.position_offset, accumulate=True)


def _attention_branch(spec: ModelSpec, layer: int) -> Iterator[Op]:
    block = f"blk.{layer}"
    source = yield from _enter(spec, f"{block}.attn_norm")
    for name, buffer in (("attn_q", "query"), ("attn_k", "key"), ("attn_v", "value")):
        yield MatMul(f"{block}.{name}", source, buffer, _bias(spec, layer, name))
    heads = {"query": spec.num_heads, "key": spec.num_kv_heads}
    if spec.qk_norm:
        for name, buffer in (("attn_q_norm", "query"), ("attn_k_norm", "key")):
            weight = f"{block}.{name}.weight"
            yield RMSNorm(buffer, buffer, weight, spec.norm_eps, heads[buffer])
    is_windowed = layer in spec.windowed_layers
    rope, frequencies = spec.rope, "rope_freqs"
    if is_windowed and spec.rope_local is not None:
        rope, frequencies = spec.rope_local, "rope_freqs_local"
    if rope is not None:
        for buffer, num_heads in heads.items():
            yield _turn(rope, frequencies, buffer, num_heads, spec.head_dim)
    yield Attention(
        *("query", "key", "value", "attended", layer),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        window=spec.window if is_windowed else None,
    )
    yield from _leave(spec, layer, "attn_output", "attended", ("attn_norm", "post_attention_norm"))


def _turn(rope: RopeSpec, frequencies: str, buffer: str, num_heads: int, head_dim: int) -> Rope:
    return Rope(
        buffer,
        num_heads=num_heads,
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim,
        interleaved=rope.interleaved,
        frequencies=frequencies,
        factor=rope.magnitude,
    )


def _mlp_branch(spec: ModelSpec, layer: int) -> Iterator[Op]:
    block = f"blk.{layer}"
    source = yield from _enter(spec, f"{block}.ffn_norm")
    if spec.gated_ffn:
        yield MatMul(f"{block}.ffn_gate", source, "gate", _bias(spec, layer, "ffn_gate"))
    yield MatMul(f"{block}.ffn_up", source, "up", _bias(spec, layer, "ffn_up"))
    if spec.gated_ffn:
        yield Activation("gate", "up", spec.activation, multiply_by="up")
    else:
        yield Activation("up", "up", spec.activation)
    yield from _leave(spec, layer, "ffn_down", "up", ("ffn_norm", "post_ffw_norm"))


def _enter(spec: ModelSpec, norm: str) -> Generator[Op, None, str]:
    """Begin a branch; returns, as a generator does, the buffer that it reads."""
    if spec.norm_placement == "after":
        return "hidden"
    yield _norm(spec, norm, "hidden", "normed")
    return "normed"


def _leave(
    spec: ModelSpec, layer: int, name: str, source: str, norms: tuple[str, str]
) -> Iterator[Op]:
    """End a branch: its last matrix, and its addition to the stream, with the norms around."""
    weight, bias = f"blk.{layer}.{name}", _bias(spec, layer, name)
    if spec.norm_placement == "both":
        yield MatMul(weight, source, "branch", bias)
        yield _norm(spec, f"blk.{layer}.{norms[1]}", "branch", "branch")
        yield Add("branch", "hidden")
        return
    yield MatMul(weight, source, "hidden", bias, accumulate=True)
    if spec.norm_placement == "after":
        yield _norm(spec, f"blk.{layer}.{norms[0]}", "hidden", "hidden")


def _head(spec: ModelSpec) -> Iterator[Op]:
    yield SelectRows("hidden", "selected")
    if spec.final_norm:
        yield _norm(spec, "output_norm", "selected", "selected")
    source = "selected"
    if spec.embedding_dim != spec.d_model:
        yield MatMul("project_out", "selected", "projected")
        source = "projected"
    yield MatMul("token_embd" if spec.tied_head else "output", source, "logits")


def _norm(spec: ModelSpec, name: str, source: str, out: str) -> Op:
    if spec.norm == "layer":
        return LayerNorm(source, out, f"{name}.weight", f"{name}.bias", spec.norm_eps)
    return RMSNorm(source, out, f"{name}.weight", spec.norm_eps)


def _bias(spec: ModelSpec, layer: int, name: str) -> str | None:
    return f"blk.{layer}.{name}.bias" if name in spec.biases else None
