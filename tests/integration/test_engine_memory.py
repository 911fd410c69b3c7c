"""The engine in a process that is given so much memory and no more: it ends with the same text.

The models are synthetic, 150 MB of random blocks and 180 MB of floats. Limits are those of the
kernel (cgroup v1), at exactly the memory that the engine was told; whoever passes one is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic_gguf import child_environment, engine_home, write_synthetic_gguf

GROUPS = Path("/sys/fs/cgroup/memory")
LIMIT, EVENTS, USED = "memory.limit_in_bytes", "memory.oom_control", "memory.max_usage_in_bytes"

CHILD = """
import json, sys
from mutirao.errors import InputError
from mutirao.inference.engine import Engine

settings = json.loads(sys.argv[2])
try:
    with Engine.open(sys.argv[1], **settings) as engine:
        ids = engine.encode_prompt("The patient was admitted")
        tokens = list(engine.generate_tokens(ids, max_new_tokens=8))
        choice, statistics = engine.opened.choice, engine.statistics()
        print(json.dumps({
            "tokens": tokens,
            "plan": statistics["plan"],
            "peak_bytes": statistics["peak_memory_bytes"],
            "resident_bytes": choice.resident_bytes,
            "streamed_bytes": choice.streamed_bytes,
        }))
except InputError as error:
    print(json.dumps({"least": str(error).split("at least ")[1].split(" MB")[0]}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with engine_home(tmp_path_factory.mktemp("home") / "mutirao") as home:
        yield home


@pytest.fixture(scope="module", params=[("Q4_K", 24), ("BF16", 8)], ids=["Q4_K", "BF16"])
def path(request, tmp_path_factory):
    kind, num_layers = request.param
    path = tmp_path_factory.mktemp("model") / "synthetic.gguf"
    return write_synthetic_gguf(path, hidden=1024, inner=2816, num_layers=num_layers, kind=kind)


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of processes whose memory can be limited."""
    if os.geteuid() != 0 or not os.access(GROUPS / "cgroup.procs", os.W_OK):
        pytest.skip(f"limiting a process's memory needs root and cgroup v1 at {GROUPS}")
    group = GROUPS / f"mutirao-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"{GROUPS} takes no new group: {error.strerror}")
    yield group
    group.rmdir()


def run(path: Path, home: Path, group: Path | None = None, **settings: object) -> dict:
    """Run the child, limited to ``memory`` where there is a group; return what it printed."""
    command = [sys.executable, "-c", CHILD, str(path), json.dumps(settings)]
    if group is not None:
        (group / LIMIT).write_text(str(settings["memory"]))
        join = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", join, "sh", *command]
    result = subprocess.run(
        command,
        env=child_environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def whole(path, home):
    """What the model writes with all the memory it wants; builds its store."""
    return run(path, home)


@pytest.fixture(scope="module")
def least_bytes(path, home, whole):
    return int(run(path, home, memory=1_000_000)["least"]) * 1_000_000


def test_all_resident(path, home, whole):
    size = whole["resident_bytes"]
    assert size > 1.4e8
    assert (whole["streamed_bytes"], whole["plan"]) == (0, "all resident")
    assert len(set(whole["tokens"])) > 1
    assert size < whole["peak_bytes"] < size + 100_000_000


@pytest.mark.parametrize("speculation", ["auto", "off"])
def test_the_least_memory_that_is_named_is_enough(
    path, home, whole, least_bytes, speculation, group
):
    settings = {"memory": least_bytes, "speculation": speculation}
    result = run(path, home, group, **settings)
    assert result["tokens"] == whole["tokens"]
    assert result["streamed_bytes"] > 0.85 * whole["resident_bytes"]  # floats: 14.25 bits of 16
    assert result["peak_bytes"] <= least_bytes
    assert "oom_kill 0\n" in (group / EVENTS).read_text()


@pytest.mark.parametrize(("speculation", "share"), [("off", 0.6), ("on", 0.75)])
def test_the_same_text_in_less_memory_than_the_model(
    path, home, whole, least_bytes, speculation, share, group
):
    """With drafts, from the source on: store, calibration and all within the limit."""
    memory = least_bytes + int(share * whole["resident_bytes"])
    if speculation == "on":
        shutil.rmtree(home / "cache" / "stores")
    result = run(path, home, group, memory=memory, speculation=speculation)
    assert result["tokens"] == whole["tokens"]
    expected = "self-speculation" if speculation == "on" else "pin and stream"
    assert result["plan"].startswith(expected)
    # A budget that is left unused would pass all else: most of it holds weights. How much the
    # buffers take beside them, the plan chooses by this disk and processor (30 MB on one).
    assert result["resident_bytes"] > memory - least_bytes - 45_000_000
    assert result["peak_bytes"] <= memory
    assert int((group / USED).read_text()) <= memory
    assert "oom_kill 0\n" in (group / EVENTS).read_text()


def test_the_limit_is_real(path, home, whole, group):
    """The same process with all weights resident does not outlive it."""
    (group / LIMIT).write_text(str(whole["resident_bytes"]))
    join = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
    child = [sys.executable, "-c", CHILD, str(path), "{}"]
    result = subprocess.run(
        ["sh", "-c", join, "sh", *child],
        env=child_environment(home),
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == -9
