"""Text that comes in tokens: whole characters only, and up to a stop."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import EDGES, byte_level, sentencepiece

from mutirao.inference.text.text_stream import Detokenizer, until_stop
from mutirao.inference.text.tokenizer import Tokenizer
from mutirao.inference.text.tokenizer_files import write_tokenizer

KINDS = ("bytes", "pieces")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    found = {}
    for kind, metadata in zip(KINDS, (byte_level(), sentencepiece()), strict=True):
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(folder / "model.gguf", folder, metadata)
        found[kind] = Tokenizer.open(folder)
    return found


def stream(detokenizer, ids):
    return [detokenizer.push([index]) for index in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_join_to_the_text(opened, kind):
    tokenizer = opened[kind]
    for text in EDGES:
        ids = tokenizer.encode(text, special=False)
        pieces = stream(Detokenizer(tokenizer), ids)
        assert "".join(pieces) == tokenizer.decode(ids), text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces), text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_tokens_in_any_portions(opened, kind, data):
    tokenizer = opened[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=5).map(sorted))
    detokenizer = Detokenizer(tokenizer)
    bounds = [0, *cuts, len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    assert "".join([*pieces, detokenizer.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_held_and_shown_at_the_end(opened, kind):
    tokenizer = opened[kind]
    ids = tokenizer.encode("a🦜", special=False)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"
    whole = Detokenizer(tokenizer)
    assert [whole.push(ids[:-1]), whole.push(ids[-1:])] == ["a", "🦜"]


def test_the_first_space_depends_on_what_goes_before(opened):
    tokenizer = opened["pieces"]
    ids = tokenizer.encode("fever", special=False)
    prompt_ids = tokenizer.encode("The")
    assert "".join(stream(Detokenizer(tokenizer), ids)) == "fever"
    assert "".join(stream(Detokenizer(tokenizer, prompt_ids), ids)) == " fever"
    assert "".join(stream(Detokenizer(tokenizer, [*prompt_ids, 2]), ids)) == "fever"
    together = tokenizer.decode([*prompt_ids, *ids])
    assert together == "The" + "".join(stream(Detokenizer(tokenizer, prompt_ids), ids))
    # Only one space is the tokenizer's own.
    ids = tokenizer.encode("  fever", special=False)
    assert "".join(stream(Detokenizer(tokenizer), ids)) == "  fever"


def test_control_tokens_are_shown_only_if_asked_for(opened):
    tokenizer = opened["bytes"]
    ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(stream(Detokenizer(tokenizer), ids)) == "ab"
    assert "".join(stream(Detokenizer(tokenizer, skip_special=False), ids)) == "a<|im_end|>b"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["ab", "cd", "ef"], ["de"], "abc"),
        (["ab", "cd", "ef"], ["dx"], "abcdef"),
        (["a", "b", "c"], ["abc"], ""),
        (["aab"], ["ab", "b"], "a"),
        (["ab"], [""], "ab"),
        (["x", "\n", "\n", "y"], ["\n\n"], "x"),
        (["abc"], ["abc", "b"], "a"),
        ([], ["a"], ""),
        (["aaab"], ["aab"], "a"),
        (["😀😁"], ["😁"], "😀"),
    ],
)
def test_a_stop_may_come_in_pieces(pieces, stop, expected):
    assert "".join(until_stop(iter(pieces), stop)) == expected


def test_what_cannot_begin_a_stop_is_not_held():
    pieces = until_stop(iter(["abc", "xS", "T", "Ox", "STOP", "never"]), ["STOP"])
    assert list(pieces) == ["abc", "x", "STOx"]


def test_nothing_is_read_after_a_stop():
    def source():
        yield "a."
        raise AssertionError("read on")

    assert list(until_stop(source(), ["."])) == ["a"]


def test_the_text_does_not_depend_on_how_pieces_fall():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(12))
        stop = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(2)]
        cuts = sorted(rng.randrange(13) for _ in range(3))
        bounds = [0, *cuts, 12]
        portions = [text[a:b] for a, b in itertools.pairwise(bounds)]
        assert "".join(until_stop(portions, stop)) == "".join(until_stop(list(text), stop))
