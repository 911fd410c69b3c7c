"""The page on three sites, executed as written, on four networks with the addresses on it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from places import Places, why_impossible
from safetensors.numpy import load_file
from small_road import write_silo

from mutirao.artifact import open_artifact
from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.record import ERROR_KIND, Release
from mutirao.federated.identity import PUBLIC_NAME, parse_public_key
from mutirao.federated.site.gate import UPDATE_KIND
from mutirao.federated.site.policy import load_policy

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "three-sites.md"
SITES = ("hospital", "clinic", "laboratory")
WHO = {
    "Coordinator": ("coordinator",),
    "Each site": SITES,
    "Hospital and clinic": ("hospital", "clinic"),
    "By hand": (),
}
STEP = re.compile(
    r"^\*\*(?P<who>[A-Z][a-z ]+)(?P<stays>, in a terminal that stays open)?:\*\*"
    r"(?: (?P<key>Ctrl-C)\.|\n\n```(?P<kind>sh|text)\n(?P<block>.*?)```)$",
    re.DOTALL | re.MULTILINE,
)
LONGEST_S = 900
"""For one step, on a machine that has other things to do."""


@pytest.fixture
def places(tmp_path, tiny_model_directory):
    if reason := why_impossible():
        pytest.skip(reason)
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    addresses = dict(rows)
    assert set(addresses) == {"coordinator", *SITES}
    with Places(tmp_path, addresses) as places:
        for number, place in enumerate(addresses):
            shutil.copytree(tiny_model_directory, places.folder(place) / "model")
            if place in SITES:
                write_silo(places.folder(place) / "texts", 500 * number)
        yield places


class Reader:
    """Does what the page says."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._open: dict[str, subprocess.Popen[bytes]] = {}

    def follow(self, step: re.Match[str]) -> None:
        who = WHO[step["who"]]
        if step["kind"] == "text":
            for line in step["block"].splitlines():
                self._carry(line)
        elif step["key"]:
            for place in who:
                self._places.interrupt(self._open[place])
            for place in who:
                code = self._open.pop(place).wait(LONGEST_S)
                assert code == 0, self._places.printed(place)
        elif step["stays"]:
            self._open |= {place: self._places.start(place, step["block"]) for place in who}
        else:
            self._run(who, step["block"])

    def _run(self, who: tuple[str, ...], block: str) -> None:
        started = {place: self._places.start(place, block) for place in who}
        for place, process in started.items():
            code = process.wait(LONGEST_S)
            assert code == 0, self._all_printed(f"{place}: {block}")

    def _carry(self, line: str) -> None:
        source, target = (part.split(": ") for part in line.split(" -> "))
        path = self._places.folder(target[0]) / target[1]
        path.parent.mkdir(exist_ok=True)
        shutil.copy(self._places.folder(source[0]) / source[1], path)

    def _all_printed(self, what: str) -> str:
        names = self._places.addresses
        return "\n".join([what, *(f"--- {name}\n{self._places.printed(name)}" for name in names)])


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_the_page_is_followed_as_written(places):
    text = PAGE.read_text(encoding="utf-8")
    steps = list(STEP.finditer(text))
    assert sum(step["kind"] is not None for step in steps) == text.count("```") // 2
    reader = Reader(places)
    for step in steps:
        started = time.monotonic()
        reader.follow(step)
        what = (step["block"] or "Ctrl-C").splitlines()[0][:70]
        print(f"{time.monotonic() - started:6.1f} s  {step['who']}: {what}")
    _check_processes_are_gone(places)
    _check_connections(places)
    _check_results(places.folder("coordinator"))
    for site in SITES:
        _check_site(places.folder(site), stayed=site != "laboratory")
        assert "Traceback" not in places.printed(site)
    assert "Secure aggregation needs at least 3 sites" in places.printed("coordinator")
    assert "Traceback" not in places.printed("coordinator")
    _check_that_the_watch_sees(places)


def _check_processes_are_gone(places: Places) -> None:
    deadline = time.monotonic() + 60
    while any(map(places.num_processes, places.addresses)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {name: places.num_processes(name) for name in places.addresses} == dict.fromkeys(
        places.addresses, 0
    )


def _check_connections(places: Places) -> None:
    """Sites called the coordinator's one port, and nobody called anybody else."""
    coordinator = places.addresses["coordinator"]
    sites = {places.addresses[name] for name in SITES}
    traffic = places.traffic()
    assert ["ipv6"] not in traffic
    calls = {tuple(line) for line in traffic if line[2] == "opens"}
    assert calls == {(site, coordinator, "opens", "9092") for site in sites}
    pairs = {(source, target) for source, target, *_ in traffic}
    assert pairs == {(site, coordinator) for site in sites} | {(coordinator, s) for s in sites}
    assert {name: places.num_unroutable(name) for name in places.addresses} == dict.fromkeys(
        places.addresses, 0
    )


def _check_results(folder: Path) -> None:
    """Three adapters were trained, each another; the report is there."""
    written = [folder / "adapter", folder / "adapter-of-two", folder / "without-clinic" / "result"]
    trained = []
    for each in written:
        open_artifact(each, "adapter")
        tensors = load_file(str(each / "adapter_model.safetensors"))
        trained.append(np.concatenate([np.ravel(t) for n, t in tensors.items() if "lora_B" in n]))
    assert all(np.isfinite(each).all() and np.any(each) for each in trained)
    assert not any(np.array_equal(trained[a], trained[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    assert (folder / "work" / "coordinator" / "report.html").stat().st_size > 10_000
    assert not (folder / "without-laboratory").exists()


def _check_site(folder: Path, *, stayed: bool) -> None:
    """The log is whole, and what left is what the site's policies allow."""
    key = parse_public_key(str(folder / "work" / "identity" / PUBLIC_NAME))
    found = verify_log(folder / "work" / "audit.jsonl", key)
    assert found.fault is None
    left = [record.entry for record in found.records if isinstance(record.entry, Release)]
    assert ERROR_KIND not in {entry.kind for entry in left}
    updates = [entry for entry in left if entry.kind == UPDATE_KIND]
    masked = [entry for entry in updates if entry.mask]
    assert [entry.round for entry in masked] == [1, 2]
    assert {entry.mask.cohort_size for entry in masked} == {3}
    assert {entry.codec for entry in masked} == {"fixed point"}
    assert {entry.policy_sha256 for entry in masked} == {load_policy(folder / "policy.toml").sha256}
    in_clear = [entry for entry in updates if not entry.mask]
    assert [entry.round for entry in in_clear] == ([1, 2] if stayed else [])
    assert {entry.codec for entry in in_clear} <= {"int8"}
    assert len({entry.run for entry in updates}) == (2 if stayed else 1)
    sheet = (folder / "work" / "evidence.html").read_text()
    assert "THE LOG IS NOT WHOLE" not in sheet
    for path in folder.rglob("*"):
        others = {*SITES} - {folder.name}
        assert not others & {*path.relative_to(folder).parts}, path


def _check_that_the_watch_sees(places: Places) -> None:
    """What was asserted to be absent would have been seen; and other folders are not there."""
    script = (
        f"test -z \"$(ls -A '{places.folder('hospital').parent}')\"\n"
        "for host in 10.77.0.12 192.0.2.1; do\n"
        '  timeout 5 bash -c "exec 3<>/dev/tcp/$host/80" && exit 1 || true\n'
        "done\n"
    )
    process = places.start("hospital", script)
    assert process.wait(60) == 0, places.printed("hospital")
    assert ["10.77.0.11", "10.77.0.12", "opens", "80"] in places.traffic()
    assert places.num_unroutable("hospital") > 0


def test_nothing_stays_of_places_after_a_failure(tmp_path):
    if reason := why_impossible():
        pytest.skip(reason)

    def fail():
        with Places(tmp_path, {"here": "10.77.0.1", "there": "10.77.0.11"}) as places:
            started.append(places.start("there", "touch came; trap '' INT TERM; sleep 600 & wait"))
            deadline = time.monotonic() + 60
            while not (places.folder("there") / "came").exists():
                assert time.monotonic() < deadline, places.printed("there")
                time.sleep(0.05)
            assert places.num_processes("there") >= 2
            namespaces.extend([places.namespace("here"), places.namespace("there")])
            raise KeyboardInterrupt

    started, namespaces = [], []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert started[0].returncode == -signal.SIGKILL
    shown = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert len(namespaces) == 2
    assert not any(name in shown for name in namespaces)
