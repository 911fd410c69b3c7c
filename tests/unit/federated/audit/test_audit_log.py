"""The audit log: every kind of tampering is found and the record named; crashes are told."""

import hashlib
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mutirao.errors import AuditError, InputError
from mutirao.federated.audit import log as audit_log_module
from mutirao.federated.audit.check import head_path, total_bytes, verify_log
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import (
    Mask,
    Noise,
    Release,
    countersign,
    has_valid_signature,
    make_head,
    parse_line,
    read_head,
    receipt_bytes,
    record_line,
    sign_record,
)
from mutirao.federated.identity import (
    PRIVATE_NAME,
    PUBLIC_NAME,
    load_private_key,
    make_identity,
    open_identity,
    parse_public_key,
    public_hex,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
PUBLIC = KEY.public_key()


def release(number=1, **fields):
    payload = b"payload %d" % number
    values = {
        "run": "run-a",
        "round": number,
        "recipient": "coordinator",
        "kind": "adapter update",
        "codec": "int8",
        "tensors": ("layers.0.lora_B",),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    return Release(**{**values, **fields})


@pytest.fixture
def log(tmp_path):
    return AuditLog(tmp_path / "audit.jsonl", KEY, site="north")


@pytest.fixture
def six(log):
    """A log of six records: the opening and five releases."""
    for number in range(1, 6):
        log.append(release(number))
    return log.path


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def fault_of(path, key=PUBLIC, receipts=()):
    return verify_log(path, key, receipts).fault


def forge(line, key=KEY, **fields):
    """A record with other fields, signed anew."""
    changed = parse_line(line.rstrip(b"\n")).model_copy(update=fields)
    return record_line(sign_record(key, changed)) + b"\n"


def test_all_fields_are_written_and_read_back(log):
    told = release(
        3,
        mask=Mask(cohort_size=4),
        noise=Noise(noise_multiplier=1.1, clip_norm=1.0, epsilon=0.7, delta=1e-5),
        policy_sha256="a" * 64,
        recipe_sha256="b" * 64,
        content="change of an adapter — só B",
    )
    record = log.append(told)
    verification = verify_log(log.path, PUBLIC)
    assert verification.fault is None
    assert verification.notes == []
    opening, found = verification.records
    assert opening.entry.site == "north"
    assert opening.entry.public_key == public_hex(KEY)
    assert found == record
    assert found.entry == told
    assert (found.sequence, found.previous_sha256) == (2, opening.sha256)
    first, second = lines_of(log.path)
    assert hashlib.sha256(first[:-1]).hexdigest() == json.loads(second)["previous_sha256"]


def test_signature_can_be_checked_with_nothing_but_the_documented_form(six):
    line = json.loads(lines_of(six)[2])
    signature = bytes.fromhex(line.pop("signature"))
    text = json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    PUBLIC.verify(signature, b"mutirao audit record 1\0" + text.encode())


def test_a_restarted_process_goes_on_with_the_chain(log):
    log.append(release(1))
    AuditLog(log.path, KEY, site="north").append(release(2))
    assert [record.sequence for record in verify_log(log.path, PUBLIC).records] == [1, 2, 3]


def test_totals_are_per_day_run_and_kind(log, monkeypatch):
    times = {1: "2026-11-20T23:59:59Z", 2: "2026-11-21T00:00:00Z", 3: "2026-11-21T10:00:00Z"}
    for number, told in times.items():
        monkeypatch.setattr(audit_log_module.time, "strftime", lambda *_, told=told: told)
        kind = "error" if number == 3 else "adapter update"
        log.append(release(number, payload_bytes=10**number, run=f"run-{number % 2}", kind=kind))
    totals = total_bytes(verify_log(log.path, PUBLIC).records)
    assert totals.per_day == {"2026-11-20": 10, "2026-11-21": 1100}
    assert totals.per_run == {"run-1": 1010, "run-0": 100}
    assert totals.per_kind == {"adapter update": 110, "error": 1000}
    assert totals.num_bytes == 1110


@pytest.mark.parametrize("number", range(1, 7))
def test_an_altered_record_is_named(six, number):
    lines = lines_of(six)
    field = b"north" if number == 1 else b"coordinator"
    lines[number - 1] = lines[number - 1].replace(field, b"nobody")
    six.write_bytes(b"".join(lines))
    fault = fault_of(six)
    assert fault.sequence == number
    assert f"record {number} was altered" in fault.message


@pytest.mark.parametrize("number", range(1, 7))
def test_every_flipped_bit_of_a_record_is_found(six, number):
    whole = six.read_bytes()
    start = sum(map(len, lines_of(six)[: number - 1]))
    for offset in range(0, len(lines_of(six)[number - 1]) - 1, 37):
        flipped = bytearray(whole)
        flipped[start + offset] ^= 1
        six.write_bytes(flipped)
        assert fault_of(six).sequence == number, offset


def test_another_form_of_the_same_content_is_found(six):
    lines = lines_of(six)
    lines[-1] = json.dumps(json.loads(lines[-1])).encode() + b"\n"
    six.write_bytes(b"".join(lines))
    assert "record 6 was altered: it is not in canonical form" in fault_of(six).message


@pytest.mark.parametrize("number", range(1, 6))
def test_a_removed_record_is_named(six, number):
    lines = lines_of(six)
    del lines[number - 1]
    six.write_bytes(b"".join(lines))
    fault = fault_of(six)
    assert fault.sequence == number
    assert f"record {number} was removed" in fault.message


def test_several_removed_records_are_named(six):
    lines = lines_of(six)
    six.write_bytes(b"".join(lines[:2] + lines[4:]))
    assert "records 3 to 4 were removed" in fault_of(six).message


def test_a_changed_order_is_named(six):
    lines = lines_of(six)
    lines[2], lines[4] = lines[4], lines[2]
    six.write_bytes(b"".join(lines))
    fault = fault_of(six)
    assert fault.sequence == 3
    assert "order was changed: record 5 stands before 3" in fault.message


def test_a_record_inserted_once_more_is_named(six):
    lines = lines_of(six)
    six.write_bytes(b"".join([*lines[:4], lines[2], *lines[4:]]))
    fault = fault_of(six)
    assert fault.sequence == 5
    assert "record 3 was inserted there once more" in fault.message


@pytest.mark.parametrize(
    "inserted",
    [b"\n", b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n", b'{"sequence": NaN}\n'],
    ids=["empty line", "empty object", "no UTF-8", "deep", "not a number"],
)
def test_an_inserted_line_is_named(six, inserted):
    lines = lines_of(six)
    six.write_bytes(b"".join([*lines[:3], inserted, *lines[3:]]))
    fault = fault_of(six)
    assert fault.sequence == 4
    assert "a line was inserted before record 4" in fault.message


def test_an_inserted_record_of_a_stranger_is_named(six):
    lines = lines_of(six)
    forged = forge(lines[3], OTHER_KEY)
    six.write_bytes(b"".join([*lines[:3], forged, *lines[3:]]))
    assert "a line was inserted before record 4" in fault_of(six).message


def test_a_record_of_another_log_with_the_same_key_is_named(six, tmp_path):
    other = AuditLog(tmp_path / "other.jsonl", KEY, site="north")
    for number in range(7, 12):
        other.append(release(number))
    lines = lines_of(six)
    lines[3] = lines_of(other.path)[3]
    six.write_bytes(b"".join(lines))
    fault = fault_of(six)
    assert fault.sequence == 4
    assert "does not follow record 3" in fault.message


def test_a_second_opening_is_named(six):
    lines = lines_of(six)
    opening = parse_line(lines[0][:-1]).entry
    six.write_bytes(b"".join([*lines[:5], forge(lines[5], entry=opening)]))
    assert "a log is opened once" in fault_of(six).message


def test_a_wrong_key_is_named(six):
    fault = fault_of(six, OTHER_KEY.public_key())
    assert fault.sequence == 1
    assert f"signed with another key, {public_hex(KEY)}" in fault.message


def test_records_signed_with_another_key_from_some_point_on_are_named(six):
    lines = lines_of(six)
    lines[4] = forge(lines[4], OTHER_KEY)
    six.write_bytes(b"".join(lines))
    assert fault_of(six).sequence == 5


def test_a_whole_log_made_anew_with_another_key_needs_the_right_key_to_be_found(six, tmp_path):
    fake = AuditLog(tmp_path / "fake" / "audit.jsonl", OTHER_KEY, site="north")
    fake.append(release(1))
    assert fault_of(fake.path).sequence == 1
    unaided = verify_log(fake.path)
    assert unaided.fault is None
    assert "key that the log itself names" in unaided.notes[0]


@pytest.mark.parametrize("kept", range(6))
def test_a_cut_tail_is_found_by_the_head(six, kept):
    six.write_bytes(b"".join(lines_of(six)[:kept]))
    fault = fault_of(six)
    assert fault.sequence == kept + 1
    assert f"cut after record {kept}" in fault.message
    assert "there were 6" in fault.message


def test_an_emptied_log_is_found_by_the_head_without_a_key(six):
    six.write_bytes(b"")
    assert "cut after record 0" in fault_of(six, key=None).message


def test_a_record_cut_in_the_middle_is_found_by_the_head(six):
    six.write_bytes(six.read_bytes()[:-40])
    assert fault_of(six).sequence == 6


def test_a_missing_head_is_told(six):
    head_path(six).unlink()
    fault = fault_of(six)
    assert fault.sequence is None
    assert "records may be missing" in fault.message


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff"])
def test_a_damaged_head_is_told(six, content):
    head_path(six).write_bytes(content)
    assert "its head was altered" in fault_of(six).message


def test_an_altered_head_is_told(six):
    head = json.loads(head_path(six).read_text())
    head_path(six).write_text(json.dumps({**head, "sequence": 3}))
    assert "its head was altered" in fault_of(six).message


def test_a_head_of_a_stranger_is_told(six):
    lines = lines_of(six)
    six.write_bytes(b"".join(lines[:3]))
    stranger = make_head(OTHER_KEY, parse_line(lines[2][:-1]))
    head_path(six).write_text(stranger.model_dump_json())
    assert "another key" in fault_of(six).message


def test_tail_and_head_cut_together_are_found_only_by_a_receipt(six, tmp_path, log):
    """The documented limit: nothing beside the log tells of it, a kept receipt does."""
    earlier = {path: path.read_bytes() for path in (six, head_path(six))}
    log.append(release(6))
    receipt = tmp_path / "receipt.json"
    kept = countersign(read_head(head_path(six)), OTHER_KEY)
    receipt.write_text(kept.model_dump_json())
    for path, content in earlier.items():
        path.write_bytes(content)
    assert fault_of(six) is None
    fault = fault_of(six, receipts=[receipt])
    assert fault.sequence == 7
    assert "cut after record 6" in fault.message


def test_a_log_written_anew_by_its_owner_is_found_only_by_a_receipt(log, tmp_path):
    log.append(release(1))
    receipt = tmp_path / "receipt.json"
    receipt.write_text(head_path(log.path).read_text())
    for path in (log.path, head_path(log.path)):
        path.unlink()
    for number in (7, 8):
        log.append(release(number))
    assert fault_of(log.path) is None
    fault = fault_of(log.path, receipts=[receipt])
    assert fault.sequence == 2
    assert "not the one that" in fault.message


def test_a_receipt_stands_in_for_a_head_that_was_not_handed_over(six, tmp_path):
    receipt = head_path(six).rename(tmp_path / "receipt.json")
    verification = verify_log(six, PUBLIC, [receipt])
    assert verification.fault is None
    assert "may be missing" in verification.notes[0]


def test_a_receipt_binds_who_signed_it(six, tmp_path):
    head = read_head(head_path(six))
    receipt = countersign(head, OTHER_KEY)
    OTHER_KEY.public_key().verify(bytes.fromhex(receipt.witness_signature), receipt_bytes(head))
    path = tmp_path / "receipt.json"
    lied = receipt.model_copy(update={"witness_key": public_hex(KEY)})
    path.write_text(lied.model_dump_json())
    with pytest.raises(AuditError, match="not signed by the witness"):
        read_head(path)
    forged = head.model_copy(update={"sequence": 2})
    with pytest.raises(AuditError, match="not signed by the key it names"):
        countersign(forged, OTHER_KEY)


def test_a_signature_of_one_purpose_does_not_pass_for_another(six):
    record = parse_line(lines_of(six)[-1][:-1])
    head = read_head(head_path(six))
    assert not has_valid_signature(record.model_copy(update={"signature": head.signature}), PUBLIC)


def test_a_log_that_was_cut_is_not_continued(six, log):
    six.write_bytes(b"".join(lines_of(six)[:4]))
    before = six.read_bytes()
    with pytest.raises(AuditError, match=r"cut after record 4.*nothing leaves this site"):
        log.append(release(9))
    assert six.read_bytes() == before


def test_a_log_whose_last_line_was_altered_is_not_continued(six, log):
    six.write_bytes(six.read_bytes().replace(b'"round":5', b'"round":6'))
    with pytest.raises(AuditError, match="last record was altered"):
        log.append(release(9))


def test_a_log_without_its_head_is_not_continued(six, log):
    head_path(six).unlink()
    with pytest.raises(AuditError, match="is missing"):
        log.append(release(9))


def test_another_sites_key_cannot_continue_a_log(six):
    with pytest.raises(AuditError, match="not signed with this site's key"):
        AuditLog(six, OTHER_KEY, site="south").append(release(9))


def test_an_alteration_far_back_stops_what_is_checked_against_the_log(six, log):
    lines = lines_of(six)
    lines[2] = lines[2].replace(b"run-a", b"run-b")
    six.write_bytes(b"".join(lines))
    with pytest.raises(AuditError, match="record 3 was altered"):
        log.append(release(9), check=lambda records: None)


def test_what_a_check_refuses_is_not_written(six, log):
    def refuse(records):
        assert len(records) == 6
        raise InputError("no")

    before = six.read_bytes()
    with pytest.raises(InputError, match="no"):
        log.append(release(9), check=refuse)
    assert six.read_bytes() == before


@pytest.mark.parametrize("length", [1, 100, -2])
def test_a_torn_line_is_kept_aside_and_told(six, log, length):
    whole = six.read_bytes()
    later = AuditLog(six, KEY, site="north")
    later.append(release(6))
    torn = six.read_bytes()[len(whole) :][:-1][:length]
    head_path(six).write_text(make_head(KEY, parse_line(lines_of(six)[5][:-1])).model_dump_json())
    six.write_bytes(whole + torn)

    assert "unfinished" in verify_log(six, PUBLIC).notes[0]
    log.append(release(7))
    verification = verify_log(six, PUBLIC)
    assert verification.fault is None
    assert verification.notes == []
    told, last = (record.entry for record in verification.records[-2:])
    assert told.event == "torn line"
    assert (told.num_bytes, told.sha256) == (len(torn), hashlib.sha256(torn).hexdigest())
    assert six.with_name(told.kept_in).read_bytes() == torn
    assert last.round == 7


def test_a_line_that_lacks_only_its_end_is_finished(six, log):
    whole = six.read_bytes()
    head = head_path(six).read_bytes()
    log.append(release(6))
    six.write_bytes(six.read_bytes()[:-1])
    head_path(six).write_bytes(head)
    log.append(release(7))
    records = verify_log(six, PUBLIC).records
    assert [record.entry.round for record in records[-2:]] == [6, 7]
    assert six.read_bytes().startswith(whole)


def test_killed_between_moving_a_torn_line_and_telling_it(six, log):
    pending = six.with_name(f"{six.name}.torn-0123456789abcdef.pending")
    pending.write_bytes(b'{"code')
    log.append(release(6))
    told = verify_log(six, PUBLIC).records[-2].entry
    assert (told.event, told.num_bytes) == ("torn line", 6)
    assert not pending.exists()
    assert six.with_name(told.kept_in).read_bytes() == b'{"code'


@pytest.mark.parametrize("num_behind", [1, 3])
def test_a_head_that_a_crash_left_behind_is_brought_up_to_date(six, log, num_behind):
    old = parse_line(lines_of(six)[5 - num_behind][:-1])
    head_path(six).write_text(make_head(KEY, old).model_dump_json())
    assert fault_of(six) is None
    log.append(release(6))
    assert read_head(head_path(six)).sequence == 7


def test_killed_between_the_first_record_and_its_head(log):
    log.append(release(1))
    log.path.write_bytes(lines_of(log.path)[0])
    head_path(log.path).unlink()
    assert fault_of(log.path) is None
    log.append(release(2))
    assert len(verify_log(log.path, PUBLIC).records) == 2


def test_the_record_is_on_disk_before_append_returns(log, monkeypatch):
    log.append(release(1))
    synced = []
    real = os.fsync

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name, os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr(audit_log_module.os, "fsync", fsync)
    log.append(release(2))
    assert (str(log.path), log.path.stat().st_size) in synced


def test_an_empty_log_is_no_proof(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.touch()
    verification = verify_log(path, PUBLIC)
    assert verification.fault is None
    assert verification.notes == ["it holds no record"]
    with pytest.raises(InputError, match="cannot be read"):
        verify_log(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("bad", ["payload_bytes", "payload_sha256", "run"])
def test_impossible_fields_are_refused(bad):
    values = {"payload_bytes": -1, "payload_sha256": "x", "run": "r" * 201}
    with pytest.raises(ValueError, match=bad):
        release(1, **{bad: values[bad]})


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    key = make_identity(tmp_path / "site")
    path = tmp_path / "site" / PRIVATE_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_hex(load_private_key(path)) == public_hex(key)
    assert public_hex(parse_public_key(str(tmp_path / "site" / PUBLIC_NAME))) == public_hex(key)
    before = path.read_bytes()
    with pytest.raises(InputError, match="never written over"):
        make_identity(tmp_path / "site")
    assert path.read_bytes() == before
    assert public_hex(open_identity(tmp_path / "site")) == public_hex(key)
    assert sorted(each.name for each in path.parent.iterdir()) == sorted(
        [PRIVATE_NAME, PUBLIC_NAME]
    )


def test_a_key_is_made_on_first_use_and_a_lost_one_is_not_replaced(tmp_path):
    key = open_identity(tmp_path)
    (tmp_path / PUBLIC_NAME).unlink()
    assert public_hex(open_identity(tmp_path)) == public_hex(key)
    assert (tmp_path / PUBLIC_NAME).exists()
    (tmp_path / PRIVATE_NAME).unlink()
    with pytest.raises(InputError, match="lost its private key"):
        open_identity(tmp_path)


def test_what_is_no_key_is_refused(tmp_path):
    make_identity(tmp_path)
    private = tmp_path / PRIVATE_NAME
    with pytest.raises(InputError, match="give the public key, not the private one"):
        parse_public_key(str(private))
    for text in ("0" * 63, "nowhere.pem", "\0", str(tmp_path)):
        with pytest.raises(InputError, match="not a public key"):
            parse_public_key(text)
    private.chmod(0o640)
    with pytest.raises(InputError, match="can be read by others"):
        load_private_key(private)
    private.chmod(0o600)
    private.write_bytes(private.read_bytes()[:50])
    with pytest.raises(InputError, match="not an Ed25519 private key"):
        load_private_key(private)
