"""Groups of layers in config.json: which bits a layer has, and which groups are refused."""

from __future__ import annotations

import json

import pytest

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.errors import FormatError
from mutirao.formats.compressed_tensors import load_packed
from mutirao.formats.layer_bits import read_layer_bits
from mutirao.formats.packed_rows import packed_bits
from mutirao.inference.store.source_weights import open_source

UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("up", "down"))


def _document(*groups):
    """Groups of (bits, targets)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            str(index): {
                "targets": targets,
                "weights": {"num_bits": bits, "type": "int", "strategy": "group"},
            }
            for index, (bits, targets) in enumerate(groups)
        },
    }


def test_one_group_is_for_all_layers():
    assert read_layer_bits(_document((3, ["Linear"]))).of("any") == 3
    assert read_layer_bits(_document((3, ["re:.*proj"]))).of("any") == 3


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_goes_before_the_class(order):
    groups = [(4, ["Linear"]), (8, ["a.b", "a.c"]), (2, ["a.d"])][::order]
    bits = read_layer_bits(_document(*groups))
    assert [bits.of(name) for name in ("a.b", "a.c", "a.d", "a", "b")] == [8, 8, 2, 4, 4]


def test_a_layer_of_no_group_is_refused():
    bits = read_layer_bits(_document((8, ["a.b"]), (2, ["a.d"])))
    with pytest.raises(FormatError, match=r"in how many bits compressed layer a\.c is"):
        bits.of("a.c")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(4, ["a", "b"]), (3, ["b"])], "has b in two groups"),
        ([(4, ["Linear"]), (3, ["Linear"])], "has Linear in two groups"),
        ([(4, ["Linear"]), (3, ["re:(a+)+$"])], r"by the pattern 're:\(a\+\)\+\$' \(expected"),
        ([(4, ["Linear"]), (3, None)], "without a list of its layers"),
        ([(4, ["Linear"]), (3, [5])], "without a list of its layers"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(groups, message):
    with pytest.raises(FormatError, match=message):
        read_layer_bits(_document(*groups))
    with pytest.raises(FormatError, match=message):
        packed_bits({"quantization_config": _document(*groups)})


@pytest.mark.parametrize("bits", [0, 9, 4.0, True, "4", None])
def test_other_numbers_of_bits_are_not_read(bits):
    assert read_layer_bits(_document((4, ["Linear"]), (bits, ["a"]))) is None


def test_a_folder_whose_groups_lie_is_refused(tiny_model_directory, tmp_path):
    """Two layers with each other's bits, and one that no group names."""
    folder = tmp_path / "small"
    compress_model(
        tiny_model_directory, folder, CompressConfig(bits=4, layer_bits={UP: 8, DOWN: 3})
    )
    path = folder / "config.json"
    good = json.loads(path.read_text())
    narrow, middle, wide = good["quantization_config"]["config_groups"].values()
    assert (narrow["targets"], wide["targets"]) == ([DOWN], [UP])
    narrow["targets"], wide["targets"] = [UP], [DOWN]
    path.write_text(json.dumps(good))
    with pytest.raises(FormatError, match=rf"{DOWN}: .* in 8 bits .* do not fit together"):
        load_packed(folder)
    with pytest.raises(FormatError, match="_proj is damaged"), open_source(folder):
        pass
    narrow["targets"], wide["targets"] = [DOWN], [UP]
    name = middle["targets"].pop()
    path.write_text(json.dumps(good))
    with pytest.raises(FormatError, match=f"in how many bits compressed layer {name} is"):
        load_packed(folder)
    with pytest.raises(FormatError, match=f"layer {name} is"), open_source(folder):
        pass
