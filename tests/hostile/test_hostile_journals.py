"""Journals of both sides, each of their files cut at any length or full of noise.

Whoever reads on must either do the lost part again and end at the same states, or say in a
MutiraoError, at a site in a signed refusal, what is damaged. No other exception, no other hash.
"""

import random
import shutil

import numpy as np
import pytest
from fake_federation import (
    NAMES,
    FakeNetwork,
    FakeSite,
    final_bytes,
    make_coordinator,
    run,
    secure_config,
)
from tiny_sites import (
    FEDERATED,
    LORA,
    TRAIN,
    TinyCoordinator,
    make_model,
    make_plan,
    make_silo,
    make_site,
)

from mutirao.errors import MutiraoError
from mutirao.federated.aggregation.outer import Nesterov
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.events import AnswerArrived
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.rounds import run_rounds
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.messages import Refusal, UpdateAnswer, read_fields
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import SecureConfig
from mutirao.federated.simulation import (
    SimulatedNetwork,
    introduce,
    open_coordinator,
    site_workers,
)
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.worker import SiteWorker

LONGEST_SENTENCE = 1_500
NO_STATE = ("progress.json", "log.jsonl")
"""Files of a site for people alone."""


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def lengths(size: int, generator: random.Random, num: int) -> list[int]:
    """Return lengths to cut a file to: none, a byte less, and some between."""
    between = [generator.randrange(size) for _ in range(num)] if size else []
    return sorted({0, max(0, size - 1), *between} - {size})


def files_below(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- the coordinator's --------------------------------------------------------------------------


class StopError(BaseException):
    """The end of a coordinator's process."""


class Coordinated:
    """A coordinator that died late in round 2, and what it would have come to."""

    def __init__(self, folder, mode: str) -> None:
        self.settings = {"num_rounds": 2, "outer": Nesterov(), "round_timeout_s": 5.0}
        self.settings |= secure_config() if mode == "secure" else {}
        self.sites = {name: FakeSite(name) for name in NAMES}
        self.folder, self.kept = folder, folder / "kept"
        last = "unmask" if mode == "secure" else "train"

        def stop(event) -> None:
            is_last = isinstance(event, AnswerArrived) and (event.round, event.step) == (2, last)
            if is_last and len(event.waiting) == 1:
                raise StopError

        with pytest.raises(StopError):
            self.run(self.kept, on_event=stop)
        self.expected = self.finish(self.copy("calm"))

    def run(self, work, **options):
        network = FakeNetwork(self.sites)
        coordinator = make_coordinator(work, **self.settings)
        return run(coordinator, network, **options)

    def copy(self, name):
        work = self.folder / name
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.kept, work)
        return work

    def finish(self, work):
        records = self.run(work)
        hashes = [(record.global_sha256, record.replica_sha256) for record in records]
        last = {name: content for name, content in final_bytes(work).items() if "/002/" in name}
        return hashes, last

    def finish_or_say(self, work):
        try:
            return self.finish(work)
        except MutiraoError as error:
            sentence = str(error)
        assert len(sentence) < LONGEST_SENTENCE
        return sentence


@pytest.fixture(scope="module", params=["plain", "secure"])
def coordinated(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        return Coordinated(tmp_path_factory.mktemp(request.param), request.param)


def test_a_cut_file_of_the_coordinator_is_named_or_made_again(coordinated):
    generator, told, redone = random.Random(1), [], []
    names = files_below(coordinated.kept)
    assert {name.rpartition("/")[2] for name in names} >= {"rounds.json", "status.json"}
    for name in names:
        size = (coordinated.kept / name).stat().st_size
        for length in lengths(size, generator, 1):
            work = coordinated.copy("cut")
            with (work / name).open("r+b") as file:
                file.truncate(length)
            found = coordinated.finish_or_say(work)
            if isinstance(found, str):
                told.append(name)
            else:
                assert found == coordinated.expected, (name, length)
                redone.append(name)
    assert "rounds.json" in told
    assert "status.json" in redone


def test_noise_in_a_file_of_the_coordinator_is_named_or_made_again(coordinated):
    generator = np.random.default_rng(2)
    for name in files_below(coordinated.kept):
        if name.endswith("outer.safetensors"):
            continue  # docs/explanation/faults.md: only what was cut is noticed there
        work = coordinated.copy("noise")
        size = (work / name).stat().st_size
        with (work / name).open("r+b") as file:
            file.seek(int(generator.integers(size)))
            file.write(generator.bytes(9))
            file.truncate(size)
        found = coordinated.finish_or_say(work)
        assert isinstance(found, str) or found == coordinated.expected, name


def test_a_torn_line_in_the_log_of_refusals_costs_nothing_else(tmp_path):
    journal = CoordinatorJournal(tmp_path)
    journal.log_refusal(1, "north", "a sentence in Português: não")
    journal.log_refusal(1, "south", "another: não")
    whole = journal.refused_path.read_bytes()
    for length in range(len(whole)):
        journal.refused_path.write_bytes(whole[:length])
        assert {row["site"] for row in journal.refusals()} <= {"north", "south"}
        journal.log_refusal(2, "east", "after a crash")
        assert journal.refusals()[-1]["site"] == "east"
        assert journal.refused_sites(2) == {"east"}


# --- a site's -----------------------------------------------------------------------------------


class Served:
    """A site with its journal of one round and a part, and what it answers next."""

    def __init__(self, folder, model, silo) -> None:
        federated = FEDERATED.model_copy(update={"error_feedback": True})
        plan, start = make_plan(model, federated=federated)
        coordinator = TinyCoordinator(folder / "coordinator", plan, start)
        self.cache, self.folder = ModelCache(), folder
        self.site = make_site(folder, model, silo, coordinator_key=coordinator.public)
        worker = SiteWorker(self.site, public_models=self.cache)
        self.first = coordinator.whole(1)
        self.second = coordinator.change(2, coordinator.decode(worker.answer(self.first)))
        self.whole = coordinator.whole(2)
        shutil.copytree(self.site.work, folder / "before")
        self.expected = content(worker.answer(self.second))
        shutil.copytree(self.site.work, folder / "after")

    def copy(self, kept: str):
        work = self.folder / "cut"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / kept, work)
        return self.site.model_copy(update={"work": work})


def content(answer: Parcel):
    """What must not depend on faults: all but how long it took, and to which request it is."""
    numbers = read_fields(UpdateAnswer, answer).model_dump(exclude={"seconds", "request_sha256"})
    return numbers, {name: payload.tobytes() for name, payload in answer.payloads.items()}


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_model_directory):
    folder = tmp_path_factory.mktemp("served")
    model = make_model(tiny_model_directory, folder / "model")
    return Served(folder, model, make_silo(folder / "silo", num=6))


def ask(site, request, cache) -> Parcel | str:
    """Ask a new process of a site; return its update, or in which words it does not give one."""
    try:
        worker = SiteWorker(site, public_models=cache)
    except MutiraoError as error:
        return str(error)
    answer = worker.answer(request)
    if answer.kind != "refusal":
        return answer
    told = read_fields(Refusal, answer)
    assert "log.jsonl" not in told.sentence, (site.work / "log.jsonl").read_text()
    assert answer.is_signed_by(public_hex(open_identity(site.work / "identity")))
    return told.sentence if told.reason != "needs_state" else "needs_state"


@pytest.mark.parametrize("kept", ["before", "after"])
def test_a_cut_file_of_a_site_is_named_or_made_again(served, kept):
    generator, told, redone = random.Random(3), {}, set()
    for name in files_below(served.folder / kept):
        size = (served.folder / kept / name).stat().st_size
        for length in lengths(size, generator, 1):
            site = served.copy(kept)
            with (site.work / name).open("r+b") as file:
                file.truncate(length)
            answer = ask(site, served.second, served.cache)
            if answer == "needs_state":
                answer = ask(site, served.whole, served.cache)
            if isinstance(answer, str):
                assert len(answer) < LONGEST_SENTENCE
                told[name] = answer
            else:
                assert content(answer) == served.expected, (name, length)
                redone.add(name.rpartition("/")[2])
    assert redone >= {*NO_STATE, "replica.safetensors"}
    told = {name.rpartition("/")[2]: words for name, words in told.items()}
    assert "site-key.pem" in told
    assert "audit" in told["audit.jsonl"]
    if kept == "before":  # afterwards the answer is there
        assert "damaged" in told["run.json"]
        assert "damaged" in told["optimizer.pt"]
        assert "damaged" in told["residuals.safetensors"]


# --- a site's under masks -----------------------------------------------------------------------


class Masked:
    """Three sites under masks; of one, every request and what lay on its disk before it."""

    def __init__(self, folder, model) -> None:
        changes = {"num_rounds": 1, "secure": SecureConfig(), "weighting": "equal"}
        federated = FEDERATED.model_copy(update=changes)
        self.folder = folder
        plan = write_start(model, folder / "work", federated, LORA, TRAIN, 0)
        sites = [
            make_site(folder, model, make_silo(folder / f"silo-{name}", num=6), name)
            for name in ("east", "north", "south")
        ]
        coordinator = open_coordinator(plan, sites, folder / "work")
        self.site, self.cache = introduce(sites[1], coordinator), ModelCache()
        self.asked: list[tuple[Parcel, Parcel]] = []
        workers = dict(site_workers(sites, coordinator))
        workers["north"] = self.answer
        run_rounds(coordinator, SimulatedNetwork(workers))

    def answer(self, request: Parcel) -> Parcel:
        request = Parcel.from_bytes(request.to_bytes())
        shutil.copytree(self.site.work, self.folder / f"before-{len(self.asked)}")
        answer = SiteWorker(self.site, public_models=self.cache).answer(request)
        self.asked.append((request, answer))
        return answer

    def copy(self, number: int):
        work = self.folder / "cut"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / f"before-{number}", work)
        return self.site.model_copy(update={"work": work})


@pytest.fixture(scope="module")
def masked(tmp_path_factory, tiny_model_directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("masked")
        return Masked(folder, make_model(tiny_model_directory, folder / "model"))


def payloads_of(answer: Parcel) -> dict[str, bytes]:
    return {name: payload.tobytes() for name, payload in answer.payloads.items()}


def test_a_cut_file_under_masks_never_leads_to_a_second_payload(masked):
    generator, told, redone = random.Random(4), set(), set()
    assert [asked.kind for asked, _ in masked.asked] == ["train", *["secure"] * 4, "finish"]
    for number, (_, answered) in enumerate(masked.asked):
        if answered.kind != "secure":
            continue
        for name in files_below(masked.folder / f"before-{number}" / "runs"):
            size = (masked.folder / f"before-{number}" / "runs" / name).stat().st_size
            for length in lengths(size, generator, 1):
                # The question that is open, and once more the one with which the round began.
                for request, expected in (masked.asked[number], masked.asked[0]):
                    site = masked.copy(number)
                    with (site.work / "runs" / name).open("r+b") as file:
                        file.truncate(length)
                    answer = ask(site, request, masked.cache)
                    if isinstance(answer, str):
                        told.add(name.rpartition("/")[2])
                    else:
                        assert payloads_of(answer) == payloads_of(expected), (name, length)
                        redone.add(name.rpartition("/")[2])
    assert told >= {"session.bin", "codes.npy", "run.json"}
    assert any(name.startswith("update-") for name in redone)
