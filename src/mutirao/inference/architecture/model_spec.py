"""A language model's forward pass as data: every number and choice that defines it.

``ModelSpec`` is what an architecture comes down to once its differences are written as values;
``program.py`` turns one into operations, ``architectures.py`` reads one from a model's own
description. The names of matrices and vectors are those of the weight store. Left out: mixtures
of experts, ALiBi, encoder layers and attention soft-capping.

Numbers of tokens, heads and columns are counts; eps, scales and factors are dimensionless.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mutirao.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("before", "after", "both")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "table")
MAX_LAYERS = 10_000  # assumption; no published model has more than a few hundred
MAX_SIZE = 2**31 - 1  # a width, a vocabulary, a context: what an int32 holds

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: how many of a head's values turn, the first ones; even.
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
        scaling: one of ROPE_SCALINGS; ``table`` divides by factors that the file holds.
        factor: by how much the context was stretched.
        original_context: tokens, before it was stretched (llama3, yarn).
        low_freq_factor: of llama3.
        high_freq_factor: of llama3.
        beta_fast: rotations above which yarn leaves a frequency alone.
        beta_slow: rotations below which yarn interpolates wholly.
        truncate: yarn rounds the bounds between them outwards to whole dimensions.
        magnitude: multiplies what was turned, in query and key alike (yarn).
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choice("rope scaling", self.scaling, ROPE_SCALINGS)
        _require(self.rotary_dim > 0 and self.rotary_dim % 2 == 0, "rotary_dim", self.rotary_dim)
        for name in ("theta", "factor", "magnitude", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"rope {name}", value)
        if self.scaling == "yarn":
            _require(self.theta > 1, "rope theta", self.theta)
        if self.scaling in ("llama3", "yarn"):
            _require(self.original_context > 0, "original_context", self.original_context)
        if self.scaling == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            _require(0 < low < high < math.inf, "rope low and high_freq_factor", (low, high))


@dataclass(frozen=True)
class ModelSpec:
    """Everything that defines a decoder's forward pass, apart from its weights.

    Attributes:
        architecture: family name; says how its files name tensors, never how to compute.
        num_layers: transformer blocks.
        d_model: width of the residual stream.
        embedding_dim: width of the token embedding; where it is not d_model, the matrices
            ``project_in`` and ``project_out`` lie between (opt-350m).
        ffn_dim: width of the MLP.
        vocab_size: rows of the embedding, columns of the logits.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width of a head.
        context_length: tokens the model was made for.
        norm: ``rms`` or ``layer``.
        norm_eps: added to the mean square or variance.
        norm_placement: ``before`` each branch; ``after`` its addition to the stream; or on
            ``both`` ends of the branch, before the addition (Gemma).
        final_norm: a norm precedes the head.
        qk_norm: each head's query and key are RMS-normalised before RoPE.
        gated_ffn: down(f(gate x) * up x); otherwise down(f(up x)).
        activation: one of ACTIVATIONS.
        biases: which of MATRICES have one, in every layer.
        tied_head: ``token_embd`` is the head too.
        embedding_scale: multiplies the token embedding.
        attention_scale: multiplies the scores.
        rope: None where positions are learned.
        rope_local: for the windowed layers, where theirs differs (Gemma 3).
        position_offset: learned positions: row of ``position_embd`` = position + offset.
        window: keys that a windowed layer's token sees, itself counted.
        windowed_layers: their indices, ascending.
        eos_token_ids: tokens that end a text, where the description names them.
    """

    architecture: str
    num_layers: int
    d_model: int
    embedding_dim: int
    ffn_dim: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm: str
    norm_eps: float
    attention_scale: float
    activation: str
    tied_head: bool
    rope: RopeSpec | None
    norm_placement: str = "before"
    final_norm: bool = True
    qk_norm: bool = False
    gated_ffn: bool = True
    biases: tuple[str, ...] = ()
    embedding_scale: float = 1.0
    rope_local: RopeSpec | None = None
    position_offset: int | None = None
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        self._check_sizes()
        _check_choice("norm", self.norm, NORMS)
        _check_choice("norm placement", self.norm_placement, NORM_PLACEMENTS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        for name in self.biases:
            _check_choice("bias", name, MATRICES)
        for name in ("norm_eps", "attention_scale", "embedding_scale"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value)
        for rope in (self.rope, self.rope_local):
            if rope is not None:
                _require(rope.rotary_dim <= self.head_dim, "rotary_dim", rope.rotary_dim)
        _require(self.rope_local is None or self.rope is not None, "rope", None)
        has_window = self.window is not None and self.window > 0
        _require(has_window or not self.windowed_layers, "window", self.window)
        layers = self.windowed_layers
        _require(list(layers) == sorted(set(layers)), "windowed_layers", layers)
        if layers:
            _require(layers[0] >= 0 and layers[-1] < self.num_layers, "windowed_layers", layers)
        if self.position_offset is not None:
            _require(0 <= self.position_offset <= MAX_SIZE, "offset", self.position_offset)

    def _check_sizes(self) -> None:
        _require(0 < self.num_layers <= MAX_LAYERS, "num_layers", self.num_layers)
        for name in (
            *("d_model", "embedding_dim", "ffn_dim", "vocab_size", "num_heads"),
            *("num_kv_heads", "head_dim", "context_length"),
        ):
            _require(0 < getattr(self, name) <= MAX_SIZE, name, getattr(self, name))
        is_grouped = self.num_heads % self.num_kv_heads == 0
        _require(is_grouped, "num_kv_heads", f"{self.num_kv_heads} of {self.num_heads} heads")

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain values that ``json`` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Read what ``to_json`` gave.

        Raises:
            FormatError: a field is missing, unknown, or of a wrong type or value.
        """
        fields = _known_fields(cls, values)
        for name in ("rope", "rope_local"):
            if fields.get(name) is not None:
                fields[name] = RopeSpec(**_known_fields(RopeSpec, fields[name]))
        return cls(**fields)


def matrix_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return each matrix's (rows = outputs, columns = inputs), by store name, in file order."""
    shapes = {"token_embd": (spec.vocab_size, spec.embedding_dim)}
    if spec.position_offset is not None:
        shapes["position_embd"] = (spec.context_length + spec.position_offset, spec.d_model)
    if spec.embedding_dim != spec.d_model:
        shapes["project_in"] = (spec.d_model, spec.embedding_dim)
        shapes["project_out"] = (spec.embedding_dim, spec.d_model)
    query_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = {
        "attn_q": (query_dim, spec.d_model),
        "attn_k": (kv_dim, spec.d_model),
        "attn_v": (kv_dim, spec.d_model),
        "attn_output": (spec.d_model, query_dim),
        "ffn_gate": (spec.ffn_dim, spec.d_model),
        "ffn_up": (spec.ffn_dim, spec.d_model),
        "ffn_down": (spec.d_model, spec.ffn_dim),
    }
    if not spec.gated_ffn:
        del layer["ffn_gate"]
    for index in range(spec.num_layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    if not spec.tied_head:
        shapes["output"] = (spec.vocab_size, spec.embedding_dim)
    return shapes


def vector_shapes(spec: ModelSpec) -> dict[str, tuple[int]]:
    """Return each float32 vector's shape, by store name, the RoPE frequencies included."""
    parts = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    names = ["attn_norm", "ffn_norm"]
    if spec.norm_placement == "both":
        names += ["post_attention_norm", "post_ffw_norm"]
    layer = {f"{name}.{part}": spec.d_model for name in names for part in parts}
    if spec.qk_norm:
        layer |= {"attn_q_norm.weight": spec.head_dim, "attn_k_norm.weight": spec.head_dim}
    matrices = matrix_shapes(spec)
    for name in spec.biases:
        if f"blk.0.{name}" in matrices:
            layer[f"{name}.bias"] = matrices[f"blk.0.{name}"][0]
    shapes = {
        f"blk.{index}.{name}": (size,)
        for index in range(spec.num_layers)
        for name, size in layer.items()
    }
    if spec.final_norm:
        shapes |= {f"output_norm.{part}": (spec.d_model,) for part in parts}
    if spec.rope is not None:
        shapes["rope_freqs"] = (spec.rope.rotary_dim // 2,)
    if spec.rope_local is not None:
        shapes["rope_freqs_local"] = (spec.rope_local.rotary_dim // 2,)
    return shapes


def rope_vectors(
    spec: ModelSpec, table: NDArray[np.float32] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Return ``rope_freqs`` and, where the spec has one, ``rope_freqs_local``.

    Args:
        spec: the model; one with learned positions has neither.
        table: (rotary_dim / 2,) divisors of the frequencies, the ``rope_freqs.weight`` of a
            GGUF file; needed where ``spec.rope.scaling`` is ``table``, of no use elsewhere.

    Returns:
        (rotary_dim / 2,) float32, radians per token.

    Raises:
        FormatError: the table is missing, or of another shape, or not finite and positive.
    """
    vectors = {}
    if spec.rope is not None:
        vectors["rope_freqs"] = _frequencies(spec.rope, table)
    if spec.rope_local is not None:
        vectors["rope_freqs_local"] = _frequencies(spec.rope_local, None)
    return vectors


def _frequencies(rope: RopeSpec, table: NDArray[np.float32] | None) -> NDArray[np.float32]:
    import numpy as np

    half = rope.rotary_dim // 2
    frequencies = rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    if rope.scaling == "linear":
        frequencies /= rope.factor
    elif rope.scaling == "llama3":
        frequencies *= _llama3_ratios(rope, frequencies)
    elif rope.scaling == "yarn":
        frequencies *= _yarn_ratios(rope)
    elif rope.scaling == "table":
        if table is None or table.shape != (half,):
            came = "none" if table is None else f"shape {table.shape}"
            raise FormatError(
                f"the table of RoPE factors has {came} (expected {half} numbers in "
                "rope_freqs.weight); download or convert the model again"
            )
        divisors = table.astype(np.float64)
        if not (np.isfinite(divisors).all() and (divisors > 0).all()):
            raise FormatError("the table of RoPE factors holds a number that is not positive")
        frequencies /= divisors
    return frequencies.astype(np.float32)


def _llama3_ratios(rope: RopeSpec, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by what Llama 3.1 multiplies each frequency (arXiv:2407.21783, its released code)."""
    import numpy as np

    turns = rope.original_context * frequencies / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(kept + (1 - kept) / rope.factor)


def _yarn_ratios(rope: RopeSpec) -> NDArray[np.float64]:
    """Return by what YaRN multiplies each frequency (arXiv:2309.00071, section 3.2)."""
    import numpy as np

    def dimension(num_turns: float) -> float:
        turns = rope.original_context / (num_turns * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001
    index = np.arange(rope.rotary_dim // 2, dtype=np.float64)
    interpolated = np.clip((index - low) / width, 0.0, 1.0)
    return np.asarray(interpolated / rope.factor + (1 - interpolated))


def _known_fields(cls: type[Any], values: object) -> dict[str, Any]:
    """Return values as arguments of a dataclass: all fields there, none unknown, no lists."""
    expected = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) != expected:
        came = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise FormatError(f"{cls.__name__} has {came} (expected {', '.join(sorted(expected))})")
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _check_types(spec: Any) -> None:
    """Check a dataclass's values against its annotations: a spec may come from an altered file."""
    for name, hint in typing.get_type_hints(type(spec)).items():
        value = getattr(spec, name)
        if not _has_type(value, hint):
            raise FormatError(f"{name}={value!r} is not supported (expected {hint})")


def _has_type(value: object, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_has_type(entry, item) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FormatError(
            f"{what} {value!r} is not supported (expected one of {', '.join(choices)})"
        )


def _require(condition: bool, name: str, value: object) -> None:
    if not condition:
        raise FormatError(
            f"{name}={value!r} does not define a model that can be run; download it again, or "
            "look whether its description is meant for another program"
        )
