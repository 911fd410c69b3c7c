import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutirao.data import Record, encode_record, encode_records
from mutirao.errors import DataError

EOS = 0


def encode(text):
    return [ord(character) for character in text]


def record(context, completion, **fields):
    return Record(
        id="x", source="x", text=context + completion, context_length=len(context), **fields
    )


def test_boundary_falls_between_the_parts():
    (example,) = encode_record(record("ab", "cd"), encode, EOS, 16)
    assert example.ids == (*encode("abcd"), EOS)
    assert example.num_context == 2


def test_parts_are_encoded_apart():
    calls = []

    def merging(text):
        calls.append(text)
        return [len(text)]

    (example,) = encode_record(record("ab", "cde"), merging, EOS, 16)
    assert calls == ["ab", "cde"]
    assert example.ids == (2, 3, EOS)


def test_long_context_loses_its_beginning_and_keeps_the_completion():
    (example,) = encode_record(record("abcdefgh", "XY"), encode, EOS, 6)
    assert example.ids == (*encode("fghXY"), EOS)
    assert example.num_context == 3


def test_plain_text_has_one_token_of_context():
    (example,) = encode_record(record("", "abc"), encode, EOS, 16)
    assert (example.ids, example.num_context) == ((*encode("abc"), EOS), 1)


letters = st.text(alphabet="abcdefghij", max_size=40)


@given(letters, letters.filter(bool), st.integers(2, 20))
def test_every_learned_token_is_learned_once_and_in_order(context, completion, max_tokens):
    examples = encode_record(record(context, completion), encode, EOS, max_tokens)
    assert all(2 <= len(example.ids) <= max_tokens for example in examples)
    assert all(1 <= example.num_context < len(example.ids) for example in examples)
    learned = [token for example in examples for token in example.ids[example.num_context :]]
    whole = [*encode(completion), EOS]
    assert learned == (whole if context else whole[1:])


def test_learning_the_context_spares_outcomes():
    question = record("ab", " A", choices=(" A", " B"), answer=0, task="question")
    outcome = record("ab", " no", choices=(" no", " yes"), answer=0, task="outcome")
    examples = encode_records([question, outcome], encode, EOS, 16, learn_context=True)
    assert [example.num_context for example in examples] == [1, 2]


def test_empty_record_gives_nothing_and_bad_length_is_refused():
    assert encode_records([record("", "")], encode, EOS, 8) == []
    with pytest.raises(DataError, match="max_tokens=1"):
        encode_record(record("", "ab"), encode, EOS, 1)
