"""Compile the C library with whatever C compiler there is.

Needs the standard library only: the package's build runs this file before the package exists.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COMMON_FLAGS = ("-std=c11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
SOURCES: dict[str, tuple[str, ...]] = {
    "engine.c": ("-O2",),
    "stream.c": ("-O2",),
    "uring.c": ("-O2",),
    "pool.c": ("-O2",),
    "weights.c": ("-O3",),
    "probe.c": ("-O2",),
    "kernels_scalar.c": ("-O2",),
}
X86_SOURCES: dict[str, tuple[str, ...]] = {
    "kernels_avx2.c": ("-O2", "-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512.c": (
        *("-O2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
        *("-mfma", "-mf16c"),
    ),
}
COMPILE_TIMEOUT_S = 600


class CompileError(Exception):
    """There is no compiler, or it failed; its words are in the message."""


def sources() -> dict[str, tuple[str, ...]]:
    """Return the C files for this machine and the flags of each."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return SOURCES | X86_SOURCES if is_x86 else dict(SOURCES)


def source_hash() -> str:
    """Return a hash of the C files and flags; a library built from others is not used."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, sources())).encode())
    for path in sorted((*HERE.glob("*.c"), *HERE.glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name() -> str:
    """Return the file name of the library that the C files as they are compile to."""
    return f"kernels-{source_hash()}.so"


def platform_tag() -> str:
    """Return this platform as wheel names have it, such as 'linux_x86_64'."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compile_library(path: Path) -> None:
    """Compile the library to a path; needs ``cc`` (or what CC names).

    Raises:
        CompileError: there is no compiler, or it failed; its words are in the message.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CompileError("there is no C compiler (expected cc, or what CC names)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for name, flags in sources().items():
            objects.append(f"{folder}/{name}.o")
            _run([compiler, *COMMON_FLAGS, *flags, "-c", str(HERE / name), "-o", objects[-1]])
        built = f"{folder}/library"
        _run([compiler, "-shared", "-pthread", *objects, "-o", built, "-lm"])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        raise CompileError(
            f"the C compiler failed: {said[0] if said else error}; see `{command[0]} --version`"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"the C compiler failed: {error}") from None
