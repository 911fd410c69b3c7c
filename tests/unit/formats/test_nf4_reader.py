from __future__ import annotations

import json

import pytest
import torch

from mutirao.errors import FormatError
from mutirao.formats.compressed_tensors import expand_state
from mutirao.formats.nf4 import STATE_SUFFIX, expand_nf4, is_nf4

TABLE = torch.linspace(-1, 1, 16)


def _json(**changes):
    state = {"shape": [2, 6], "blocksize": 4, "nested_blocksize": 2, "nested_offset": 0.5}
    return torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


def _stored(**changes):
    """Two rows of six weights: three blocks of four, whose scales are bytes in blocks of two."""
    parts = {
        "": torch.tensor([[0x12], [0x3F], [0x08], [0x9A], [0xBC], [0xDE]], dtype=torch.uint8),
        ".quant_map": TABLE,
        ".absmax": torch.tensor([0, 2, 1], dtype=torch.uint8),
        ".nested_quant_map": torch.tensor([0.1, 0.2, 0.3]),
        ".nested_absmax": torch.tensor([10.0, 20.0]),
        STATE_SUFFIX: _json(),
    }
    return {f"a.weight{end}": part for end, part in (parts | changes).items() if part is not None}


def test_codes_and_nested_scales_are_put_together():
    codes = [1, 2, 3, 15, 0, 8, 9, 10, 11, 12, 13, 14]
    scales = [0.1 * 10 + 0.5] * 4 + [0.3 * 10 + 0.5] * 4 + [0.2 * 20 + 0.5] * 4
    expected = [float(TABLE[code]) * scale for code, scale in zip(codes, scales, strict=True)]
    got = expand_nf4("a.weight", _stored())
    assert got.reshape(-1).tolist() == pytest.approx(expected, rel=1e-6)
    assert got.shape == (2, 6)


def test_the_parts_are_no_tensors_of_the_model():
    others = {"norm.weight": torch.ones(2), "b.weight": torch.ones(2, 2)}
    state = expand_state(_stored() | others, 4, "float32")
    assert state.keys() == {"a.weight", "norm.weight", "b.weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {".absmax": None},
        {".absmax": torch.tensor([0, 2], dtype=torch.uint8)},
        {".absmax": torch.tensor([0, 2, 3], dtype=torch.uint8)},
        {".nested_absmax": torch.tensor([10.0])},
        {".quant_map": torch.ones(15)},
        {"": torch.zeros(5, 1, dtype=torch.uint8)},
        {"": torch.zeros(6, 1)},
        {STATE_SUFFIX: torch.tensor([123, 7], dtype=torch.uint8)},
        {STATE_SUFFIX: torch.tensor([300, 7])},
        {STATE_SUFFIX: _json(shape=[-2, -6])},
        {STATE_SUFFIX: _json(shape=[12])},
        {STATE_SUFFIX: _json(shape=None)},
        {STATE_SUFFIX: _json(blocksize=0)},
        {STATE_SUFFIX: _json(blocksize=10**12)},
        {STATE_SUFFIX: _json(nested_blocksize=0)},
    ],
)
def test_parts_that_do_not_fit_are_refused(changes):
    with pytest.raises(FormatError, match=r"NF4 weight a\.weight"):
        expand_nf4("a.weight", _stored(**changes))


def test_other_kinds_are_left_to_their_package():
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert is_nf4(nf4)
    assert not is_nf4(nf4 | {"bnb_4bit_quant_type": "fp4"})
    assert not is_nf4(nf4 | {"load_in_4bit": False})
    assert not is_nf4(nf4 | {"quant_method": "gptq"})
