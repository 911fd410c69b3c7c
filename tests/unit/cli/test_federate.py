"""``mutirao federate``: keys, the printed log, exit codes, instant help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mutirao.cli.app import app
from mutirao.errors import AuditError, InputError
from mutirao.federated.audit.check import head_path
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import Mask, Noise, Release
from mutirao.federated.identity import PRIVATE_NAME, PUBLIC_NAME, open_identity, public_hex

MUTIRAO = str(Path(sys.executable).parent / "mutirao")


def federate(*arguments):
    return CliRunner().invoke(app, ["federate", *map(str, arguments)])


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", open_identity(tmp_path / "key"), site="north")
    plain = {
        "run": "run-a",
        "round": 1,
        "recipient": "coordinator",
        "kind": "adapter update",
        "content": "LoRA",
        "codec": "int8",
        "payload_bytes": 1234,
        "payload_sha256": "a" * 64,
    }
    log.append(Release(**plain, tensors=("b.0", "b.1"), policy_sha256="c" * 64))
    masked = {
        "round": 2,
        "mask": Mask(cohort_size=4),
        "noise": Noise(noise_multiplier=1.5, clip_norm=0.1, epsilon=0.7, delta=1e-5),
        "tensors": tuple(f"b.{number}" for number in range(20)),
    }
    log.append(Release(**{**plain, **masked}))
    return log.path


def test_keys_are_made_once(tmp_path):
    out = tmp_path / "site"
    result = federate("keys", out)
    assert result.exit_code == 0, result.output
    assert (out / PRIVATE_NAME).stat().st_mode & 0o777 == 0o600
    assert f"public key: {public_hex(open_identity(out))}" in result.output
    assert "PRIVATE" not in result.output
    before = (out / PRIVATE_NAME).read_bytes()
    again = federate("keys", out)
    assert isinstance(again.exception, InputError)
    assert "never written over" in str(again.exception)
    assert (out / PRIVATE_NAME).read_bytes() == before


def test_keys_as_json(tmp_path):
    made = json.loads(federate("keys", tmp_path / "site", "--json").output)
    assert made["public_key"] == public_hex(open_identity(tmp_path / "site"))
    assert Path(made["private_file"]).exists()
    assert Path(made["public_file"]).exists()


def test_audit_prints_each_record_and_the_totals(log, tmp_path):
    result = federate("audit", log, "--key", tmp_path / "key" / PUBLIC_NAME)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "opened: the log of site north" in lines[0]
    assert "run run-a round 1 to coordinator: 1234 bytes, adapter update: LoRA" in lines[1]
    assert f"[int8, b.0, b.1, not masked, no noise, policy {'c' * 12}; sha256" in lines[1]
    assert "20 tensors, masked among 4 sites, noise 1.5, clip 0.1, epsilon 0.7" in lines[2]
    assert "run run-a: 2468 bytes" in lines
    assert "kind adapter update: 2468 bytes" in lines
    assert "in all: 2468 bytes" in lines
    assert lines[-1].startswith("whole: 3 records, signed with")
    assert "note:" not in result.output


def test_audit_as_json(log):
    found = json.loads(federate("audit", log, "--json").output)
    assert found["whole"] is True
    assert found["fault"] is None
    assert "the log itself names" in found["notes"][0]
    assert found["totals"]["num_bytes"] == 2468
    assert [record["sequence"] for record in found["records"]] == [1, 2, 3]


def test_an_altered_log_is_exit_code_1(log):
    log.write_bytes(log.read_bytes().replace(b"1234", b"1235", 1))
    result = federate("audit", log)
    assert isinstance(result.exception, AuditError)
    assert result.exception.exit_code == 1
    assert "record 2 was altered" in str(result.exception)
    assert "whole" not in result.output
    told = json.loads(federate("audit", log, "--json").output)
    assert told["whole"] is False
    assert told["fault"]["sequence"] == 2
    assert len(told["records"]) == 1


def test_a_kept_head_shows_a_cut(log, tmp_path):
    head = head_path(log).rename(tmp_path / "kept.json")
    assert federate("audit", log, "--receipt", head).exit_code == 0
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    assert "record 3 is missing" in str(federate("audit", log, "--receipt", head).exception)


def test_strings_of_strangers_are_harmless_on_a_terminal(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", open_identity(tmp_path), site="north")
    log.append(
        Release(
            run="\x1b[2J\u202e[red]:smile:",
            round=None,
            recipient="x\ny",
            kind="error",
            codec="text",
            payload_bytes=1,
            payload_sha256="a" * 64,
        )
    )
    output = federate("audit", log.path).output
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert "[red]:smile: to x y" in output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["audit", "nowhere.jsonl"], 2, "cannot be read"),
        (["audit", "."], 2, "cannot be read"),
        (["audit", "audit.jsonl", "--key", "abc"], 2, "not a public key"),
        (["audit", "audit.jsonl", "--key", "audit.jsonl"], 2, "not an Ed25519 public key"),
        (["audit", "audit.jsonl", "--receipt", "nowhere"], 2, "nowhere cannot be read"),
        (["audit", "audit.jsonl", "--receipt", "audit.jsonl"], 2, "not the head of"),
        (["audit", "audit.jsonl", "--key", "0" * 64], 1, "another key"),
        (["audit"], 2, "Missing argument"),
        (["keys", "key"], 2, "never written over"),
    ],
)
def test_the_command_ends_with_its_exit_code(log, arguments, code, words):
    result = subprocess.run(
        [MUTIRAO, "federate", *arguments],
        cwd=log.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == code, result.stderr
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_help_loads_no_cryptography():
    code = (
        "import sys; from typer.testing import CliRunner; from mutirao.cli.app import app; "
        "result = CliRunner().invoke(app, ['federate', 'audit', '--help']); "
        "assert '--receipt' in result.output, result.output; "
        "print([name for name in ('cryptography', 'pydantic', 'torch') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
