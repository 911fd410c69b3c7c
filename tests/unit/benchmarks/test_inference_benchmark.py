"""The arithmetic of the inference benchmark: no engine is started here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from bench_inference import _Journal
from inference.cgroup import MemoryLimit
from inference.chart import draw
from inference.peers import PEERS, Budget
from inference.summary import figures, ratios, same_tokens, steady_start, summarize, table

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def make_record(peer, budget="0.75", *, pause_s=0.5, read=1000, ids=range(100), **more):
    ids = list(ids)
    prompt = {
        "ids": ids,
        "seconds": [2.0 + pause_s * index for index in range(len(ids))],
        "read_bytes": [5000 + read * index for index in range(len(ids))],
        "device_bytes": [9000 + 2 * read * index for index in range(len(ids))],
        "started_s": 3.0,
    }
    return {
        "peer": peer,
        "budget": budget,
        "repeat": 0,
        "final": True,
        "outcome": "ok",
        "limit_bytes": None if budget == "none" else 1_000_000_000,
        "extra_bytes": 0,
        "weights": "model.gguf",
        "weights_bytes": 10,
        "peak_bytes": 700,
        "others_share": 0.0,
        "run": {"prompts": [prompt]},
        **more,
    }


@pytest.mark.parametrize(
    ("num_tokens", "start"), [(256, 49), (70, 49), (69, 34), (3, 1), (2, 0), (1, 0)]
)
def test_steady_from_the_fiftieth_token_or_the_middle(num_tokens, start):
    assert steady_start(num_tokens) == start


def test_figures_of_an_even_run():
    found = figures(make_record("ours"))
    assert found["tokens_per_s"] == pytest.approx(2.0)
    assert found["first_tokens_per_s"] == pytest.approx(2.0)
    assert found["bytes_per_token"] == pytest.approx(1000)
    assert found["device_bytes_per_token"] == pytest.approx(2000)
    assert found["time_to_first_token_s"] == 2.0
    assert found["cold_start_s"] == 5.0


def test_what_comes_before_the_fiftieth_token_is_not_steady():
    record = make_record("ours")
    seconds = record["run"]["prompts"][0]["seconds"]
    seconds[:49] = [-1000.0 + index for index in range(49)]
    assert figures(record)["tokens_per_s"] == pytest.approx(2.0)


def test_one_token_has_no_speed():
    found = figures(make_record("ours", ids=[7]))
    assert found["tokens_per_s"] is None
    assert found["num_tokens"] == 1


def test_median_and_spread_over_repeats():
    records = [make_record("ours", pause_s=pause) for pause in (0.1, 0.2, 1.0)]
    cell = summarize(records)["ours"]["0.75"]
    assert cell["tokens_per_s"] == {"median": 5.0, "lowest": 1.0, "highest": 10.0}
    assert cell["outcomes"] == {"ok": 3}


def test_a_killed_run_is_counted_and_has_no_figures():
    summary = summarize([make_record("airllm", outcome="oom", run=None)])
    assert summary["airllm"]["0.75"]["outcomes"] == {"oom": 1}
    assert "tokens_per_s" not in summary["airllm"]["0.75"]
    assert "1 oom" in table(summary)


def test_ratios_compare_medians():
    records = [make_record("ours", pause_s=0.1), make_record("llama.cpp", pause_s=0.8)]
    assert ratios(summarize(records)) == {"ours": {"0.75": {"llama.cpp": 8.0}}}


def test_same_tokens_finds_one_that_differs():
    whole = make_record("ours", "none")
    same = make_record("ours", "0.5")
    other = make_record("ours-speculation", "0.5", ids=[*range(99), 12345])
    compared = same_tokens([whole, same, other], ("ours", "ours-speculation"))
    assert compared["runs"] == {
        "ours at none": True,
        "ours at 0.5": True,
        "ours-speculation at 0.5": False,
    }
    assert compared["all"] is False
    assert compared["reference"]["num_tokens"] == [100]


def test_a_run_cut_short_is_not_called_the_same():
    whole = make_record("ours", "none")
    short = make_record("ours", "0.5", ids=range(60))
    assert same_tokens([whole, short], ("ours",))["all"] is False


@pytest.mark.parametrize("name", ["none", "0.75", "1.25", "1"])
def test_budget_names_read_back(name):
    assert Budget.parse(name).name == name


def test_budget_in_bytes():
    assert Budget(0.75).limit_bytes(1_117_320_768) == 1_087_990_576
    assert Budget(None).limit_bytes(1_117_320_768) is None


def test_the_chart_names_every_peer(tmp_path):
    draw(summarize(make_record(peer.name) for peer in PEERS), "title", tmp_path / "chart.svg")
    text = "".join(ElementTree.parse(tmp_path / "chart.svg").getroot().itertext())
    for peer in PEERS:
        assert peer.label in text


def test_the_journal_drops_a_cut_line_and_goes_on(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"peer": "a"}\n{"peer": "b"', encoding="utf-8")
    _Journal(path, fresh=False).add({"peer": "c"})
    assert [json.loads(line)["peer"] for line in path.read_text().splitlines()] == ["a", "c"]


def make_groups(root, *, is_v1):
    """Write the files of a mounted control group file system, as far as they are read."""
    if is_v1:
        (root / "memory").mkdir()
        (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    else:
        (root / "cgroup.subtree_control").write_text("")


@pytest.mark.parametrize(
    ("is_v1", "limit_name", "peak_name", "kills"),
    [
        (True, "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
        (False, "memory.max", "memory.peak", "memory.events"),
    ],
)
def test_both_kinds_of_control_group(tmp_path, is_v1, limit_name, peak_name, kills):
    make_groups(tmp_path, is_v1=is_v1)
    limit = MemoryLimit(123456, tmp_path)
    assert (limit.path / limit_name).read_text() == "123456"
    (limit.path / peak_name).write_text("1000\n")
    (limit.path / kills).write_text("under_oom 0\noom_kill 2\n")
    assert limit.peak_bytes() == 1000
    assert limit.num_oom_kills() == 2


def test_the_recorder_stops_at_the_stop_token(tmp_path):
    """In a process of its own, as runners are: it speaks on standard output."""
    program = (
        "from recorder import Recorder, read_task\n"
        "recorder = Recorder(read_task())\n"
        "recorder.record(iter([5, 6, 7, 8, 9]))\n"
        "recorder.record(iter([5] * 20))\n"
        "recorder.print({'a': '1'}, b=2)\n"
    )
    task = {
        "model": str(tmp_path),
        "started": 0.0,
        "max_tokens": 10,
        "stop_ids": [7],
        "seconds_per_prompt": 60,
    }
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(task)],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS / "inference")},
        capture_output=True,
        text=True,
        check=True,
    )
    ready, line = done.stdout.splitlines()
    run = json.loads(line)
    assert ready == "ready"
    assert [prompt["ids"] for prompt in run["prompts"]] == [[5, 6, 7], [5] * 10]
    assert [prompt["stopped_by"] for prompt in run["prompts"]] == ["stop token", "length"]
    assert run["versions"] == {"a": "1"}
