"""The key and the socket; requests over it are in tests/integration/test_serve.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing

from mutirao.cli.app import app
from mutirao.errors import FormatError, InputError, PortInUseError
from mutirao.serve.server import KEY_VARIABLE, find_key, listen

KEY = "sixteen-letters-"


def test_a_key_is_made_up_each_time(monkeypatch):
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv(KEY_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(KEY_VARIABLE, value)
        (first, is_new), (second, _) = find_key(), find_key()
        assert is_new
        assert first != second
        assert len(first) == 43  # 256 bits


def test_a_key_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    assert find_key() == (KEY, False)
    path = tmp_path / "key"
    path.write_text("from-the-file-1234\n")
    assert find_key(path) == ("from-the-file-1234", False)


@pytest.mark.parametrize("key", ["short", KEY[:-1], "with a space in it", "não é ASCII, não é"])
def test_keys_that_are_refused(monkeypatch, tmp_path, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(InputError, match="at least 16 ASCII characters") as caught:
        find_key()
    assert key not in str(caught.value)
    path = tmp_path / "key"
    path.write_text(key)
    with pytest.raises(InputError, match=str(path)):
        find_key(path)


def test_key_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff" * 20)
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(InputError, match="cannot be read"):
            find_key(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.9.10"])
def test_loopback(host):
    with listen(host, 0) as listener:
        assert listener.getsockname()[0].startswith("127.")
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_other_machines_are_kept_out(host):
    with pytest.raises(InputError, match=r"reached by other machines.*--allow-remote"):
        listen(host, 0)


def test_other_machines_are_let_in_when_asked():
    with listen("0.0.0.0", 0, allow_remote=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_bad_addresses_and_ports():
    with pytest.raises(InputError, match="expected an IP address"):
        listen("example.org", 0)
    with pytest.raises(InputError, match="cannot be listened on"):
        listen("127.0.0.1", 70000)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} is taken"):
            listen("127.0.0.1", port)


def serve(*arguments):
    result = typer.testing.CliRunner().invoke(app, ["serve", *arguments], standalone_mode=False)
    return result.exception


def test_the_command_refuses_before_it_opens_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    model = str(tmp_path)
    assert isinstance(error := serve(model, "--host", "0.0.0.0"), InputError)
    assert "--allow-remote" in str(error)
    assert isinstance(error := serve(model, "--speculation", "maybe", "--port", "0"), InputError)
    assert "expected auto, on or off" in str(error)
    assert isinstance(serve(model, "--key-file", str(tmp_path / "none")), InputError)
    assert isinstance(serve(model, "--port", "0"), FormatError)


def test_too_little_memory_says_what_the_server_takes(monkeypatch, tiny_model_directory):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr("mutirao.inference.engine.Engine.open", refuse)
    error = serve(str(tiny_model_directory), "--memory", "5MB", "--port", "0")
    assert (
        str(error) == "memory=0 MB is too small (the server itself takes 12 MB of --memory besides)"
    )


def refuse(path, *, memory, **settings):
    raise InputError(f"memory={memory / 1e6:.0f} MB is too small")


def test_help_loads_no_server():
    code = (
        "import sys, mutirao.cli.app; print('starlette' in sys.modules, 'uvicorn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    mutirao = str(Path(sys.executable).parent / "mutirao")
    done = subprocess.run(
        [mutirao, "serve", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "--key-file" in done.stdout
