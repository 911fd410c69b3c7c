"""Programs: that each is whole and fits together, and what they say for each kind of model."""

import dataclasses
import itertools

import pytest

from mutirao.inference.architecture.model_spec import (
    ModelSpec,
    RopeSpec,
    matrix_shapes,
    vector_shapes,
)
from mutirao.inference.architecture.program import (
    Activation,
    Add,
    Attention,
    Embed,
    LayerNorm,
    MatMul,
    RMSNorm,
    Rope,
    Scale,
    SelectRows,
    compile_program,
)

PLAIN = ModelSpec(
    architecture="llama",
    num_layers=3,
    d_model=64,
    embedding_dim=64,
    ffn_dim=96,
    vocab_size=100,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context_length=128,
    norm="rms",
    norm_eps=1e-5,
    attention_scale=0.25,
    activation="silu",
    tied_head=False,
    rope=RopeSpec(theta=10_000.0, rotary_dim=16, magnitude=1.5),
)
SPECS = {
    "plain": PLAIN,
    "biases": dataclasses.replace(
        PLAIN, biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down")
    ),
    "both": dataclasses.replace(
        PLAIN,
        norm_placement="both",
        qk_norm=True,
        tied_head=True,
        embedding_scale=8.0,
        window=5,
        windowed_layers=(0, 2),
        rope_local=RopeSpec(theta=100.0, rotary_dim=32),
    ),
    "learned-positions": dataclasses.replace(
        PLAIN,
        norm="layer",
        rope=None,
        position_offset=2,
        gated_ffn=False,
        activation="relu",
        biases=("attn_q", "ffn_up"),
    ),
    "after": dataclasses.replace(
        PLAIN, norm="layer", norm_placement="after", final_norm=False, embedding_dim=32
    ),
}


def _reads_and_writes(op):
    """Buffers that an operation reads, and those that it writes."""
    match op:
        case Embed():
            return ({op.out} if op.accumulate else set()), {op.out}
        case Scale() | Rope():
            return {op.buffer}, {op.buffer}
        case MatMul():
            return {op.input} | ({op.out} if op.accumulate else set()), {op.out}
        case Attention():
            return {op.query, op.key, op.value}, {op.out}
        case Activation():
            return {op.input} | ({op.multiply_by} - {None}), {op.out}
        case Add():
            return {op.input, op.out}, {op.out}
        case RMSNorm() | LayerNorm() | SelectRows():
            return {op.input}, {op.out}
    raise AssertionError(op)


def _vectors(op):
    """Vectors that an operation uses, with the width that each must have."""
    match op:
        case RMSNorm():
            return {op.weight: (op.input, op.num_groups)}
        case LayerNorm():
            return {op.weight: (op.input, 1), op.bias: (op.input, 1)}
        case MatMul() if op.bias:
            return {op.bias: (op.out, 1)}
    return {}


@pytest.mark.parametrize("name", SPECS)
def test_each_matrix_and_vector_is_used_in_its_own_shape(name):
    spec, program = SPECS[name], compile_program(SPECS[name])
    matrices, vectors, widths = matrix_shapes(spec), vector_shapes(spec), program.buffers
    used = {op.frequencies for op in program.ops if isinstance(op, Rope)}
    for op in program.ops:
        if isinstance(op, MatMul):
            assert matrices[op.weight] == (widths[op.out], widths[op.input])
        if isinstance(op, Embed):
            assert matrices[op.weight][1] == widths[op.out]
        if isinstance(op, MatMul | Embed):
            used.add(op.weight)
        for vector, (buffer, num_groups) in _vectors(op).items():
            assert vectors[vector] == (widths[buffer] // num_groups,)
            used.add(vector)
        if isinstance(op, Rope):
            assert vectors[op.frequencies] == (op.rotary_dim // 2,)
            assert widths[op.buffer] == op.num_heads * op.head_dim
    assert used == set(matrices) | set(vectors)


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_takes_and_gives_nothing_but_hidden(name):
    program = compile_program(SPECS[name])
    starts = program.layer_starts
    assert len(starts) == SPECS[name].num_layers + 1
    assert list(starts) == sorted(set(starts))
    for begin, end in itertools.pairwise((*starts, len(program.ops))):
        known = {"hidden"}
        for op in program.ops[begin:end]:
            reads, writes = _reads_and_writes(op)
            assert reads <= known
            known |= writes
        assert known <= set(program.buffers)
    assert isinstance(program.ops[starts[-1]], SelectRows)
    assert sum(isinstance(op, SelectRows) for op in program.ops) == 1
    attention = [op.layer for op in program.ops if isinstance(op, Attention)]
    assert attention == list(range(SPECS[name].num_layers))
    last = program.ops[-1]
    assert isinstance(last, MatMul)
    assert (last.out, program.buffers[last.out]) == (program.logits, 100)


@pytest.mark.parametrize("name", SPECS)
def test_every_buffer_is_used(name):
    program = compile_program(SPECS[name])
    touched = set()
    for op in program.ops:
        touched |= set.union(*_reads_and_writes(op))
    assert touched == set(program.buffers)


@pytest.mark.parametrize("name", SPECS)
def test_the_architectures_name_changes_nothing(name):
    renamed = dataclasses.replace(SPECS[name], architecture="another")
    assert compile_program(renamed) == compile_program(SPECS[name])


def _layer(spec, index):
    program = compile_program(spec)
    return list(program.ops[program.layer_starts[index] : program.layer_starts[index + 1]])


def test_a_plain_layer():
    turn = {"head_dim": 32, "rotary_dim": 16, "interleaved": False, "frequencies": "rope_freqs"}
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "scale": 0.25}
    assert _layer(PLAIN, 1) == [
        RMSNorm("hidden", "normed", "blk.1.attn_norm.weight", 1e-5),
        MatMul("blk.1.attn_q", "normed", "query"),
        MatMul("blk.1.attn_k", "normed", "key"),
        MatMul("blk.1.attn_v", "normed", "value"),
        Rope("query", 4, **turn, factor=1.5),
        Rope("key", 2, **turn, factor=1.5),
        Attention("query", "key", "value", "attended", 1, **attention),
        MatMul("blk.1.attn_output", "attended", "hidden", accumulate=True),
        RMSNorm("hidden", "normed", "blk.1.ffn_norm.weight", 1e-5),
        MatMul("blk.1.ffn_gate", "normed", "gate"),
        MatMul("blk.1.ffn_up", "normed", "up"),
        Activation("gate", "up", "silu", multiply_by="up"),
        MatMul("blk.1.ffn_down", "up", "hidden", accumulate=True),
    ]


def test_norms_on_both_ends_of_a_branch_and_on_heads():
    ops = _layer(SPECS["both"], 0)
    norms = [op for op in ops if isinstance(op, RMSNorm)]
    assert [(op.input, op.out, op.weight, op.num_groups) for op in norms] == [
        ("hidden", "normed", "blk.0.attn_norm.weight", 1),
        ("query", "query", "blk.0.attn_q_norm.weight", 4),
        ("key", "key", "blk.0.attn_k_norm.weight", 2),
        ("branch", "branch", "blk.0.post_attention_norm.weight", 1),
        ("hidden", "normed", "blk.0.ffn_norm.weight", 1),
        ("branch", "branch", "blk.0.post_ffw_norm.weight", 1),
    ]
    assert [op for op in ops if isinstance(op, Add)] == [Add("branch", "hidden")] * 2
    assert compile_program(SPECS["both"]).ops[1] == Scale("hidden", 8.0)


def test_windowed_layers_have_their_window_and_their_rope():
    for layer, (window, frequencies, rotary_dim) in enumerate(
        [(5, "rope_freqs_local", 32), (None, "rope_freqs", 16), (5, "rope_freqs_local", 32)]
    ):
        ops = _layer(SPECS["both"], layer)
        assert [op.window for op in ops if isinstance(op, Attention)] == [window]
        ropes = [(op.frequencies, op.rotary_dim) for op in ops if isinstance(op, Rope)]
        assert ropes == [(frequencies, rotary_dim)] * 2


def test_norms_after_the_addition_and_a_narrow_embedding():
    program = compile_program(SPECS["after"])
    assert program.ops[:2] == (
        Embed("token_embd", "embedded"),
        MatMul("project_in", "embedded", "hidden"),
    )
    ops = _layer(SPECS["after"], 2)
    assert ops[0] == MatMul("blk.2.attn_q", "hidden", "query")
    norm = LayerNorm("hidden", "hidden", "blk.2.ffn_norm.weight", "blk.2.ffn_norm.bias", 1e-5)
    assert ops[-2:] == [MatMul("blk.2.ffn_down", "up", "hidden", accumulate=True), norm]
    assert program.ops[-3:] == (
        SelectRows("hidden", "selected"),
        MatMul("project_out", "selected", "projected"),
        MatMul("output", "projected", "logits"),
    )


def test_learned_positions_are_added_to_the_embedding():
    program = compile_program(SPECS["learned-positions"])
    assert program.ops[:2] == (
        Embed("token_embd", "hidden"),
        Embed("position_embd", "hidden", by_position=True, position_offset=2, accumulate=True),
    )
    assert not any(isinstance(op, Rope) for op in program.ops)
    assert MatMul("blk.0.ffn_up", "normed", "up", bias="blk.0.ffn_up.bias") in program.ops
    assert Activation("up", "up", "relu") in program.ops
