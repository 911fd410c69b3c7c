"""The audit log under fire: kill -9, several writers, a full disk, fuzzed lines."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import get_context

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mutirao.errors import AuditError, DiskFullError
from mutirao.federated.audit import log as audit_log_module
from mutirao.federated.audit.check import head_path, verify_log
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import Release, make_head, parse_line

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key()

WRITER = """\
import os, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import Release

real = os.write

def write_a_little(descriptor, content):
    "Write as little as the kernel may, so that a kill often falls into the middle of a line."
    return real(descriptor, bytes(content[:40]))

os.write = write_a_little
log = AuditLog(Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(bytes(32)), site="north")
number = int(sys.argv[2])
real(1, b"ready\\n")
while True:
    log.append(
        Release(
            run="run", round=number, recipient="coordinator", kind="update", codec="int8",
            payload_bytes=1, payload_sha256="a" * 64,
        )
    )
    real(1, b"%d\\n" % number)  # what left the site
    number += 1
"""

KILLED_AT_EVERY_STEP = """\
import json, os, shutil, signal, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import Release

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))

def append(path, number):
    AuditLog(path, KEY, site="north").append(
        Release(
            run="run", round=number, recipient="coordinator", kind="update", codec="int8",
            payload_bytes=1, payload_sha256="a" * 64,
        )
    )

def die_after(num_steps):
    left = [num_steps]
    def counted(real):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        return call
    write = os.write
    os.write = counted(lambda descriptor, content: write(descriptor, bytes(content[:60])))
    for name in ("fsync", "replace", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))

before, torn = Path(sys.argv[1]), sys.argv[2].encode()
append(before / "audit.jsonl", 1)
with (before / "audit.jsonl").open("ab") as file:
    file.write(torn)
for num_steps in range(1000):
    folder = before.with_name(f"killed-{num_steps}")
    shutil.copytree(before, folder)
    child = os.fork()
    if child == 0:
        die_after(num_steps)
        append(folder / "audit.jsonl", 2)
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    found = []
    for number in (3, 4):
        append(folder / "audit.jsonl", number)
        verification = verify_log(folder / "audit.jsonl", KEY.public_key())
        found.append(str(verification.fault or ""))
    entries = [record.entry for record in verification.records]
    print(json.dumps({
        "faults": found,
        "finished": finished,
        "rounds": [each.round for each in entries if each.event == "release"],
        "torn": [each.num_bytes for each in entries if each.event == "torn line"],
        "pending": [each.name for each in folder.iterdir() if each.name.endswith(".pending")],
    }))
    if finished:
        break
"""


def release(number):
    return Release(
        run="run",
        round=number,
        recipient="coordinator",
        kind="update",
        codec="int8",
        payload_bytes=1,
        payload_sha256="a" * 64,
    )


def rounds_of(path):
    verification = verify_log(path, PUBLIC)
    assert verification.fault is None, verification.fault
    return [
        record.entry.round for record in verification.records if record.entry.event == "release"
    ]


def test_killed_at_any_moment_nothing_left_unrecorded(tmp_path):
    path = tmp_path / "audit.jsonl"
    rng = random.Random(0)
    left, num_torn, number = [], 0, 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number)], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.06))
        writer.send_signal(signal.SIGKILL)
        told, _ = writer.communicate()
        left += [int(line) for line in told.split()]
        if not path.exists():
            continue
        recorded = rounds_of(path)  # sound as it is, before anybody has put it in order
        assert set(left) <= set(recorded)
        assert len(recorded) == len(set(recorded))
        num_torn += not path.read_bytes().endswith(b"\n")
        number = max([number, *recorded]) + 1
    AuditLog(path, KEY, site="north").append(release(number))
    assert rounds_of(path)[-1] == number
    events = [record.entry.event for record in verify_log(path, PUBLIC).records]
    assert events.count("opening") == 1
    # A torn line that was told of twice, by a kill before it was done, is told of enough.
    assert events.count("torn line") <= num_torn + 12
    assert not [each for each in tmp_path.iterdir() if each.name.endswith(".pending")]


@pytest.mark.parametrize("torn", ["", '{"code_version":"'], ids=["sound", "torn"])
def test_killed_at_every_step_of_an_append_the_log_goes_on(tmp_path, torn):
    """Each write, flush, rename and truncation, in turn, is the one that is not done."""
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(tmp_path / "before"), torn],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    killed = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(killed) > 8
    for told in killed:
        assert told["faults"] == ["", ""]
        assert told["pending"] == []
        assert told["rounds"] in ([1, 3, 4], [1, 2, 3, 4])
        assert told["rounds"][1] == 2 or not told["finished"]
        assert bool(told["torn"]) >= bool(torn)
        if torn:
            assert len(torn) in told["torn"]
    assert any(each["torn"] for each in killed[:-1])


@pytest.mark.parametrize("length", range(1, 60, 7))
def test_cut_anywhere_in_an_unconfirmed_record_the_log_goes_on(tmp_path, length):
    """Every length of a torn line, which kills at random moments only sample."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, KEY, site="north")
    log.append(release(1))
    whole, head = path.read_bytes(), head_path(path).read_bytes()
    log.append(release(2))
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[: length * len(line) // 60])
    head_path(path).write_bytes(head)
    log.append(release(3))
    assert rounds_of(path) == [1, 3]
    assert verify_log(path, PUBLIC).records[2].entry.event == "torn line"


def _append_many(path, start, num):
    log = AuditLog(path, KEY, site="north")
    for number in range(start, start + num):
        log.append(release(number))


def test_writers_do_not_interleave(tmp_path):
    path = tmp_path / "audit.jsonl"
    context = get_context("spawn")
    writers = [
        context.Process(target=_append_many, args=(path, 1000 * index, 40)) for index in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    recorded = rounds_of(path)
    assert len(recorded) == 120
    for index in range(3):
        own = [number for number in recorded if number // 1000 == index]
        assert own == list(range(1000 * index, 1000 * index + 40))


def test_a_limit_holds_for_two_writers_together(tmp_path):
    """What is checked against the log is checked under the same lock as the writing."""
    path = tmp_path / "audit.jsonl"
    context = get_context("spawn")
    writers = [context.Process(target=_append_up_to, args=(path, 20)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(rounds_of(path)) == 20


def _append_up_to(path, most):
    def check(records):
        if len(records) > most:  # the opening, and as many releases
            raise AuditError("enough")

    log = AuditLog(path, KEY, site="north")
    with suppress(AuditError):
        while True:
            log.append(release(1), check=check)


@pytest.mark.parametrize("can_undo", [True, False])
@pytest.mark.parametrize("num_written", [0, 1, 200])
def test_a_full_disk_lets_nothing_leave_and_breaks_nothing(
    tmp_path, monkeypatch, num_written, can_undo
):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, KEY, site="north")
    log.append(release(1))
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        real = os.write
        budget = [num_written]

        def write(descriptor, content):
            room = min(budget[0], len(content))
            if not room:
                full()
            budget[0] -= room
            return real(descriptor, bytes(content[:room]))

        patch.setattr(audit_log_module.os, "write", write)
        if not can_undo:
            patch.setattr(audit_log_module.os, "ftruncate", full)
        with pytest.raises(DiskFullError, match=r"no room left.*audit\.jsonl"):
            log.append(release(2))
    if can_undo:
        assert path.read_bytes() == before
    assert rounds_of(path) == [1]
    log.append(release(3))
    assert rounds_of(path) == [1, 3]


def test_no_room_for_the_head_lets_nothing_leave(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, KEY, site="north")
    log.append(release(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit_log_module, "write_atomic", full)
        for number in (2, 3):
            with pytest.raises(DiskFullError):
                log.append(release(number))
    log.append(release(4))
    # Round 2 is on record although it did not leave: the log may say too much, never too little.
    assert rounds_of(path) == [1, 2, 4]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    log = AuditLog(tmp_path_factory.mktemp("sound") / "audit.jsonl", KEY, site="north")
    for number in range(1, 6):
        log.append(release(number))
    return log.path


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_change_of_bytes_is_found_and_never_a_crash(sound, tmp_path, data):
    whole = sound.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(0, 200))
    new = data.draw(st.binary(max_size=50))
    changed = whole[:start] + new + whole[start + length :]
    path = tmp_path / "audit.jsonl"
    path.write_bytes(changed)
    head_path(path).write_bytes(head_path(sound).read_bytes())
    fault = verify_log(path, PUBLIC).fault
    if changed == whole:
        assert fault is None
    elif changed.startswith(whole) and b"\n" not in changed[len(whole) :]:
        assert fault is None  # an unfinished line after all that was confirmed
    else:
        assert fault is not None
        first_changed = next(
            (at for at, pair in enumerate(zip(whole, changed, strict=False)) if len({*pair}) > 1),
            min(len(whole), len(changed)),
        )
        # The fault is told at the record in which the first byte differs, or the one after a cut.
        assert fault.sequence == whole[:first_changed].count(b"\n") + 1


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300))
def test_any_line_is_a_record_or_a_value_error(line):
    with suppress(ValueError):
        parse_line(line)


@pytest.mark.parametrize(
    "text",
    [
        b'{"sequence":' + b"9" * 5_000 + b"}",
        b'{"entry":{"event":"release","run":"\\ud800"}}',
        b'{"a":1,"a":2}',
        b"[" * 500_000,
        b'{"entry":' * 20_000,
        b"1e999",
        b"\x00" * 1000,
    ],
    ids=["digits", "surrogate", "twice", "deep", "deep objects", "infinite", "zeros"],
)
def test_lying_lines_are_told_and_never_a_crash(sound, tmp_path, text):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(sound.read_bytes() + text + b"\n")
    fault = verify_log(path, PUBLIC).fault
    assert fault.sequence == 7
    with pytest.raises(AuditError, match="last record was altered"):
        AuditLog(path, KEY, site="north").append(release(9))


def test_a_line_without_end_is_not_read_into_memory(sound, tmp_path, monkeypatch):
    monkeypatch.setattr("mutirao.federated.audit.check.MAX_LINE_BYTES", 2_000)
    path = tmp_path / "audit.jsonl"
    path.write_bytes(sound.read_bytes() + b"x" * 10_000)
    assert "line is too long" in verify_log(path, PUBLIC).fault.message


def test_an_older_log_put_back_with_its_own_head_needs_a_receipt(sound, tmp_path):
    """The limit that the documents state, held here so that nobody claims more."""
    lines = sound.read_bytes().splitlines(keepends=True)
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(lines[:3]))
    head_path(path).write_text(make_head(KEY, parse_line(lines[2][:-1])).model_dump_json())
    assert verify_log(path, PUBLIC).fault is None
    kept = head_path(sound)
    assert verify_log(path, PUBLIC, [kept]).fault.sequence == 4
