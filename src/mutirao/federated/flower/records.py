"""Parcels in Flower's records, and back.

A parcel is one RecordDict: a ConfigRecord with header and signature, and an ArrayRecord with
one Array of bytes for each payload, which Flower sends in chunks. What comes back is checked
for its shape before anything is made of it; whether it is what its header says, and who
signed it, ``parcel`` checks.

An Array names its chunks, and may name the same one a million times: 5 MB on the wire that
are 5 TB in memory. ``check_contents`` and ``bound_arrays`` count before they are put together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError

from mutirao.errors import UpdateError
from mutirao.federated.flower.connection import MAX_PARCEL_BYTES
from mutirao.federated.parcel import MAX_TEXT_BYTES, Parcel

PARCEL_RECORD = "parcel"
PAYLOADS_RECORD = "payloads"
MAX_PAYLOADS = 100_000
"""Tensors of a model, and more; an assumption."""
MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RecursionError,
    DecodeError,
    UnexpectedObjectContentError,
)
"""What Flower raises when it puts together what a hostile sender made."""
_STYPE = "mutirao.bytes"
_DTYPE = "uint8"
_SIGNATURE_BYTES = 64


def to_record(parcel: Parcel) -> RecordDict:
    """Return a signed parcel as Flower carries it."""
    header = {"text": parcel.text, "signature": bytes.fromhex(parcel.signature)}
    record = RecordDict({PARCEL_RECORD: ConfigRecord(header)})
    if parcel.payloads:
        arrays = {
            name: Array(_DTYPE, (int(payload.size),), _STYPE, payload.tobytes())
            for name, payload in sorted(parcel.payloads.items())
        }
        record[PAYLOADS_RECORD] = ArrayRecord(arrays)
    return record


def from_record(record: RecordDict, *, max_bytes: int = MAX_PARCEL_BYTES) -> Parcel:
    """Return the parcel in a record; its payloads are views of the record's bytes.

    Raises:
        UpdateError: the record is of another shape, too large, or not one sound parcel.
    """
    names = set(record)
    if PARCEL_RECORD not in names or not names <= {PARCEL_RECORD, PAYLOADS_RECORD}:
        raise UpdateError("a message holds other records than a parcel has")
    text, signature = _read_header(record[PARCEL_RECORD])
    payloads: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    if PAYLOADS_RECORD in names:
        payloads = _read_payloads(record[PAYLOADS_RECORD], max_bytes)
    return Parcel.from_parts(text, payloads, signature.hex())


def _read_header(header: Any) -> tuple[bytes, bytes]:
    if not isinstance(header, ConfigRecord) or set(header) != {"text", "signature"}:
        raise UpdateError("a message has no parcel header of the accepted form")
    text, signature = header["text"], header["signature"]
    if not isinstance(text, bytes) or not isinstance(signature, bytes):
        raise UpdateError("a parcel's header is not bytes")
    if len(text) > MAX_TEXT_BYTES or len(signature) > _SIGNATURE_BYTES:
        raise UpdateError("a parcel's header is too long")
    return text, signature


def _read_payloads(arrays: Any, max_bytes: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    if not isinstance(arrays, ArrayRecord) or len(arrays) > MAX_PAYLOADS:
        raise UpdateError("a message has payloads that are not arrays, or too many of them")
    payloads = {}
    total = 0
    for name, array in arrays.items():
        is_bytes = array.stype == _STYPE and array.dtype == _DTYPE
        if not is_bytes or tuple(array.shape) != (len(array.data),):
            raise UpdateError("a parcel has a payload that is not bytes")
        total += len(array.data)
        if total > max_bytes:
            raise UpdateError(f"a parcel is larger than {max_bytes} bytes, which is accepted")
        payloads[name] = np.frombuffer(array.data, np.uint8)
    return payloads


def put_together(
    object_id: str, contents: dict[str, bytes], *, max_bytes: int = MAX_PARCEL_BYTES
) -> RecordDict:
    """Return the content of a message whose objects have come; ``contents`` is used up.

    Raises:
        UpdateError: it is malformed, too large, or has no content.
    """
    check_contents(contents, max_bytes=max_bytes)
    try:
        whole = inflate_object_from_contents(object_id, contents)
    except MALFORMED:
        raise UpdateError("a message is malformed") from None
    if not isinstance(whole, Message) or not whole.has_content():
        raise UpdateError("a message has no content")
    return whole.content


def check_contents(contents: Mapping[str, bytes], *, max_bytes: int = MAX_PARCEL_BYTES) -> None:
    """Refuse objects as they came over the wire that would grow too large when put together.

    Args:
        contents: Flower's objects of one message, by their id.
        max_bytes: the most that all arrays together may be.

    Raises:
        UpdateError: they would, or one of them is malformed.
    """
    total = 0
    for content in contents.values():
        try:
            kind, children, _ = get_object_head_values_from_object_content(content)
            if kind == Array.__qualname__:
                total += _count_array(content, children, contents)
        except MALFORMED:
            raise UpdateError("a message holds a malformed object") from None
        if total > max_bytes:
            raise UpdateError(f"a message is larger than {max_bytes} bytes, which is accepted")


def _count_array(content: bytes, children: list[str], contents: Mapping[str, bytes]) -> int:
    sizes = [len(contents[child]) for child in children]
    return _sum_places(_places(content), sizes)


def _places(content: bytes) -> Iterable[Any]:
    places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
    if not isinstance(places, list):
        raise TypeError(places)
    return places


def _sum_places(places: Iterable[Any], sizes: list[int]) -> int:
    return sum(sizes[place] for place in places)


def bound_arrays(max_bytes: int = MAX_PARCEL_BYTES) -> None:
    """Make Flower refuse to put together an array beyond a size, in this process.

    For the ServerApp, whose Grid inflates replies before we see them. Each array is bounded;
    ``from_record`` bounds their sum.
    """
    whole = Array.inflate.__func__

    def inflate(
        cls: type[Array], object_content: bytes, children: dict[str, Any] | None = None
    ) -> Array:
        known = children or {}
        _, names, _ = get_object_head_values_from_object_content(object_content)
        sizes = [len(known[name].data) for name in names]
        if _sum_places(_places(object_content), sizes) > max_bytes:
            raise ValueError(f"an array is larger than {max_bytes} bytes, which is accepted")
        array: Array = whole(cls, object_content, children)
        return array

    Array.inflate = classmethod(inflate)
