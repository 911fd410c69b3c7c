from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from mutirao.errors import InputError
from mutirao.inference.conversation import Chat
from mutirao.inference.generate import TextGenerator

PROMPT = "The patient was"
MESSAGES = [{"role": "user", "content": "fever?"}]


@pytest.fixture(scope="module")
def generator(tiny_model_directory):
    return TextGenerator.open(tiny_model_directory, dtype="float32")


def _threads():
    return [t for t in threading.enumerate() if t.name == "mutirao-generate"]


def test_greedy_text_agrees_with_a_loop_over_full_logits(generator):
    ids = generator.model.encode(PROMPT)
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + 12:
            ids.append(int(generator.model.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == generator.model.eos_id:
                break
    expected = generator.model.tokenizer.decode(ids[start:], skip_special_tokens=True)
    result = generator.generate(PROMPT, max_new_tokens=12)
    assert result.text == expected
    assert result.num_tokens == len(ids) - start
    assert 0 < result.time_to_first_token_s <= result.seconds
    assert result.tokens_per_s > 0
    assert json.loads(result.to_json())["text"] == expected


def test_pieces_join_to_the_text(generator):
    pieces = list(generator.stream(PROMPT, max_new_tokens=10))
    assert "".join(pieces) == generator.generate(PROMPT, max_new_tokens=10).text
    assert len(pieces) > 1
    assert not _threads()


def test_drawing_follows_the_seed_and_leaves_the_random_state(generator):
    before = torch.random.get_rng_state()
    settings = {"max_new_tokens": 16, "temperature": 1.5}
    one = generator.generate(PROMPT, seed=1, **settings).text
    assert generator.generate(PROMPT, seed=1, **settings).text == one
    assert generator.generate(PROMPT, seed=2, **settings).text != one
    assert torch.equal(torch.random.get_rng_state(), before)


def test_messages_go_through_the_chat_template(generator):
    prompt = "<|im_start|>user\nfever?<|im_end|>\n<|im_start|>assistant\n"
    assert generator._encode_prompt(MESSAGES) == generator.model.encode(prompt)


def test_text_ends_before_a_stop(generator):
    whole = generator.generate(PROMPT, max_new_tokens=20).text
    stop = whole[4:7]
    assert generator.generate(PROMPT, max_new_tokens=20, stop=[stop]).text == whole.split(stop)[0]
    assert not _threads()


def test_closing_stops_generation(generator):
    calls = []
    original = generator.model.model.forward

    def slow(*arguments, **settings):
        calls.append(1)
        time.sleep(0.02)
        return original(*arguments, **settings)

    generator.model.model.forward = slow
    try:
        with generator.stream(PROMPT, max_new_tokens=100) as stream:
            next(stream)
        num_calls = len(calls)
        assert not _threads()
        time.sleep(0.1)
        assert len(calls) == num_calls < 90
    finally:
        generator.model.model.forward = original


def test_an_error_in_the_thread_surfaces(generator):
    original = generator.model.model.forward

    def fail(*arguments, **settings):
        raise RuntimeError("out of memory, say")

    generator.model.model.forward = fail
    try:
        with pytest.raises(RuntimeError, match="out of memory, say"):
            list(generator.stream(PROMPT))
        with pytest.raises(RuntimeError, match="out of memory, say"):
            generator.generate(PROMPT)
    finally:
        generator.model.model.forward = original
    assert not _threads()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt is empty"),
        ("fever " * 100, {}, "at most 127"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_bad_requests_are_refused(generator, prompt, settings, message):
    with pytest.raises(InputError, match=message):
        generator.generate(prompt, **settings)


def test_text_ends_with_the_context(generator):
    prompt_tokens = len(generator.model.encode("fever " * 30))
    result = generator.generate("fever " * 30, max_new_tokens=1000)
    assert result.num_tokens <= 128 - prompt_tokens


def test_a_model_without_template_takes_no_messages(tiny_model_directory):
    generator = TextGenerator.open(tiny_model_directory)
    generator.model.tokenizer.chat_template = None
    assert not generator.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        generator.generate(MESSAGES)


def test_chat_remembers_its_turns(generator):
    chat = Chat(generator, system="Be brief.")
    answer = "".join(chat.say("fever?", max_new_tokens=5))
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "fever?"},
        {"role": "assistant", "content": answer},
    ]
    with pytest.raises(InputError, match="too long"):
        list(chat.say("cough " * 100))
    assert len(chat.messages) == 3
