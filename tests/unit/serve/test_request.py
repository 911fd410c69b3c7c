"""What is read from a request, and what is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.serve.reply import ApiError
from mutirao.serve.request import TextRequest, read_chat, read_completion

MESSAGES = [{"role": "user", "content": "fever?"}]


def chat(**fields):
    return read_chat(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode())


def completion(**fields):
    return read_completion(json.dumps({"model": "m", "prompt": "fever"} | fields).encode())


def test_defaults_are_those_of_openai():
    assert chat() == TextRequest(
        model="m",
        prompt=MESSAGES,
        max_new_tokens=None,
        temperature=1.0,
        top_p=1.0,
        seed=None,
        stop=(),
        stream=False,
        include_usage=False,
    )
    assert completion().max_new_tokens == 16
    assert completion().prompt == "fever"
    assert not completion().is_chat
    assert chat().is_chat


def test_everything_given():
    asked = chat(
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        seed=-3,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (asked.max_new_tokens, asked.temperature, asked.top_p, asked.seed) == (5, 0.0, 0.5, -3)
    assert asked.stop == ("a", "b")
    assert asked.stream
    assert asked.include_usage
    assert chat(max_tokens=7).max_new_tokens == 7
    assert chat(max_tokens=7, max_completion_tokens=7).max_new_tokens == 7
    assert chat(stop="x").stop == ("x",)
    assert completion(prompt=["only one"]).prompt == "only one"


def test_messages_in_other_spellings():
    asked = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ]
    )
    assert asked.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"logprobs": False, "top_logprobs": None, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "user": "ana", "metadata": {"a": "b"}},
        {"temperature": None, "top_p": None, "stop": None, "seed": None, "stream": None},
        {"service_tier": "auto", "store": False, "modalities": ["text"]},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": None}, "model", "model is missing"),
        ({"model": 3}, "model", "model is missing"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "at least one message"),
        ({"messages": ["hi"]}, "messages[0]", "expected"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "= null is not supported"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", '= "tool" is not'),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "is not"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "no text",
        ),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": "x", "name": "ana"}]},
            "messages[1].name",
            "not supported",
        ),
        ({"temperature": -0.1}, "temperature", "-0.1 is not accepted (expected 0 to 2)"),
        ({"temperature": 2.1}, "temperature", "expected 0 to 2"),
        ({"temperature": True}, "temperature", "= true is not"),
        ({"temperature": "1"}, "temperature", '= "1" is not'),
        ({"top_p": 0}, "top_p", "expected above 0, to 1"),
        ({"top_p": 1.5}, "top_p", "expected above 0, to 1"),
        ({"max_tokens": 0}, "max_tokens", "expected a whole number >= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "expected a whole number >= 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "give one of them"),
        ({"seed": "x"}, "seed", "expected a whole number"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
        ({"stop": [""]}, "stop", "up to 4 texts"),
        ({"stop": ["x" * 1001]}, "stop", "up to 4 texts"),
        ({"stop": 3}, "stop", "up to 4 texts"),
        ({"stream": "yes"}, "stream", "expected true or false"),
        ({"stream_options": {"x": 1}}, "stream_options", "include_usage"),
        ({"n": 2}, "n", "n = 2 is not supported"),
        ({"n": True}, "n", "n = true is not supported"),
        ({"logprobs": True}, "logprobs", "= true is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "= 0.5 is not supported"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"temperatur": 1}, "temperatur", "temperatur is not known"),
        ({"x" * 500: 1}, "x" * 100, "... is not known"),
    ],
)
def test_what_is_refused(fields, param, message):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert message in str(caught.value)
    assert caught.value.param == param
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [None, 3, [], ["a", "b"], [1, 2], [[1]], {"a": 1}])
def test_prompts_that_are_not_one_text(prompt):
    with pytest.raises(ApiError, match="expected one text"):
        completion(prompt=prompt)


def test_each_route_has_its_own_fields():
    with pytest.raises(ApiError, match="messages is not known"):
        completion(messages=MESSAGES)
    with pytest.raises(ApiError, match="prompt is not known"):
        chat(prompt="x")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"model": NaN}', b'{"seed": Infinity}', b"[" * 100000,
    ],
)  # fmt: skip
def test_what_is_no_json_object(body):
    for read in (read_chat, read_completion):
        with pytest.raises(ApiError) as caught:
            read(body)
        assert caught.value.code == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = ("model", "messages", "stop", "temperature", "n", "seed", "stream_options", "max_tokens")


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_refused(fields):
    for read in (chat, completion):
        try:
            got = read(**fields)
        except ApiError as error:
            got = error
        assert isinstance(got, TextRequest) or (got.status == 400 and len(str(got)) < 500)


def test_an_error_says_whose_fault_it_is():
    assert ApiError(503, "busy").body()["error"]["type"] == "server_error"
    assert ApiError(404, "none").body()["error"]["type"] == "invalid_request_error"
