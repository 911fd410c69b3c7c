"""Parcels in Flower's records: whole ones come back, everything else is an UpdateError."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Metadata, MetricRecord
from flwr.app.message import make_message
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import UpdateError
from mutirao.federated.flower import records
from mutirao.federated.flower.records import check_contents, from_record, put_together, to_record
from mutirao.federated.identity import public_hex
from mutirao.federated.parcel import Parcel

KEY = Ed25519PrivateKey.generate()
METADATA = Metadata(1, "", 2, 1, "id", "1", 100.0, 60.0, "train")
SAME = np.zeros(12, np.uint8)


def parcel(**payloads: np.ndarray) -> Parcel:
    return Parcel("update", "a" * 64, 3, "north", {"x": [1, 2.5, "é"]}, payloads).signed(KEY)


def over_the_wire(record: InflatableObject) -> dict[str, bytes]:
    return {name: each.deflate() for name, each in get_all_nested_objects(record).items()}


@pytest.mark.parametrize(
    "payloads", [{}, {"a": np.arange(9, dtype=np.uint8), "b": SAME, "c": SAME, "d": SAME[:0]}]
)
def test_a_parcel_comes_back_whole_and_signed(payloads):
    sent = parcel(**payloads)
    record = to_record(sent)
    contents = over_the_wire(record)
    check_contents(contents)
    arrived = from_record(inflate_object_from_contents(record.object_id, contents))
    assert (arrived.text, arrived.signature) == (sent.text, sent.signature)
    assert arrived.is_signed_by(public_hex(KEY))
    assert {name: each.tobytes() for name, each in arrived.payloads.items()} == {
        name: each.tobytes() for name, each in payloads.items()
    }


def test_a_parcel_larger_than_accepted_is_refused():
    record = to_record(parcel(a=np.ones(100, np.uint8), b=np.ones(100, np.uint8)))
    assert from_record(record, max_bytes=200)
    with pytest.raises(UpdateError, match="larger than 199 bytes"):
        from_record(record, max_bytes=199)


def bytes_array(data: bytes, dtype="uint8", shape=None, stype="mutirao.bytes") -> Array:
    return Array(dtype, (len(data),) if shape is None else shape, stype, data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.pop("parcel"),
        lambda record: record.update(more=ConfigRecord({"a": 1})),
        lambda record: record.update(parcel=MetricRecord({"text": 1})),
        lambda record: record.update(parcel=ConfigRecord({"text": b"{}"})),
        lambda record: record.update(parcel=ConfigRecord({"text": "{}", "signature": b""})),
        lambda record: record.update(parcel=ConfigRecord({"text": b"{}", "signature": b"x" * 65})),
        lambda record: record.update(parcel=ConfigRecord({"text": b"[", "signature": b""})),
        lambda record: record.update(
            parcel=ConfigRecord({"text": b"[" * 100_000, "signature": b""})
        ),
        lambda record: record.update(payloads=ConfigRecord({"a": b"1"})),
        lambda record: record.update(payloads=ArrayRecord({"b": bytes_array(b"12")})),
        lambda record: record["payloads"].update(a=bytes_array(b"1234567")),
        lambda record: record["payloads"].update(a=bytes_array(b"1" * 9, dtype="float32")),
        lambda record: record["payloads"].update(a=bytes_array(b"1" * 9, shape=(3, 3))),
        lambda record: record["payloads"].update(a=bytes_array(b"1" * 9, stype="numpy.ndarray")),
        lambda record: record["payloads"].update(b=bytes_array(b"")),
        lambda record: record["payloads"].clear(),
    ],
)
def test_other_records_are_refused(spoil):
    record = to_record(parcel(a=np.arange(9, dtype=np.uint8)))
    spoil(record)
    with pytest.raises(UpdateError):
        from_record(record)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_objects_raise_nothing_but_update_errors(data):
    sent = parcel(a=np.arange(200, dtype=np.uint8))
    message = make_message(metadata=METADATA, content=to_record(sent))
    contents = over_the_wire(message)
    victim = data.draw(st.sampled_from(sorted(contents)))
    content = bytearray(contents[victim])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    contents[victim] = bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(UpdateError):
        from_record(put_together(message.object_id, contents))


def bomb(times: int) -> dict[str, bytes]:
    """An array that names its one chunk of 1000 bytes many times."""
    record = to_record(parcel(a=np.ones(1000, np.uint8)))
    contents = over_the_wire(record)
    for name, content in contents.items():
        head, _, body = content.partition(b"\x00")
        if head.startswith(b"Array "):
            told = json.loads(body)
            told["arraychunk_ids"] = [0] * times
            body = json.dumps(told).encode()
            kind, children, _ = head.split(b" ")
            head = b" ".join([kind, children, str(len(body)).encode()])
            contents[name] = head + b"\x00" + body
    return contents


def test_an_array_that_grows_when_put_together_is_counted_before():
    check_contents(bomb(3), max_bytes=10_000)
    with pytest.raises(UpdateError, match="larger than 10000 bytes"):
        check_contents(bomb(20), max_bytes=10_000)


def test_bound_arrays_stops_flower_itself(monkeypatch):
    monkeypatch.setattr(Array, "inflate", Array.inflate)  # put back afterwards
    record = to_record(parcel(a=np.ones(1000, np.uint8)))
    records.bound_arrays(10_000)
    inflate_object_from_contents(record.object_id, over_the_wire(record))
    with pytest.raises(ValueError, match="larger than 10000 bytes"):
        inflate_object_from_contents(record.object_id, bomb(20))
