"""A site's identity: one Ed25519 key pair (RFC 8032), in PEM files in the site's own folder.

The private key signs the site's audit log and never leaves the site; the public key goes to
whoever checks the log. In records and policies a public key is its 32 bytes in hexadecimal.
The private key lies in its file unencrypted, readable by its owner alone. A key is never
written over. Not here yet: keys in hardware, replacing a key, the keys of Flower's nodes.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from mutirao.artifact import write_atomic
from mutirao.errors import InputError, explain_disk_errors

PRIVATE_NAME = "site-key.pem"
PUBLIC_NAME = "site-key.public.pem"
_PUBLIC_HEX = re.compile(r"[0-9a-f]{64}")
_READABLE_BY_OTHERS = 0o077


def make_identity(folder: Path) -> Ed25519PrivateKey:
    """Make a key pair in a folder, which is made if need be.

    Raises:
        InputError: the folder already has a key; nothing was changed.
        DiskFullError: no room.
    """
    with _locked(folder):
        for name in (PRIVATE_NAME, PUBLIC_NAME):
            if os.path.lexists(folder / name):
                raise InputError(
                    f"{folder / name} exists, and a key is never written over; name another "
                    "folder, or go on with that key"
                )
        return _write_pair(folder)


def open_identity(folder: Path) -> Ed25519PrivateKey:
    """Return the key of a folder, made there on first use.

    Raises:
        InputError: the key's file is damaged or readable by others, or only the public key is
            left.
        DiskFullError: no room.
    """
    with _locked(folder):
        if (folder / PRIVATE_NAME).exists():
            key = load_private_key(folder / PRIVATE_NAME)
            if not (folder / PUBLIC_NAME).exists():  # a process died between the two files
                _write_public(folder, key)
            return key
        if (folder / PUBLIC_NAME).exists():
            raise InputError(
                f"{folder} has lost its private key, {PRIVATE_NAME}; restore it, for what an "
                "earlier key signed can be continued by that key only"
            )
        return _write_pair(folder)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        InputError: the file is missing, readable by others, or not such a key.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"the key {path} cannot be read: {error.strerror}") from None
    if mode & _READABLE_BY_OTHERS:
        raise InputError(
            f"the private key {path} can be read by others (mode {mode & 0o777:04o}); if nobody "
            f"has: chmod 600 {path}"
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 private key in PEM, without a passphrase")
    return key


def parse_public_key(text: str) -> Ed25519PublicKey:
    """Return the public key that a text names: 64 hexadecimal digits, or a PEM file.

    Raises:
        InputError: it names no such key.
    """
    if _PUBLIC_HEX.fullmatch(text):
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    try:
        content = Path(text).read_bytes()
    except (OSError, ValueError):
        raise InputError(
            f"{text!r} is not a public key (expected 64 hexadecimal digits, or a PEM file)"
        ) from None
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        hint = "; give the public key, not the private one" if b"PRIVATE" in content else ""
        raise InputError(f"{text} is not an Ed25519 public key in PEM{hint}")
    return key


def public_hex(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """Return the public key's 32 bytes in hexadecimal."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes_raw().hex()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from making a key in the same folder at the same time."""
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
            os.fsync(descriptor)  # the names of new files, too, outlive a loss of power
        finally:
            os.close(descriptor)


def _write_pair(folder: Path) -> Ed25519PrivateKey:
    """Write both files, the private one first: the public one can be made from it again."""
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    partial = folder / f".{PRIVATE_NAME}.{secrets.token_hex(4)}.partial"
    try:
        # Never readable by others, not even for a moment.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / PRIVATE_NAME)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _write_public(folder, key)
    return key


def _write_public(folder: Path, key: Ed25519PrivateKey) -> None:
    content = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomic(folder / PUBLIC_NAME, content)
