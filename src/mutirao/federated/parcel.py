"""What travels between coordinator and sites: a signed parcel of fields and payloads.

A parcel is a small JSON object (the fields) and named byte strings (the payloads: encoded
tensors, messages of secure aggregation). Its sender signs the hash of all of it with its
Ed25519 key, so that whoever carries it can neither change it nor put it into another round.
An answer names the hash of the request it answers.

Nothing in a parcel is executed, and nothing in it decides how much is read: sizes are checked
against what came. Knows nothing of the transport; ``flower.records`` puts parcels into Flower's
records, ``to_bytes`` into files and pipes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from mutirao.artifact import canonical_json
from mutirao.errors import UpdateError

PARCEL_VERSION = 1
COORDINATOR = "coordinator"
"""Name of the one sender that is no site."""
MAX_TEXT_BYTES = 4 * 1024 * 1024
"""Longest header; fields are settings and a handful of numbers."""
MAX_ROUND = 10**9 - 1
"""Larger numbers are no round; folders of rounds are named by them."""
_LABEL = b"mutirao parcel v1"
_LENGTH = struct.Struct("<Q")

Payload = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Parcel:
    """One request or answer."""

    kind: str
    """What it is; ``messages`` lists the kinds."""
    run: str
    """The run's id."""
    round: int
    """From 1; 0 for what belongs to no round."""
    sender: str
    """A site's name, or ``COORDINATOR``."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """JSON values by name."""
    payloads: Mapping[str, Payload] = field(default_factory=dict)
    """(bytes,) uint8 by name."""
    signature: str = ""
    """Of the sender, 128 hexadecimal digits; empty before it is signed."""

    @cached_property
    def text(self) -> bytes:
        """The header as it travels and is signed: all but payloads' bytes and signature."""
        sizes = {
            name: [int(payload.size), hashlib.sha256(payload.data).hexdigest()]
            for name, payload in sorted(self.payloads.items())
        }
        return canonical_json(
            {
                "version": PARCEL_VERSION,
                "kind": self.kind,
                "run": self.run,
                "round": self.round,
                "sender": self.sender,
                "fields": dict(self.fields),
                "payloads": sizes,
            }
        )

    @property
    def sha256(self) -> str:
        """Hash of all but the signature; payloads enter by their hashes."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of header, signature and payloads: what travels, without the transport's own."""
        return (
            len(self.text)
            + len(self.signature) // 2
            + sum(int(payload.size) for payload in self.payloads.values())
        )

    def signed(self, key: Ed25519PrivateKey) -> Parcel:
        """Return the same parcel with its sender's signature."""
        return replace(self, signature=key.sign(_LABEL + bytes.fromhex(self.sha256)).hex())

    def is_signed_by(self, public_key: str) -> bool:
        """Whether the owner of a key, 64 hexadecimal digits, signed it."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
            key.verify(bytes.fromhex(self.signature), _LABEL + bytes.fromhex(self.sha256))
        except (InvalidSignature, ValueError):
            return False
        return True

    def to_bytes(self) -> bytes:
        """Return the parcel in one piece: lengths, header, signature, payloads by name."""
        signature = bytes.fromhex(self.signature)
        parts = [_LENGTH.pack(len(self.text)), self.text, _LENGTH.pack(len(signature)), signature]
        parts += [self.payloads[name].tobytes() for name in sorted(self.payloads)]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Parcel:
        """Read a parcel; payloads are views of ``data``.

        Raises:
            UpdateError: it is malformed, cut, or its payloads are not those of its header.
        """
        view = memoryview(data)
        text, view = _take(view, MAX_TEXT_BYTES)
        signature, view = _take(view, 64)
        sizes = _read_header(bytes(text))["payloads"]
        payloads: dict[str, Payload] = {}
        for name, size in ((name, entry[0]) for name, entry in sorted(sizes.items())):
            if size > len(view):
                raise UpdateError("a parcel is cut: its payloads are shorter than it says")
            payloads[name], view = np.frombuffer(view[:size], np.uint8), view[size:]
        if len(view):
            raise UpdateError("a parcel has bytes after its end")
        return cls.from_parts(bytes(text), payloads, bytes(signature).hex())

    @classmethod
    def from_parts(
        cls, text: bytes, payloads: Mapping[str, NDArray[Any]], signature: str
    ) -> Parcel:
        """Put a parcel together from what a transport delivered.

        Raises:
            UpdateError: the header is malformed, or the payloads are not those it names.
        """
        header = _read_header(text)
        if header["payloads"].keys() != payloads.keys():
            raise UpdateError("a parcel has other payloads than its header names")
        for name, payload in payloads.items():
            if payload.dtype != np.uint8 or payload.ndim != 1:
                raise UpdateError(f"a parcel has a payload of type {payload.dtype}, not bytes")
            size, sha256 = header["payloads"][name]
            if payload.size != size or hashlib.sha256(payload.data).hexdigest() != sha256:
                raise UpdateError("a parcel has a payload that is not what its header says")
        parcel = cls(
            kind=header["kind"],
            run=header["run"],
            round=header["round"],
            sender=header["sender"],
            fields=header["fields"],
            payloads=dict(payloads),
            signature=signature,
        )
        try:
            is_accepted = parcel.text == text
        except (ValueError, RecursionError):  # half a character, or nested too deep to be written
            is_accepted = False
        if not is_accepted:
            raise UpdateError("a parcel's header is not in its one accepted form")
        return parcel


def _take(view: memoryview, most: int) -> tuple[memoryview, memoryview]:
    """Return a part that begins with its length, and the rest."""
    if len(view) < _LENGTH.size:
        raise UpdateError("a parcel is cut")
    (length,) = _LENGTH.unpack(view[: _LENGTH.size])
    rest = view[_LENGTH.size :]
    if length > most or length > len(rest):
        raise UpdateError("a parcel is cut, or one of its parts is too long")
    return rest[:length], rest[length:]


def _read_header(text: bytes) -> dict[str, Any]:
    """Return a header whose types are as they must be.

    Raises:
        UpdateError: it is not such a header.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise UpdateError(f"a parcel's header has {len(text)} bytes (at most {MAX_TEXT_BYTES})")
    try:
        header = json.loads(text)
        if header["version"] != PARCEL_VERSION:
            raise UpdateError(
                f"a parcel has version {str(header['version'])[:20]!r} (this version of Mutirão "
                f"reads {PARCEL_VERSION})"
            )
        is_sound = (
            all(isinstance(header[name], str) for name in ("kind", "run", "sender"))
            and type(header["round"]) is int
            and 0 <= header["round"] <= MAX_ROUND
            and isinstance(header["fields"], dict)
            and isinstance(header["payloads"], dict)
            and all(_is_size(entry) for entry in header["payloads"].values())
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise UpdateError("a parcel's header is malformed")
    return dict(header)


def _is_size(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) is int
        and entry[0] >= 0
        and isinstance(entry[1], str)
    )
