"""Three sites join by one command each, with TLS and node keys, as the commands are typed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_sites import make_model, make_silo

from mutirao.config import toml_value

MUTIRAO = Path(sys.executable).with_name("mutirao")
NAMES = ("east", "north", "south")

RECIPE = """\
model = {model}
work = {work}
address = "127.0.0.1"
port = {port}
certificates = {certificates}
seed = 3

[sites]
{sites}

[federated]
num_rounds = 2
tokens_per_round = 120
monitor_tokens = 40
round_timeout_s = 150

[lora]
rank = 2
alpha = 4
target_modules = ["q_proj", "down_proj"]
num_layers = 1

[train]
learning_rate = 1e-2
warmup_tokens = 0
tokens_per_step = 64
max_tokens_per_example = 32
"""


def federate(*arguments: object) -> str:
    command = [str(MUTIRAO), "federate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def recipe(tmp_path, tiny_model_directory):
    """A coordinator's recipe, with the keys that three sites made."""
    keys = {}
    for number, name in enumerate(NAMES):
        make_silo(tmp_path / "data" / name, seed=number)
        identity = tmp_path / "sites" / name / "identity"
        keys[name] = json.loads(federate("keys", identity, "--json"))["public_key"]
    federate("keys", tmp_path / "certificates", "--coordinator", "--host", "coordinator.example")
    path = tmp_path / "federation.toml"
    path.write_text(
        RECIPE.format(
            model=toml_value(str(make_model(tiny_model_directory, tmp_path / "model"))),
            work=toml_value(str(tmp_path / "work")),
            certificates=toml_value(str(tmp_path / "certificates")),
            port=free_port(),
            sites="\n".join(f'{name} = "{key}"' for name, key in keys.items()),
        )
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_three_sites_join_by_one_command_each(recipe, tmp_path):
    dry = json.loads(federate("server", "-c", recipe, "--dry-run", "--json"))
    assert dry["num_sites"] == 3
    assert dry["epsilon"] is None
    federate("invite", "-c", recipe, "--out", tmp_path / "invites")
    invites = {name: tmp_path / "invites" / f"{name}.invite" for name in NAMES}
    assert {path.stat().st_mode & 0o777 for path in invites.values()} == {0o600}
    assert json.loads(invites["north"].read_text())["plan_sha256"] == dry["plan_sha256"]
    assert not list((tmp_path / "work").rglob("*.key"))
    sites = []
    try:
        for name in NAMES:
            command = [str(MUTIRAO), "federate", "site", str(invites[name])]
            command += ["--data", str(tmp_path / "data" / name)]
            command += ["--model", str(tmp_path / "model")]
            command += ["--work", str(tmp_path / "sites" / name)]
            log = (tmp_path / f"{name}.log").open("wb")
            sites.append(subprocess.Popen(command, stdout=log, stderr=log))
            log.close()
        rounds = json.loads(federate("server", "-c", recipe, "--json"))["rounds"]
        for each in sites:
            each.send_signal(signal.SIGTERM)
        codes = [each.wait(30) for each in sites]
    finally:
        for each in sites:
            with suppress(OSError):
                os.kill(each.pid, signal.SIGKILL)
            each.wait()
    assert [sorted(each["sites"]) for each in rounds] == [sorted(NAMES)] * 2
    upload = rounds[1]["sites"]["north"]["bytes_sent"]
    assert dry["upload_bytes"] <= upload <= dry["upload_bytes"] + 3_000
    assert codes == [0, 0, 0], (tmp_path / "north.log").read_text()


@pytest.mark.slow
def test_an_invite_is_for_one_key(recipe, tmp_path):
    federate("invite", "-c", recipe, "--out", tmp_path / "invites")
    command = [str(MUTIRAO), "federate", "site", str(tmp_path / "invites" / "north.invite")]
    command += ["--data", str(tmp_path / "data" / "north"), "--model", str(tmp_path / "model")]
    command += ["--work", str(tmp_path / "sites" / "south")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "but the invite is for" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
