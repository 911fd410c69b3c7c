"""Environments of other people's programs, each its own, made once and kept in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mutirao.artifact import write_atomic
from mutirao.errors import MutiraoError


class PeerError(MutiraoError):
    """A peer could not be installed or run here."""


def make_environment(place: Path, requirements: Sequence[str]) -> Path:
    """Make an environment unless it is there with the same requirements; return its Python.

    TORCH_INDEX in the environment names an index of torch builds to look in, too.

    Raises:
        PeerError: pip failed; its last words are in the message.
    """
    python, done = place / "bin" / "python", place / "installed.txt"
    wanted = "\n".join(requirements)
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    call([sys.executable, "-m", "venv", "--clear", str(place)])
    index = os.environ.get("TORCH_INDEX")
    extra = ["--extra-index-url", index] if index else []
    call([str(python), "-m", "pip", "install", "--quiet", *extra, *requirements])
    write_atomic(done, wanted)
    return python


def call(command: list[str]) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        PeerError: it failed; its last words are in the message.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()[-1500:]
        raise PeerError(f"{' '.join(command[:4])} … failed with {done.returncode}: {tail}")
    return done.stdout
