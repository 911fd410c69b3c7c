"""The whole road with a tiny random model, on Flower's real engine, without a network.

The parts build on each other in order: a taken port, a site that is killed and comes back, an
interrupt, and the run that goes on to the end from what was kept.
"""

import json
import os
import signal
import socket
import time

import psutil
import pytest

from mutirao.artifact import lineage, open_artifact

pytestmark = pytest.mark.timeout(900)


def _wait_for(find, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (found := find()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not appear in time")


def _find_agent(pid, *, but=None):
    """Return the process that carries parcels for site south, other than one that was killed."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "flower.site_agent" in command and "south" in command and process != but:
            return process
    return None


def _flower_processes(road):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(road.run_folder) in command and process.pid != os.getpid():
            found.append(command)
    return found


def test_1_a_taken_port_is_bad_input_and_keeps_what_was_finished(small_road):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = small_road.run("--set", f"federated.port={port}")
    words = " ".join(result.stderr.split())
    assert result.returncode == 2, result.stderr
    assert f"port {port} is taken" in words
    assert "Traceback" not in result.stderr
    open_artifact(small_road.run_folder / "data" / "north", "data")
    assert not (small_road.run_folder / "federated").exists()


def test_2_a_killed_site_comes_back(small_road):
    process = small_road.start()
    agent = _wait_for(lambda: _find_agent(process.pid))
    agent.kill()
    _wait_for(lambda: _find_agent(process.pid, but=agent))
    assert process.poll() is None
    small_road.process = process


def test_3_an_interrupt_leaves_no_process_and_no_half_artifact(small_road):
    process = small_road.process
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "run the same command to go on" in " ".join(stderr.split())
    assert _flower_processes(small_road) == []
    assert not (small_road.run_folder / "federated").exists()


def test_4_the_road_goes_on_to_the_end(small_road):
    result = small_road.run()
    assert result.returncode == 0, result.stderr
    assert "kept from before" in result.stderr
    assert result.stdout.strip().endswith("report.html")
    run = small_road.run_folder
    for path, kind in (("merged", "model"), ("federated", "adapter"), ("alone/south", "adapter")):
        open_artifact(run / path, kind)
    rounds = json.loads((run / "federated" / "rounds.json").read_text())
    assert [row["round"] for row in rounds] == [1, 2]
    assert all(set(row["sites"]) == {"north", "south"} for row in rounds)


def test_5_each_sites_log_tells_the_bytes_that_left(small_road):
    run = small_road.run_folder
    rounds = json.loads((run / "federated" / "rounds.json").read_text())
    for name in ("north", "south"):
        text = (run / "federated" / "sites" / f"{name}.jsonl").read_text()
        told = {
            line["round"]: line["bytes_sent"]
            for line in map(json.loads, text.splitlines())
            if line["event"] == "left the site" and line["kind"] == "update"
        }
        assert told == {row["round"]: row["sites"][name]["bytes_sent"] for row in rounds}


def test_6_no_host_but_loopback_was_ever_tried(small_road):
    attempts = small_road.attempts
    assert not attempts.exists(), attempts.read_text()


def test_7_nothing_is_done_twice(small_road):
    started = time.monotonic()
    result = small_road.run("--json")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 60
    assert "▸" not in result.stderr
    json.loads(result.stdout)


def test_8_lineage_leads_from_the_smallest_model_to_the_base(small_road):
    roles = [role for _, role, _, _ in lineage(small_road.run_folder / "compressed" / "3-bit")]
    assert {"base", "adapter", "data of north", "data of south"} <= set(roles)


def test_9_an_altered_model_is_made_again(small_road):
    weights = small_road.run_folder / "compressed" / "3-bit" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = small_road.run()
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("▸") == 1
    open_artifact(small_road.run_folder / "compressed" / "3-bit", "model")
