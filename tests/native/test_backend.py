"""The native engine against the oracle, operation by operation and from end to end.

Run operation by operation, each on what the oracle put into the buffers, nothing but the order
of sums differs: LOCKSTEP bounds the error by an operation's largest number. From end to end an
activation may then be rounded to the next of 255 codes, which in random models is not small;
float formats have no codes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_stores import SPECS, make_store, mixed_formats
from tiny_gguf import FLOATS, QUANTIZED, SPLITS

from mutirao.errors import InferenceError, InputError
from mutirao.inference.architecture.program import Embed, MatMul
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.reference import ReferenceBackend

LOCKSTEP = 4e-6
NUM_TOKENS = 40


def tokens_of(spec, num=NUM_TOKENS):
    return np.random.default_rng(1).integers(0, spec.vocab_size, num).tolist()


def placement(**changes):
    return Placement(**{"context": 64, "max_logit_rows": 64, "num_readers": 2} | changes)


def store_of(tmp_path, architecture, formats):
    spec = SPECS[architecture]
    if formats in ("mixed", "otherwise-mixed"):
        formats = mixed_formats(spec, 0 if formats == "mixed" else 5)
    elif formats == "partly-float":
        floats = {"attn_output": "F16", "ffn_down": "F16", "attn_k": "BF16_SPLIT"}
        formats = {
            name: floats.get(name.split(".")[-1], kind)
            for name, kind in mixed_formats(spec).items()
        }
    return make_store(tmp_path, spec, formats)


def lockstep(store, backend, oracle, chunks, *, mode="full"):
    """Run both, operation by operation, the engine's on the oracle's buffers; compare outputs."""
    position = 0
    for tokens in chunks:
        state = oracle.begin(tokens, position, logits="all", mode=mode)
        rows = list(range(len(tokens)))
        for index, op in enumerate(backend.program.ops):
            for name, content in state.buffers.items():
                backend.buffer(name)[: len(tokens)] = content.numpy()
            oracle.execute(op, state)
            backend.run_ops(tokens, position, index, index + 1, mode=mode, wanted=rows)
            name = getattr(op, "out", None) or op.buffer
            got, expected = backend.buffer(name)[: len(tokens)], state.buffers[name].numpy()
            error = np.abs(got - expected).max()
            assert error <= LOCKSTEP * np.abs(expected).max() * tolerated(store, op), op
        position += len(tokens)
        oracle.num_cached = position


def tolerated(store, op):
    """Products add up what cancels: by how much more they may err than other operations."""
    if not isinstance(op, MatMul) or store.tensors[op.weight].format in FLOATS:
        return 1
    return 4


@pytest.mark.parametrize(
    "formats", ["mixed", "otherwise-mixed", "partly-float", "F32", "F16", "BF16", *SPLITS]
)
@pytest.mark.parametrize("architecture", SPECS)
def test_every_operation_of_every_architecture(architecture, formats, tmp_path):
    store = store_of(tmp_path, architecture, formats)
    tokens = tokens_of(store.spec)
    with NativeBackend(store, placement()) as backend:
        lockstep(store, backend, ReferenceBackend(store), (tokens[:23], tokens[23:24], tokens[24:]))


@pytest.mark.parametrize("name", [*QUANTIZED, *SPLITS, "streamed", "BF16_SPLIT streamed"])
def test_every_operation_of_drafts(name, tmp_path):
    """Drafts of every number of planes, resident or streamed."""
    spec = SPECS["qwen2"]
    is_streamed = name.endswith("streamed")
    store = make_store(tmp_path, spec, "Q6_K" if name == "streamed" else name.split()[0])
    tokens = tokens_of(spec, 9)
    for planes in range(1, len(store.tensors["token_embd"].planes)):
        kept = dict.fromkeys(store.tensors, NOTHING if is_streamed else planes)
        # The oracle reads drafts' rows of the embedding too; the engine reads whole ones.
        drafts = {each: planes for each in store.tensors if each != "token_embd"}
        kept["token_embd"] = NOTHING
        with NativeBackend(store, placement(resident=kept)) as backend:
            if is_streamed:
                for each in drafts:
                    backend.set_draft_planes(each, planes)
            oracle = ReferenceBackend(store, draft_planes=drafts)
            lockstep(store, backend, oracle, (tokens,), mode="draft")
            lockstep(store, backend, oracle, (tokens,))


@pytest.mark.parametrize("architecture", SPECS)
def test_logits_from_end_to_end(architecture, tmp_path):
    """Float weights, so that only keys and values are rounded, to 11 bits."""
    store = store_of(tmp_path, architecture, "F32")
    tokens = tokens_of(store.spec)
    expected = ReferenceBackend(store).run(tokens, 0, logits="all")
    assert expected.std() > 0.5
    with NativeBackend(store, placement()) as backend:
        got = backend.run(tokens, 0, logits="all")
        np.testing.assert_allclose(got, expected, atol=2e-3 * expected.std())
        assert got.dtype == np.float32
        np.testing.assert_array_equal(backend.run(tokens, 0), got[-1:])
        assert backend.run(tokens, 0, logits="none").shape == (0, store.spec.vocab_size)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_quantized_logits_from_end_to_end(architecture, tmp_path):
    store = store_of(tmp_path, architecture, "Q8_0")
    tokens = tokens_of(store.spec)
    oracle = ReferenceBackend(store).run(tokens, 0, logits="all")
    exact = ReferenceBackend(store, exact_activations=True).run(tokens, 0, logits="all")
    shares = []
    with NativeBackend(store, placement()) as backend:
        got = backend.run(tokens, 0, logits="all")
        for token in tokens[:15]:  # each alone, so that none stands on another's rounding
            alone = ReferenceBackend(store).run([token], 0)
            unrounded = ReferenceBackend(store, exact_activations=True).run([token], 0)
            gap = np.median(np.abs(backend.run([token], 0) - alone))
            shares.append(gap / np.median(np.abs(unrounded - alone)))
    # As far as rounding moves them, and no further.
    assert np.abs(got - oracle).max() < np.abs(exact - oracle).max()
    # Both round alike, but for ties: one that falls on the other side moves all that follows it.
    # Which ties do depends on the order of float32 sums, and so on the processor.
    assert np.median(shares) < 0.01


@pytest.mark.parametrize("architecture", SPECS)
def test_one_at_a_time_in_chunks_and_all_at_once_are_equal(architecture, tmp_path):
    store = store_of(tmp_path, architecture, "mixed")
    tokens = tokens_of(store.spec)
    with NativeBackend(store, placement()) as backend:
        every = backend.run(tokens, 0, logits="all")
        for position, token in enumerate(tokens):
            np.testing.assert_array_equal(backend.run([token], position)[0], every[position])
        for size in (2, 3, 5, 8, 16):
            for begin in range(0, len(tokens), size):
                got = backend.run(tokens[begin : begin + size], begin, logits="all")
                np.testing.assert_array_equal(got, every[begin : begin + size])
    for max_tokens in (1, 7, 39):
        with NativeBackend(store, placement(max_tokens=max_tokens)) as backend:
            np.testing.assert_array_equal(backend.run(tokens, 0), every[-1:])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt-after-projected"])
def test_threads_and_instruction_sets_change_nothing(architecture, tmp_path, isa):
    store = store_of(tmp_path, architecture, "mixed")
    tokens = tokens_of(store.spec)
    with NativeBackend(store, placement(num_threads=1)) as backend:
        expected = backend.run(tokens, 0, logits="all")
    for num_threads in (1, 2, 3, 7):
        with NativeBackend(store, placement(num_threads=num_threads, kernels=isa)) as backend:
            assert backend.kernels == isa
            np.testing.assert_array_equal(backend.run(tokens, 0, logits="all"), expected)


def test_tokens_run_again_replace_those_that_lay_there(tmp_path):
    store = store_of(tmp_path, "gemma3", "mixed")
    tokens = tokens_of(store.spec)
    with NativeBackend(store, placement()) as backend:
        expected = backend.run(tokens, 0)
        backend.run(tokens[::-1], 0, logits="none")
        backend.run(tokens[:11], 0, logits="none")
        backend.run([5] * 20, 11, logits="none", mode="draft")
        np.testing.assert_array_equal(backend.run(tokens[11:], 11), expected)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, *SPLITS])
@pytest.mark.parametrize("by_position", [False, True])
def test_rows_are_looked_up_wherever_their_planes_lie(name, by_position, tmp_path):
    """Exactly the weights of the oracle: in memory, streamed, or some planes each."""
    spec = dataclasses.replace(SPECS["opt" if by_position else "llama"], num_layers=1)
    matrix = "position_embd" if by_position else "token_embd"
    store = make_store(tmp_path, spec, name)
    weights = ReferenceBackend(store).matrix(matrix).numpy()
    tokens = [0, 1, 15, 16, 17, 255, 256, 299]
    ops = [index for index, op in enumerate(_program(store)) if isinstance(op, Embed)]
    for planes in range(NOTHING, len(store.tensors[matrix].planes) + 1):
        resident = {matrix: planes}
        with NativeBackend(store, placement(resident=resident, max_tokens=8)) as backend:
            if by_position:
                backend.run_ops(tokens, 30, ops[0], ops[0] + 1)
                before = backend.buffer("hidden").copy()
                backend.run_ops(tokens, 30, ops[1], ops[1] + 1)
                expected = before + weights[32:40]
            else:
                backend.run_ops(tokens, 0, ops[0], ops[0] + 1)
                expected = weights[tokens]
            np.testing.assert_array_equal(backend.buffer("hidden"), expected)


def _program(store):
    return ReferenceBackend(store).program.ops


@pytest.fixture
def backend(tmp_path):
    store = store_of(tmp_path, "opt", "Q4_0")
    with NativeBackend(store, placement(max_tokens=32, max_logit_rows=40)) as backend:
        yield backend


@pytest.mark.parametrize(
    ("tokens", "position", "options", "message"),
    [
        ([], 0, {}, "0 tokens"),
        ([1] * 65, 0, {}, "context of 64"),
        ([300], 0, {}, "expected 0 to 299"),
        ([0, -1], 0, {}, "expected 0 to 299"),
        ([1], 1, {}, "expected 0 to 0"),
        ([1], -1, {}, "expected 0 to 0"),
        ([1] * 33, 0, {"logits": "all"}, "at most 32"),
    ],
)
def test_what_cannot_be_run_is_refused_and_harms_nothing(
    backend, tokens, position, options, message
):
    with pytest.raises(InputError, match=message):
        backend.run(tokens, position, **options)
    expected = backend.run([1, 2, 3], 0)
    with pytest.raises(InputError):
        backend.run(tokens, position if position <= 0 else 4, **options)
    backend.run([1, 2], 0)
    np.testing.assert_array_equal(backend.run([3], 2), expected)


def test_more_rows_of_logits_than_planned(tmp_path):
    store = store_of(tmp_path, "llama", "Q8_0")
    with NativeBackend(store, placement(max_logit_rows=2)) as backend:
        with pytest.raises(InputError, match="at most 2"):
            backend.run([1, 2, 3], 0, logits="all")
        assert backend.run([1, 2], 0, logits="all").shape == (2, 300)


@pytest.mark.parametrize("use", ["run", "buffer", "bytes_read", "kernels", "op_seconds", "wait_s"])
def test_a_closed_backend_says_so(tmp_path, use):
    backend = NativeBackend(store_of(tmp_path, "llama", "Q4_0"), placement())
    backend.run([1], 0)
    backend.close()
    backend.close()
    arguments = {"run": ([1], 0), "buffer": ("hidden",), "op_seconds": ()}
    with pytest.raises(InferenceError, match="closed"):
        getattr(backend, use)(*arguments[use])


@pytest.mark.parametrize(
    "wrong", [{"num_threads": 0}, {"num_threads": -1}, {"num_threads": 10**6}, {"kernels": "mmx"}]
)
def test_settings_that_no_engine_has(tmp_path, wrong):
    store = store_of(tmp_path, "llama", "Q4_0")
    with pytest.raises(InputError, match="cannot be made on this machine"):
        NativeBackend(store, placement(**wrong))


def test_progress_and_seconds(tmp_path):
    store = store_of(tmp_path, "llama", "mixed")
    told = []
    with NativeBackend(store, placement(), progress=told.append) as backend:
        assert told[-1] == sum(tensor.num_bytes for tensor in store.tensors.values())
        assert not any(backend.op_seconds().values())
        backend.run(tokens_of(store.spec), 0)
        seconds = backend.op_seconds()
        assert seconds["MatMul"] > 0
        assert seconds["Attention"] > 0
        assert seconds["Scale"] == 0
        assert (backend.bytes_read, backend.wait_s) == (0, 0.0)


def test_a_load_that_is_interrupted_leaves_nothing_behind(tmp_path):
    store = store_of(tmp_path, "llama", "mixed")

    def interrupt(done):
        raise KeyboardInterrupt

    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            NativeBackend(store, placement(), progress=interrupt)
