"""llama.cpp: its own server, asked over a local connection, token by token.

Only the server is put under the memory limit (``limit_procs`` names the file that takes its
process id), so that the limit is all llama.cpp's. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from recorder import Recorder, read_task

START_LIMIT_S = 180.0


def main() -> None:
    task = read_task()
    options = task["options"]
    port = _free_port()
    server = subprocess.Popen(
        _command(task, port),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=lambda: _enter(options.get("limit_procs")),
    )
    try:
        _wait_until_ready(server, port)
        recorder = Recorder(task, server.pid)
        timings = []
        for prompt in task["prompts"]:
            stream = _Stream(port, prompt, task["max_tokens"])
            recorder.record(stream, stream.close)
            timings.append(stream.timings)
        version = subprocess.run(
            [options["server"], "--version"], capture_output=True, text=True, check=True
        )
        recorder.print(
            {"llama.cpp": options["version"], "built": version.stderr.splitlines()[-1]},
            timings=timings,
        )
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _command(task: dict[str, Any], port: int) -> list[str]:
    threads = str(task["threads"])
    return [
        *(task["options"]["server"], "--model", task["model"], "--offline"),
        *("--host", "127.0.0.1", "--port", str(port), "--parallel", "1", "--threads-http", "2"),
        *("--threads", threads, "--threads-batch", threads),
        *("--ctx-size", str(task["context_tokens"])),
        # Prompts kept for later would take memory that the weights need.
        *("--cache-ram", "0", "--ctx-checkpoints", "0", "--fit", "off"),
        *task["options"]["flags"],
    ]


class _Stream:
    """The tokens of one completion, as the server sends them."""

    def __init__(self, port: int, prompt: list[int], num_tokens: int) -> None:
        self.timings: dict[str, Any] = {}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._request = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,
            "timings_per_token": True,  # how many were drafted, how many accepted
        }

    def __iter__(self) -> Iterator[int]:
        body = json.dumps(self._request)
        self._connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama.cpp answered {response.status}: {response.read()!r}")
        for line in response:
            if line.startswith(b"data: "):
                event = json.loads(line[len(b"data: ") :])
                self.timings = event.get("timings", self.timings)
                if not event.get("stop"):
                    yield from event["tokens"]

    def close(self) -> None:
        """Hang up; the server stops at its next token."""
        self._connection.close()


def _enter(limit_procs: str | None) -> None:
    if limit_procs:
        with open(limit_procs, "w", encoding="ascii") as file:
            file.write(str(os.getpid()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"llama.cpp ended with {server.returncode} before it was ready")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    raise RuntimeError(f"llama.cpp was not ready after {START_LIMIT_S:.0f} s")


if __name__ == "__main__":
    main()
