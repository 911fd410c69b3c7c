"""The server over a real socket on loopback, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from fake_engine import FakeEngine

from mutirao.errors import MissingKernelError
from mutirao.inference.engine import Engine
from mutirao.serve import app as app_module
from mutirao.serve.server import Server, listen

KEY = "a-key-for-tests-only"
MESSAGES = [{"role": "user", "content": "one two three"}]


class Served:
    """A running server and a client of it."""

    def __init__(self, engine, port):
        self.engine, self.port = engine, port
        self.clients = []
        self.client = self.with_key(KEY)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for client in self.clients:
            client.close()

    def with_key(self, key):
        client = openai.OpenAI(
            api_key=key, base_url=f"http://127.0.0.1:{self.port}/v1", max_retries=0, timeout=20
        )
        self.clients.append(client)
        return client

    def chat(self, text="one two three", **settings):
        return self.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], **settings
        )

    def raw(self, method="POST", path="/v1/chat/completions", body=b"", key=KEY, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, {"Authorization": f"Bearer {key}", **dict(headers)})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, json.loads(content) if content else None, reply.headers

    def socket(self, body):
        """Send a request and leave its reply unread."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + KEY.encode()
            + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        return connection


@contextmanager
def serving(engine, model="tiny", **settings):
    before = threading.active_count()
    listener = listen("127.0.0.1", 0)
    server = Server(engine, listener, model=model, api_key=KEY, **settings)
    started = threading.Event()
    thread = threading.Thread(target=server.run, args=(started.set,))
    thread.start()
    assert started.wait(20)
    with Served(engine, listener.getsockname()[1]) as served:
        served.stop = server.stop
        try:
            yield served
        finally:
            server.stop()
            if engine.gate is not None:
                engine.gate.release(1000)
            thread.join(20)
    assert not thread.is_alive()
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def served():
    with serving(FakeEngine()) as served:
        yield served


@pytest.fixture
def gated():
    with serving(FakeEngine(gate=threading.Semaphore(0)), max_waiting=2) as served:
        yield served


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_chat(served):
    reply = served.chat(temperature=0.5, top_p=0.9, seed=3, stop=["thr"])
    assert reply.object == "chat.completion"
    assert reply.model == "tiny"
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "one two "
    assert choice.finish_reason == "stop"
    assert reply.usage.prompt_tokens == 3
    assert reply.usage.completion_tokens == 3
    assert reply.usage.total_tokens == 6
    asked = served.engine.asked[-1]
    assert asked["prompt"] == [{"role": "user", "content": "one two three"}]
    assert asked["temperature"] == 0.5
    assert asked["top_p"] == 0.9
    assert asked["seed"] == 3
    assert asked["stop"] == ("thr",)
    assert asked["max_new_tokens"] == served.engine.context - 3


def test_streamed_chat(served):
    stream = served.chat(stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [delta for delta in deltas if delta] == ["one", " two", " three"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-1].choices == []


def test_a_stream_says_nothing_of_usage_unless_asked(served):
    assert all(chunk.usage is None for chunk in served.chat(stream=True))


def test_completion(served):
    reply = served.client.completions.create(model="tiny", prompt="a b c", max_tokens=2)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == "a b"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2
    assert served.engine.asked[-1]["prompt"] == "a b c"
    chunks = list(served.client.completions.create(model="tiny", prompt="a é 😀", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a é 😀"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert served.engine.asked[-1]["max_new_tokens"] == 16


def test_another_seed_each_time_where_none_is_given(served):
    for _ in range(2):
        served.chat()
    first, second = (asked["seed"] for asked in served.engine.asked[-2:])
    assert first != second


def test_models(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "mutirao"
    with pytest.raises(openai.NotFoundError, match="'huge' is not served here"):
        served.client.models.retrieve("huge")


def test_a_key_is_needed_on_every_route(served):
    num_asked = len(served.engine.asked)
    for key in ("another-key-for-tests", KEY[:-1], KEY + "x", "x"):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            served.with_key(key).chat.completions.create(model="tiny", messages=MESSAGES)
        with pytest.raises(openai.AuthenticationError):
            list(served.with_key(key).models.list())
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        for path in ("/", "/v1/models", "/v1/models/tiny", "/v1/completions", "/docs", "/x"):
            status, body, headers = served.raw(method, path, key="é")
            assert status == 401
            assert headers["WWW-Authenticate"] == "Bearer"
            if method != "HEAD":
                assert body["error"]["code"] == "invalid_api_key"
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 401
    connection.close()
    assert len(served.engine.asked) == num_asked


def test_a_key_may_come_with_any_spelling_of_bearer(served):
    for value in (f"bearer {KEY}", f"BEARER  {KEY} "):
        status, _, _ = served.raw("GET", "/v1/models", headers={"Authorization": value})
        assert status == 200


def test_unknown_routes_and_methods(served):
    status, body, _ = served.raw("GET", "/v2/else")
    assert (status, body["error"]["code"]) == (404, "unknown_url")
    status, body, headers = served.raw("GET", "/v1/chat/completions")
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    assert headers["Allow"] == "POST"


@pytest.mark.parametrize(
    ("settings", "error", "message", "code", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "expected 'tiny'", "model_not_found", "model"),
        (
            {"messages": [{"role": "user", "content": "word " * 40}]},
            openai.BadRequestError,
            "40 tokens, too long for a context of 32",
            "context_length_exceeded",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": " "}]},
            openai.BadRequestError,
            "prompt is empty",
            "invalid_prompt",
            None,
        ),
        (
            {"temperature": 3},
            openai.BadRequestError,
            "temperature = 3 is not accepted",
            "invalid_value",
            "temperature",
        ),
        (
            {"n": 2},
            openai.BadRequestError,
            "n = 2 is not supported",
            "unsupported_parameter",
            "n",
        ),
        (
            {"extra_body": {"top_kk": 2}},
            openai.BadRequestError,
            "top_kk is not known",
            "unknown_parameter",
            "top_kk",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(served, settings, error, message, code, param, stream):
    with pytest.raises(error, match=message) as caught:
        served.client.chat.completions.create(
            **{"model": "tiny", "messages": MESSAGES, "stream": stream, **settings}
        )
    assert caught.value.code == code
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_model_that_takes_no_messages():
    with serving(FakeEngine(has_chat_template=False)) as served:
        with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
            served.chat()
        reply = served.client.completions.create(model="tiny", prompt="a b")
        assert reply.choices[0].text == "a b"


def test_too_large_a_request(served):
    limit = app_module.MIN_REQUEST_BYTES
    status, body, _ = served.raw(body=b" " * (limit + 1))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    status, body, _ = served.raw(body=b" " * limit)
    assert (status, body["error"]["code"]) == (400, "invalid_json")


def test_a_request_that_never_comes(served, monkeypatch):
    monkeypatch.setattr(app_module, "BODY_TIMEOUT_S", 0.2)
    status, body, _ = served.raw(headers={"Content-Length": "100"})
    assert (status, body["error"]["code"]) == (408, "request_timeout")


def test_failures_while_generating(served, caplog):
    with pytest.raises(openai.InternalServerError, match="disk could not be read") as caught:
        served.chat("a BREAK")
    assert caught.value.code == "generation_failed"
    with caplog.at_level(logging.ERROR), pytest.raises(openai.InternalServerError) as caught:
        served.chat("secretword CRASH")
    assert "private details" not in str(caught.value)
    assert "private details" in caplog.text
    assert "secretword" not in caplog.text
    stream = served.chat("a BREAK", stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
    with pytest.raises(openai.APIError, match="disk could not be read"):
        next(stream)
    assert served.chat("still here").choices[0].message.content == "still here"


def test_pieces_come_while_they_are_generated(gated):
    stream = gated.chat("a b c", stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    for expected in ("a", " b", " c"):
        gated.engine.gate.release()
        assert next(stream).choices[0].delta.content == expected
    assert next(stream).choices[0].finish_reason == "stop"


@pytest.mark.alone
def test_a_client_that_leaves_a_stream_stops_it(gated):
    stream = gated.chat("a b c d e f g h", stream=True)
    gated.engine.gate.release()
    next(stream), next(stream)
    stream.close()
    time.sleep(0.2)
    gated.engine.gate.release()
    assert gated.engine.ended.wait(20)
    assert gated.engine.num_generated <= 2


@pytest.mark.alone
def test_a_client_that_leaves_an_answer_stops_it(gated):
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a b c d e"}]})
    connection = gated.socket(body.encode())
    wait_for(lambda: gated.engine.num_running)
    connection.close()
    time.sleep(0.2)
    gated.engine.gate.release()
    assert gated.engine.ended.wait(20)
    assert gated.engine.num_generated == 1


@pytest.mark.alone
def test_one_at_a_time_in_order_and_one_too_many_is_refused(gated):
    replies = {}

    def ask(number):
        replies[number] = gated.chat(f"number {number}").choices[0].message.content

    threads = []
    for number in range(3):  # one is answered, two may wait
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        if number == 0:
            wait_for(lambda: gated.engine.num_running)
        time.sleep(0.2)
    with pytest.raises(openai.InternalServerError, match="at most 2 may wait") as caught:
        gated.chat("one too many")
    assert caught.value.status_code == 503
    assert caught.value.code == "server_busy"
    assert caught.value.response.headers["retry-after"] == "5"
    gated.engine.gate.release(100)
    for thread in threads:
        thread.join(20)
    assert replies == {number: f"number {number}" for number in range(3)}
    assert [asked["prompt"][0]["content"] for asked in gated.engine.asked] == [
        f"number {number}" for number in range(3)
    ]


@pytest.mark.alone
def test_who_leaves_the_line_gives_up_the_place(gated):
    first = gated.chat("first here", stream=True)
    next(first)
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "gone"}]})
    for _ in range(2):
        gated.socket(body.encode()).close()
    time.sleep(0.3)
    done = []
    threads = [threading.Thread(target=lambda: done.append(gated.chat("stays"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    gated.engine.gate.release(100)
    for thread in threads:
        thread.join(20)
    assert len(done) == 2
    prompts = [asked["prompt"][0]["content"] for asked in gated.engine.asked]
    assert prompts == ["first here", "stays", "stays"]
    first.close()


def test_a_silent_stream_is_kept_alive(gated, monkeypatch):
    monkeypatch.setattr(app_module, "KEEP_ALIVE_S", 0.1)
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": True})
    connection = gated.socket(body.encode())
    received = b""
    while received.count(b": still here\n\n") < 3:
        received += connection.recv(4096)
    gated.engine.gate.release(100)
    while b"[DONE]" not in received:
        received += connection.recv(4096)
    connection.close()
    assert b'"content": " two"' in received


def test_stopping_ends_what_is_generated():
    engine = FakeEngine(gate=threading.Semaphore(0))
    with serving(engine) as served:
        stream = served.chat("a b c", stream=True)
        next(stream)
        served.stop()
        with pytest.raises(openai.APIError, match="server is ending"):
            list(stream)
    assert engine.num_generated <= 1


def test_the_page_s_programs_run_as_printed():
    page = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 2
    with serving(FakeEngine(), model="model") as served:
        for program, expected in zip(
            programs, ("What is fever?\n", "The patient was stop 7\n"), strict=True
        ):
            url = f"http://127.0.0.1:{served.port}/v1"
            process = start(sys.executable, "-c", program, OPENAI_BASE_URL=url, OPENAI_API_KEY=KEY)
            output, errors = process.communicate(timeout=60)
            assert (output, errors) == (expected, "")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from fake_engine import FakeEngine
from mutirao.serve.server import Server, listen
listener = listen("127.0.0.1", 0)
server = Server(FakeEngine(), listener, model="tiny", api_key={key!r})
try:
    server.run(lambda: print(listener.getsockname()[1], flush=True))
except KeyboardInterrupt:
    print("interrupted")
"""


def start(*command, **environment):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_an_interrupt_ends_the_server():
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), key=KEY)
    process = start(sys.executable, "-c", script)
    with Served(FakeEngine(), int(process.stdout.readline())) as served:
        assert served.chat("a b").choices[0].message.content == "a b"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert output == "interrupted\n"
    assert errors == ""


def test_the_command_serves_the_engine(tiny_model_directory, tmp_path, monkeypatch):
    """The whole of it: the command, the engine, OpenAI's client."""
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    try:
        engine = Engine.open(tiny_model_directory)
    except MissingKernelError as error:
        pytest.skip(f"{error}")
    with engine:
        expected = engine.generate("The patient was", max_new_tokens=8).text
        answer = engine.generate(MESSAGES, max_new_tokens=8)
    mutirao = str(Path(sys.executable).parent / "mutirao")
    process = start(
        mutirao, "serve", str(tiny_model_directory), "--port", "0", "--name", "tiny",
        MUTIRAO_API_KEY="", COLUMNS="200",
    )  # fmt: skip
    try:
        told = ""
        while "serving at" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", told)[1])
        key = re.search(r"API key, made for this run and not kept: (\S{43})\n", told)[1]
        with Served(FakeEngine(), port) as served:
            served.client = served.with_key(key)
            reply = served.client.completions.create(
                model="tiny", prompt="The patient was", max_tokens=8, temperature=0
            )
            assert reply.choices[0].text == expected
            settings = {"temperature": 0, "max_tokens": 8}
            chunks = list(served.chat(MESSAGES[0]["content"], stream=True, **settings))
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.text
            assert served.chat(**settings).usage.completion_tokens == answer.num_tokens
            with pytest.raises(openai.BadRequestError, match="too long for a context of 128"):
                served.chat("fever " * 200)
    finally:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
