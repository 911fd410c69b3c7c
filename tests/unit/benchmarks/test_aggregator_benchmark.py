"""The arithmetic of the aggregator benchmark, and its sampler; no server is started here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from aggregator_chart import STYLE, draw
from aggregator_memory import MemorySampler, tree_of
from aggregator_summary import summarize, table
from aggregator_task import (
    Task,
    count_parameters,
    make_update,
    note_answer,
    read_answers,
    shapes_of,
)
from bench_aggregator import CASES

TASK = Task("mutirao", "0.1M", 4, 1, "bf16", folder="")


def make_record(name, peak=1000, **more):
    task = CASES[name]
    return {
        "case": name,
        "peer": task.peer,
        "size": task.size,
        "num_sites": task.num_sites,
        "num_rounds": task.num_rounds,
        "upload": task.upload,
        "disturbed": task.disturbed,
        "num_parameters": count_parameters(task.size),
        "outcome": "finished",
        "peak_bytes": peak,
        "peak_anonymous_bytes": peak,
        "wall_s": 1.0,
        "down_bytes": 1,
        "up_bytes": 1,
        **more,
    }


def test_updates_repeat_and_differ_by_site_and_round():
    first, again = (make_update(TASK, "site-01", 1) for _ in range(2))
    others = [make_update(TASK, "site-02", 1), make_update(TASK, "site-01", 2)]
    assert {name: values.shape for name, values in first.items()} == shapes_of("0.1M")
    for name, values in first.items():
        assert np.array_equal(values, again[name])
        assert not any(np.array_equal(values, other[name]) for other in others)
        assert not (values.view(np.uint32) & 0xFFFF).any()  # bfloat16 holds it


def test_answers_that_are_still_being_written_are_left_out(tmp_path):
    note_answer(tmp_path, "site-01", 2, down=5, up=7)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"time": 1, "si')
    assert [(each["round"], each["up"]) for each in read_answers(tmp_path)] == [(2, 7)]


def test_a_task_reads_back(tmp_path):
    task = replace(TASK, folder=str(tmp_path), disturbed=True)
    assert Task.read(task.write()) == task
    assert task.sites == ["site-01", "site-02", "site-03", "site-04"]


def test_slope_and_ratio_of_sites():
    more = 10 * (count_parameters("256M") - count_parameters("64M"))
    records = [
        make_record("ours 64M 4 bf16", 5000),
        make_record("ours 256M 4 bf16", 5000 + more),
        make_record("ours 4M 4 int8", 1000),
        make_record("ours 4M 32 int8", 1040),
        make_record("flower 64M 4", outcome="failed"),
    ]
    summary = summarize(records)
    assert summary["bytes_per_parameter"]["mutirao"] == {"64M to 256M": 10.0}
    assert summary["many_over_few_sites"]["mutirao"] == {"4M": 1.04}
    assert "peak_bytes" not in summary["cases"]["flower 64M 4"]
    assert "failed" in table(summary)


@pytest.mark.parametrize(("killed", "same"), [("abc", True), ("abd", False), (None, False)])
def test_recovery_compares_hashes(killed, same):
    records = [
        make_record("ours undisturbed", sha256="abc"),
        make_record("ours killed", sha256=killed, recovery={"seconds_to_end": 3}),
    ]
    found = summarize(records)["recovery"]["mutirao"]
    assert found == {"seconds_to_end": 3, "same_hash_as_undisturbed": same}


def test_the_sampler_sees_children_but_not_those_that_are_left_out():
    held = "import sys, time; held = b'x' * 40_000_000; print(flush=True); time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"children = [subprocess.Popen([sys.executable, '-c', {held!r}, name],"
        " stdout=subprocess.PIPE) for name in ('counted', 'left' + '-out')]\n"
        "for child in children: child.stdout.readline()\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        everything = tree_of([parent.pid])
        try:
            parent.stdout.readline()
            everything = tree_of([parent.pid])
            found = tree_of([parent.pid], leave_out="left-out")
            with MemorySampler(lambda: tree_of([parent.pid], leave_out="left-out")) as sampler:
                psutil.Process().cpu_percent(0.5)
            assert (len(everything), len(found)) == (3, 2)
            assert 40_000_000 < sampler.peak_bytes < 80_000_000
            assert sampler.num_samples >= 2
        finally:
            for each in everything:
                each.kill()


def test_the_chart_names_every_peer(tmp_path):
    records = [make_record(name) for name in CASES]
    draw(summarize(records), "title", tmp_path / "chart.svg")
    text = "".join(ElementTree.parse(tmp_path / "chart.svg").getroot().itertext())
    for label, *_ in STYLE.values():
        assert label in text
