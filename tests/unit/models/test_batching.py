from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mutirao.errors import InputError
from mutirao.models.batching import group_by_length, pad_sequences


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 120))
def test_groups_hold_every_index_once_within_the_area(lengths: list[int], max_tokens: int):
    groups = group_by_length(lengths, max_tokens)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths)
    for group in groups:
        area = len(group) * max(lengths[index] for index in group)
        assert area <= max_tokens or len(group) == 1
    assert groups == group_by_length(lengths, max_tokens)


def test_a_group_is_filled_before_the_next_begins():
    assert group_by_length([3, 1, 3, 2], max_tokens=6) == [[1, 3], [0, 2]]


def test_area_below_one_is_refused():
    with pytest.raises(InputError, match="max_tokens=0"):
        group_by_length([1], 0)


def test_padding_is_on_the_right_and_masked():
    ids, mask = pad_sequences([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == torch.long


def test_padding_nothing_is_refused():
    with pytest.raises(InputError, match="no sequence"):
        pad_sequences([], pad_id=0)
