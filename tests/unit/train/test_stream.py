"""Streams of examples: stretches join up, mixtures keep their shares."""

import pytest

from mutirao.data.tokenization import Example
from mutirao.errors import DataError
from mutirao.train.stream import take_mixed, take_tokens

EXAMPLES = [Example(tuple(range(5, 5 + n)), 0) for n in (4, 9, 16, 7, 12)]
OUTCOMES = [Example((100 + n, 200 + n, 300 + n), 2) for n in range(8)]


def _ids(examples):
    return [example.ids for example in examples]


def _num_tokens(examples):
    return sum(len(example.ids) for example in examples)


def test_stretches_of_the_stream_join_up():
    whole = take_tokens(EXAMPLES, seed=1, skip_tokens=0, num_tokens=200)
    first = take_tokens(EXAMPLES, seed=1, skip_tokens=0, num_tokens=100)
    used = sum(len(example.ids) for example in first)
    rest = take_tokens(EXAMPLES, seed=1, skip_tokens=used, num_tokens=200 - used)
    assert _ids(first + rest) == _ids(whole)
    assert sum(len(ids) for ids in _ids(whole)) >= 200


def test_rounds_neither_repeat_nor_lose_examples():
    stride = 50
    joined = [
        example
        for number in range(4)
        for example in take_tokens(EXAMPLES, seed=3, skip_tokens=number * stride, num_tokens=stride)
    ]
    whole = take_tokens(EXAMPLES, seed=3, skip_tokens=0, num_tokens=4 * stride)
    assert _ids(joined) == _ids(whole)


def test_no_examples_is_an_error():
    with pytest.raises(DataError, match="no training example"):
        take_tokens([], seed=0, skip_tokens=0, num_tokens=1)


def test_outcomes_get_their_share_of_the_tokens():
    stretch = take_mixed(
        EXAMPLES, OUTCOMES, outcome_share=0.25, seed=0, skip_tokens=0, num_tokens=4000
    )
    outcome_tokens = _num_tokens(example for example in stretch if len(example.ids) == 3)
    assert _num_tokens(stretch) == pytest.approx(4000, rel=0.01)
    assert outcome_tokens / _num_tokens(stretch) == pytest.approx(0.25, abs=0.01)


def test_mixed_stretches_join_up():
    def stretch(skip, num):
        return take_mixed(
            EXAMPLES, OUTCOMES, outcome_share=0.3, seed=1, skip_tokens=skip, num_tokens=num
        )

    parts = [example for number in range(4) for example in stretch(number * 101, 101)]
    assert sorted(_ids(parts)) == sorted(_ids(stretch(0, 404)))


@pytest.mark.parametrize(("text", "outcomes"), [(EXAMPLES, []), ([], OUTCOMES)])
def test_one_kind_alone_gets_all(text, outcomes):
    stretch = take_mixed(text, outcomes, outcome_share=0.25, seed=0, skip_tokens=0, num_tokens=100)
    assert _num_tokens(stretch) >= 100
