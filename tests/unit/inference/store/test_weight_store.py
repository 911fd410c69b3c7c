"""The weight store: what is in it is what is in the model, however its building went."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import FLOATS, QUANTIZED, SPLITS, matrix_shapes, vector_names, write_tiny_gguf

from mutirao.errors import ArtifactError, FormatError, ShapeError
from mutirao.inference.store import store_build, store_index
from mutirao.inference.store.plane_formats import FILE_FORMATS, FORMATS
from mutirao.inference.store.planes import dequantize, unpack
from mutirao.inference.store.weight_store import WeightStore, store_directory

MIXED = {name: (*QUANTIZED, *FLOATS)[index % 11] for index, name in enumerate(matrix_shapes())} | {
    "token_embd": "Q6_K"
}


def quiet(done: int, total: int) -> None:
    """Progress that nobody sees."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "tiny.gguf"
    rows = write_tiny_gguf(path, MIXED)
    return path, rows


@pytest.fixture(scope="module")
def store(source, tmp_path_factory):
    return WeightStore.build(source[0], tmp_path_factory.mktemp("store") / "s", quiet)


def files_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def weights_of(store, name):
    tensor = store.tensors[name]
    scales, planes = store.load(name)
    return dequantize(scales, planes, tensor.format, tensor.num_rows, tensor.num_columns)


def test_every_format_is_in_the_mixed_model(store):
    assert set(MIXED.values()) == set(FILE_FORMATS)
    kept = {tensor.format for tensor in store.tensors.values()}
    assert kept == {*QUANTIZED, "F32", *SPLITS}


def test_matrices_come_back_byte_for_byte(source, store):
    assert list(store.tensors) == list(matrix_shapes())
    for name, raw in source[1].items():
        tensor = store.tensors[name]
        assert (tensor.num_rows, tensor.num_columns) == matrix_shapes()[name]
        scales, planes = store.load(name)
        assert unpack(scales, planes, tensor.format, *matrix_shapes()[name]) == raw.tobytes()
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[MIXED[name]])
        np.testing.assert_array_equal(weights_of(store, name), expected)


def test_vectors_are_those_of_the_file(source, store):
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source[0]).tensors}
    assert set(store.vectors) == {*vector_names(), "rope_freqs"}
    for name in vector_names():
        np.testing.assert_array_equal(store.vectors[name], stored[name])
        assert store.vectors[name].dtype == np.float32
        assert store.vectors[name].ctypes.data % 4 == 0
        with pytest.raises(ValueError, match="read-only"):
            store.vectors[name][0] = 0
    frequencies = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(store.vectors["rope_freqs"], frequencies, rtol=1e-6)


def test_spec_and_tokenizer_are_there(store):
    assert (store.spec.architecture, store.spec.num_layers) == ("llama", 2)
    assert store.spec.rope.interleaved
    assert store.spec.tied_head
    tokenizer = json.loads((store.directory / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 260
    assert (store.directory / "tokenizer_config.json").is_file()


def test_extents_are_pages_one_after_the_other(store):
    position = store.index.layout.vectors_extent.end
    checksums = 1
    content = store.weights_path.read_bytes()
    covered = np.zeros(len(content), bool)
    covered[: store.index.layout.vectors_extent.num_bytes] = True
    for tensor in store.tensors.values():
        kinds = [extent.kind for extent in tensor.extents]
        widths = FORMATS[tensor.format].plane_widths
        assert kinds == ["scales"] * (not FORMATS[tensor.format].is_float) + ["plane"] * len(widths)
        for extent in tensor.extents:
            assert extent.offset == position
            assert extent.offset % 4096 == 0
            assert extent.checksums == checksums
            covered[extent.offset : extent.offset + extent.num_bytes] = True
            position = -(-(extent.offset + extent.num_bytes) // 4096) * 4096
            checksums += -(-tensor.num_panels // 16)
        for extent, width in zip(tensor.planes, widths, strict=True):
            assert extent.num_bytes == tensor.num_panels * 2 * tensor.num_columns * width
    assert len(content) == position == store.index.layout.weights_bytes
    assert len(store.checksums) == checksums == store.index.layout.num_checksums
    assert not np.frombuffer(content, np.uint8)[~covered].any()


def test_checksums_are_the_sums_that_are_specified(store):
    content = store.weights_path.read_bytes()
    for tensor in store.tensors.values():
        for extent in tensor.extents:
            data = content[extent.offset : extent.offset + extent.num_bytes]
            slab_bytes = len(data) // tensor.num_panels * 16
            for slab in range(-(-tensor.num_panels // 16)):
                piece = data[slab * slab_bytes : (slab + 1) * slab_bytes]
                words = [
                    int.from_bytes(piece[i : i + 8], "little") for i in range(0, len(piece), 8)
                ]
                total = sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
                assert total == store.checksums[extent.checksums + slab]


def test_checksum_of_pieces_and_of_a_cut_word():
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    whole = store_index.checksum(data)
    parts = store_index.checksum(data[:400]) + store_index.checksum(data[400:], 50)
    assert parts % 2**64 == whole
    padded = np.concatenate((data[:13], np.zeros(3, np.uint8)))
    assert store_index.checksum(data[:13]) == store_index.checksum(padded)
    assert store_index.checksum(data[:0]) == 0


def test_slabs_can_be_checked_as_they_are_read(store):
    tensor = store.tensors["blk.0.ffn_up"]
    extent = tensor.planes[-1]
    slab = extent.num_bytes // tensor.num_panels * 16
    content = np.fromfile(store.weights_path, np.uint8)
    data = content[extent.offset : extent.offset + extent.num_bytes]
    assert tensor.num_panels == 32
    store.check_slabs(extent, tensor, data)
    store.check_slabs(extent, tensor, data[slab:], first=1)
    store.check_slabs(extent, tensor, data[:slab])
    altered = data.copy()
    altered[slab + 3] ^= 1
    store.check_slabs(extent, tensor, altered[:slab])
    with pytest.raises(ArtifactError, match=r"plane of blk.0.ffn_up from row 256 on differ"):
        store.check_slabs(extent, tensor, altered[slab:], first=1)
    with pytest.raises(ShapeError, match="not whole slabs"):
        store.check_slabs(extent, tensor, data[: slab - 8])
    with pytest.raises(ShapeError, match="not whole slabs"):
        store.check_slabs(extent, tensor, data, first=1)


def test_a_head_of_its_own(tmp_path):
    rows = write_tiny_gguf(tmp_path / "x.gguf", {"output": "Q6_K"}, is_tied=False)
    store = WeightStore.build(tmp_path / "x.gguf", tmp_path / "s", quiet)
    assert not store.spec.tied_head
    assert list(store.tensors)[-1] == "output"
    expected = gguf.dequantize(rows["output"], gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(weights_of(store, "output"), expected)


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ2_XS", "Q2_K", "Q3_K", "TQ1_0", "MXFP4"])
def test_other_types_are_refused_by_name(tmp_path, kind):
    write_tiny_gguf(tmp_path / "x.gguf", {"blk.1.ffn_up": kind})
    with pytest.raises(FormatError) as caught:
        WeightStore.build(tmp_path / "x.gguf", tmp_path / "s", quiet)
    message = str(caught.value)
    assert f"matrix blk.1.ffn_up.weight is of type {kind}, which is not supported" in message
    assert "expected one of F32, F16, BF16, Q4_0" in message
    assert str(tmp_path / "x.gguf") in message
    assert not (tmp_path / "s").exists()


# --- building, and building again ------------------------------------------------------------


def test_progress_reaches_its_end(source, tmp_path):
    told = []
    store = WeightStore.build(source[0], tmp_path / "s", lambda *each: told.append(each))
    total = sum(tensor.num_bytes for tensor in store.tensors.values())
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert len(told) > len(store.tensors)


def test_building_shows_a_bar_on_the_console(source, tmp_path, capsys, monkeypatch):
    from rich.console import Console

    shown = io.StringIO()
    screen = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr("mutirao.console.console", screen)
    WeightStore.build(source[0], tmp_path / "s")
    assert "building the weight store of tiny.gguf" in shown.getvalue()
    assert capsys.readouterr().out == ""


def test_a_model_is_built_once(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    path = shutil.copy(source[0], tmp_path / "tiny.gguf")
    told = []
    store = WeightStore.open_or_build(path, lambda *each: told.append(each))
    assert store.directory == store_directory(path)
    assert store.directory.parent == tmp_path / "cache" / "stores"
    assert told
    told.clear()
    again = WeightStore.open_or_build(path, lambda *each: told.append(each))
    assert again.directory == store.directory
    assert WeightStore.open_or_build(store.directory).directory == store.directory
    os.utime(path, ns=(1, 1))  # touched: its whole hash is still the same
    WeightStore.open_or_build(path, lambda *each: told.append(each))
    assert not told


def test_a_changed_model_is_built_again(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    path = tmp_path / "tiny.gguf"
    shutil.copy(source[0], path)
    before = files_of(WeightStore.open_or_build(path, quiet).directory)
    rows = write_tiny_gguf(path, MIXED, seed=1)
    store = WeightStore.open_or_build(path, quiet)
    assert files_of(store.directory)["weights.bin"] != before["weights.bin"]
    assert unpack(*store.load("token_embd"), "Q6_K", 260, 256) == rows["token_embd"].tobytes()
    assert [each.name for each in store.directory.parent.iterdir() if each.is_dir()] == [
        store.directory.name
    ]


def test_a_large_model_that_was_only_touched_is_built_again(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    monkeypatch.setattr("mutirao.inference.store.source_fingerprint.WHOLE_BYTES", 1000)
    path = tmp_path / "tiny.gguf"
    shutil.copy(source[0], path)
    told = []
    WeightStore.open_or_build(path, quiet)
    WeightStore.open_or_build(path, lambda *each: told.append(each))
    assert not told
    os.utime(path, ns=(1, 1))
    WeightStore.open_or_build(path, lambda *each: told.append(each))
    assert told


def test_a_store_of_another_version_is_built_again(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    path = shutil.copy(source[0], tmp_path / "tiny.gguf")
    directory = WeightStore.open_or_build(path, quiet).directory
    index = json.loads((directory / "index.json").read_text()) | {"version": 99}
    index["sha256"] = store_index._digest(index)
    (directory / "index.json").write_text(json.dumps(index))
    words = rf"has version 99 .this version of Mutirão reads {store_index.VERSION}"
    with pytest.raises(ArtifactError, match=words):
        WeightStore.open(directory)
    told = []
    WeightStore.open_or_build(path, lambda *each: told.append(each))
    assert told


def test_a_model_that_changes_while_it_is_read(source, tmp_path):
    path = shutil.copy(source[0], tmp_path / "tiny.gguf")

    def change(done: int, total: int) -> None:
        if done == total:
            with path.open("ab") as file:
                file.write(b"more")

    with pytest.raises(FormatError, match="changed while it was read"):
        WeightStore.build(path, tmp_path / "s", change)
    assert not (tmp_path / "s").exists()
    WeightStore.build(path, tmp_path / "s", quiet)


KILLED = """
import os, signal, sys
from pathlib import Path
from mutirao.inference.store.weight_store import WeightStore
source, directory, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def kill(done, total):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
WeightStore.build(source, directory, kill)
"""


@pytest.mark.parametrize("count", [0, 1, 9, 24, 30])
def test_a_killed_build_goes_on_and_ends_the_same(source, store, tmp_path, monkeypatch, count):
    directory = tmp_path / "s"
    command = [sys.executable, "-c", KILLED, str(source[0]), str(directory), str(count)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not directory.exists()
    packed = []
    write_matrix = store_build._write_matrix

    def count_matrices(matrix, *rest):
        packed.append(matrix.name)
        return write_matrix(matrix, *rest)

    monkeypatch.setattr(store_build, "_write_matrix", count_matrices)
    resumed = WeightStore.build(source[0], directory, quiet)
    assert files_of(directory) == files_of(store.directory)
    resumed.verify()
    num_done = count // 2  # one report before all, two for each matrix
    assert packed == list(store.tensors)[num_done:]


def interrupted(source, directory):
    """A build that was interrupted behind its fifth matrix; the hidden folder it left."""

    def stop(done: int, total: int, count=[0]) -> None:  # noqa: B006
        count[0] += 1
        if count[0] > 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WeightStore.build(source, directory, stop)
    return directory.with_name(f".{directory.name}.partial")


def test_what_was_damaged_meanwhile_is_not_believed(source, store, tmp_path):
    partial = interrupted(source[0], tmp_path / "s")
    with (partial / "weights.bin").open("r+b") as file:
        file.seek(store.tensors["blk.0.attn_q"].planes[0].offset + 100)
        file.write(b"altered!")
    with (partial / "journal.jsonl").open("a") as file:
        file.write('{"tensor": "blk.1.ffn_up", "checksums": [1, 2]}\n')
        file.write('{"tensor": ["blk.1.ffn_up"]}\n[1]\n{"tensor": "blk.1.ffn_')
    WeightStore.build(source[0], tmp_path / "s", quiet)
    assert files_of(tmp_path / "s") == files_of(store.directory)


def test_what_was_begun_of_another_model_is_dropped(source, store, tmp_path):
    path = tmp_path / "x.gguf"
    write_tiny_gguf(path, MIXED, seed=5)
    partial = interrupted(path, tmp_path / "s")
    (partial / "stray").write_text("of another model")
    shutil.copy(source[0], path)
    WeightStore.build(path, tmp_path / "s", quiet)
    ours, theirs = files_of(tmp_path / "s"), files_of(store.directory)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name != "index.json")


def test_builders_take_turns(source, tmp_path, caplog):
    directory = tmp_path / "s"
    with (tmp_path / ".s.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = [[], []]
        threads = [
            threading.Thread(
                target=WeightStore.build,
                args=(source[0], directory, lambda *each, mine=mine: mine.append(each)),
            )
            for mine in told
        ]
        for thread in threads:
            thread.start()
        threads[0].join(0.5)
        assert all(thread.is_alive() for thread in threads)
        assert not directory.exists()
        assert "another process is building" in caplog.text
    for thread in threads:
        thread.join(60)
    assert WeightStore.open(directory).tensors
    assert sorted(map(bool, told)) == [False, True]  # only one of them had anything to do


ALONE = """
import sys
from pathlib import Path
for name in ("torch", "transformers", "gguf", "safetensors", "pydantic", "httpx", "scipy"):
    sys.modules[name] = None  # importing it fails
from mutirao.inference.store.weight_store import WeightStore
store = WeightStore.build(Path(sys.argv[1]), Path(sys.argv[2]), lambda *_: None)
store.verify()
assert "rich" not in sys.modules
print(len(store.tensors))
"""


def test_neither_framework_nor_library_of_gguf_is_needed(source, tmp_path):
    command = [sys.executable, "-c", ALONE, str(source[0]), str(tmp_path / "s")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "15"


LIMITED = """
import sys
from pathlib import Path
from mutirao.inference.store import store_build
from mutirao.inference.store.weight_store import WeightStore
store_build._write_tokenizer = lambda source, partial: {}
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10
WeightStore.build(Path(sys.argv[1]), Path(sys.argv[2]) / "small", print)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
WeightStore.build(Path(sys.argv[3]), Path(sys.argv[2]) / "large", lambda *_: None)
print("peak", status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_whatever_the_matrix(source, tmp_path):
    """A head of 300 MB is packed in less than 50 MB."""
    path = tmp_path / "large.gguf"
    write_tiny_gguf(path, {"token_embd": "F32"})
    header = path.read_bytes()
    reader = gguf.GGUFReader(path)
    first = reader.tensors[0]
    assert first.name == "token_embd.weight"
    num_rows = 300_000
    grown = num_rows * 1024 - first.n_bytes
    grow_first_tensor(path, header, reader, num_rows, grown)
    command = [sys.executable, "-c", LIMITED, str(source[0]), str(tmp_path), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "large" / "weights.bin").stat().st_size > 300_000_000
    assert int(run.stdout.split()[-1]) < 50_000_000


def grow_first_tensor(path, header, reader, num_rows, grown):
    """Write the file anew with more rows of zeros in its first tensor, as a sparse file."""
    data_begin = reader.tensors[0].data_offset
    head = bytearray(header[:data_begin])
    for tensor in reader.tensors:
        place = head.index(tensor.name.encode()) + len(tensor.name) + 4
        rank = int.from_bytes(head[place - 4 : place], "little")
        if tensor is reader.tensors[0]:
            head[place + 8 : place + 16] = num_rows.to_bytes(8, "little")
        else:
            offset = place + 8 * rank + 4
            moved = int.from_bytes(head[offset : offset + 8], "little") + grown
            head[offset : offset + 8] = moved.to_bytes(8, "little")
    with path.open("wb") as file:
        file.write(head)
        file.seek(data_begin + reader.tensors[0].n_bytes + grown)
        file.write(header[data_begin + reader.tensors[0].n_bytes :])


# --- Hugging Face directories ----------------------------------------------------------------

HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def check_llama(store, state, kind):
    """Every matrix and vector of a two-layer llama against a transformers state."""
    kept = kind if kind == "F32" else f"{kind}_SPLIT"
    assert {tensor.format for tensor in store.tensors.values()} == {kept}

    def same(ours, theirs):
        np.testing.assert_array_equal(ours, state[theirs].float().numpy())

    same(weights_of(store, "token_embd"), "model.embed_tokens.weight")
    same(store.vectors["output_norm.weight"], "model.norm.weight")
    for layer in range(2):
        for ours, theirs in HF_NAMES.items():
            place = f"model.layers.{layer}.{theirs}.weight"
            same(weights_of(store, f"blk.{layer}.{ours}"), place)
        same(
            store.vectors[f"blk.{layer}.attn_norm.weight"],
            f"model.layers.{layer}.input_layernorm.weight",
        )
    assert len(store.tensors) == 15
    assert not store.spec.rope.interleaved


def test_a_directory_in_bfloat16(tiny_model_directory, tmp_path):
    from safetensors.torch import load_file

    store = WeightStore.build(tiny_model_directory, tmp_path / "s", quiet)
    check_llama(store, load_file(tiny_model_directory / "model.safetensors"), "BF16")
    assert (store.directory / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_directory_in_shards(tiny_model_directory, tmp_path, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_directory, dtype=getattr(torch, dtype), local_files_only=True
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_directory / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    store = WeightStore.build(folder, tmp_path / "s", quiet)
    check_llama(store, model.state_dict(), {"float32": "F32", "float16": "F16"}[dtype])
    os.utime(folder / "config.json", ns=(1, 1))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", "{ ", 1))
    told = []
    WeightStore.build(folder, tmp_path / "s", lambda *each: told.append(each))
    assert told  # the configuration is part of the source


def test_norms_of_gemma_are_stored_with_their_one(tiny_model_directory, tmp_path):
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter)
    folder = tmp_path / "gemma"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_directory / name, folder / name)
    store = WeightStore.build(folder, tmp_path / "s", quiet)
    layer = model.model.layers[1]
    for ours, theirs in {
        "output_norm": model.model.norm,
        "blk.1.attn_norm": layer.input_layernorm,
        "blk.1.post_attention_norm": layer.post_attention_layernorm,
        "blk.1.ffn_norm": layer.pre_feedforward_layernorm,
        "blk.1.post_ffw_norm": layer.post_feedforward_layernorm,
        "blk.1.attn_q_norm": layer.self_attn.q_norm,
        "blk.1.attn_k_norm": layer.self_attn.k_norm,
    }.items():
        expected = theirs.weight.detach().numpy() + np.float32(1)
        np.testing.assert_array_equal(store.vectors[f"{ours}.weight"], expected)
    assert {"rope_freqs", "rope_freqs_local"} <= set(store.vectors)


@pytest.mark.parametrize("layer_bits", [{}, {"model.layers.1.mlp.up_proj": 8}])
def test_a_compressed_directory_is_what_its_own_reader_reads(
    tiny_model_directory, tmp_path, layer_bits
):
    from safetensors.torch import load_file

    from mutirao.compress.compression import compress_model
    from mutirao.compress.config import CompressConfig
    from mutirao.formats.compressed_tensors import expand_state
    from mutirao.formats.layer_bits import LayerBits

    folder = tmp_path / "compressed"
    config = CompressConfig(bits=3, group_size=32, layer_bits=layer_bits)
    compress_model(tiny_model_directory, folder, config)
    store = WeightStore.build(folder, tmp_path / "s", quiet)
    bits = LayerBits(3, layer_bits)
    state = expand_state(load_file(folder / "model.safetensors"), bits, "bfloat16")
    check_llama(store, state, "BF16")


def copy_with(directory, target, change):
    """A copy of a model directory whose tensors were changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_directories_that_are_not_whole_are_refused(tiny_model_directory, tmp_path):
    import torch

    def refused(name, change, message):
        folder = copy_with(tiny_model_directory, tmp_path / name, change)
        with pytest.raises(FormatError, match=message) as caught:
            WeightStore.build(folder, tmp_path / "s", quiet)
        assert str(folder) in str(caught.value)

    q = "model.layers.1.self_attn.q_proj.weight"
    refused("a", lambda t: t.pop(q), f"lack {q}")
    refused("b", lambda t: t.update({"model.layers.1.extra.weight": torch.ones(2)}), "no place")
    refused("c", lambda t: t.update({q: t[q][:-1].clone()}), "has shape .63, 64. .expected .64, 64")
    refused("d", lambda t: t.update({q: t[q].to(torch.float64)}), "q_proj.weight is of type F64")
    refused("e", lambda t: t.update({"layers.1.self_attn.q_proj.weight": t[q].clone()}), "twice")
    head = {"lm_head.weight": torch.ones(2)}
    folder = copy_with(tiny_model_directory, tmp_path / "tied", lambda t: t.update(head))
    assert WeightStore.build(folder, tmp_path / "s", quiet).spec.tied_head  # its head is not read
