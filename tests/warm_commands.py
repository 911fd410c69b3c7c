"""A ``mutirao`` that has loaded PyTorch and transformers before it is asked.

Loading them takes most of a command's time with a tiny model. Here one process loads them, and
is forked for each command; ``mutirao`` itself, its arguments, environment, folder and streams
are those of whoever asks. For tests of what commands do, not of how they start: memory and
signals are not those of a command of its own. What commands start in turn starts as ever.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASK = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    socket.send_fds(asked, [b"+"], [0, 1, 2])
    words = [sys.argv, os.getcwd(), dict(os.environ)]
    asked.sendall(json.dumps(words).encode() + b"\\n")
    sys.exit(int(asked.recv(16) or 70))
"""


@contextmanager
def warm_commands() -> Iterator[Path]:
    """Yield a folder for PATH that holds the command, ``mutirao``."""
    with tempfile.TemporaryDirectory(prefix="warm-") as name:  # an address is short
        folder = Path(name)
        address = str(folder / "address")
        command = folder / "mutirao"
        command.write_text(ASK.format(python=sys.executable, address=address))
        command.chmod(0o755)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, __file__, address], **pipes) as server:
            assert server.stdout.readline() == b"ready\n"
            yield folder
            server.stdin.close()
        assert server.returncode == 0


def serve(address: str) -> None:
    """Answer until standard input ends."""
    from mutirao.environment import silence

    silence()
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    gc.collect()
    gc.freeze()  # a child that collects garbage need not copy all that is loaded
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            asked, _ = listener.accept()
            with asked:
                if os.fork() == 0:
                    listener.close()
                    keep(asked)
                    return


def keep(asked: socket.socket) -> None:
    """Run one command in a child, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, *_ = socket.recv_fds(asked, 1, 3)
    with asked.makefile("rb") as file:
        arguments, folder, environment = json.loads(file.readline())
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        asked.sendall(str(code if code >= 0 else 128 - code).encode())
        return
    asked.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    from mutirao.cli import main

    main()


if __name__ == "__main__":
    serve(sys.argv[1])
