"""A site killed at any write, and asked again, gives the answer it would have given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_sites import FEDERATED, TinyCoordinator, make_model, make_plan, make_silo, make_site

from mutirao.federated.codec import CodecConfig
from mutirao.federated.messages import UpdateAnswer, read_fields
from mutirao.federated.parcel import Parcel
from mutirao.federated.site import worker as worker_module
from mutirao.federated.site.worker import SiteWorker

KILLED = """
import os, sys
from pathlib import Path
import mutirao.environment
mutirao.environment.silence()
from mutirao.config import load_json
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Site
from mutirao.federated.site import worker

left = int(sys.argv[3])
replace = os.replace
def counted(source, target):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    replace(source, target)
os.replace = counted
site = load_json(Site, Path(sys.argv[1]))
for path in sys.argv[4:]:
    answer = worker.SiteWorker(site).answer(Parcel.from_bytes(Path(path).read_bytes()))
Path(sys.argv[2]).write_bytes(answer.to_bytes())
"""


def ask_and_kill(site, requests, tmp_path, num_writes):
    """Ask a site in a process that dies at its n-th rename; return its answer if it lived."""
    (tmp_path / "site.json").write_text(site.model_dump_json())
    out = tmp_path / f"answer-{num_writes}"
    paths = []
    for number, request in enumerate(requests):
        paths.append(tmp_path / f"request-{number}")
        paths[-1].write_bytes(request.to_bytes())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "site.json", out, str(num_writes), *paths],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, 9), done.stderr
    return Path(out).read_bytes() if done.returncode == 0 else None


class Killed(BaseException):
    """What no handler of the site's catches."""


def die_at_write(site, request, name, monkeypatch):
    """Ask a site that dies just before a file comes into place; return whether it did."""
    replace = os.replace

    def die(source, target):
        if Path(target).name == name:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        try:
            SiteWorker(site).answer(request)
        except Killed:
            return True
    return False


def content(answer):
    """What must not depend on crashes: all but how long it took."""
    numbers = read_fields(UpdateAnswer, answer).model_dump(exclude={"seconds"})
    return numbers, {name: payload.tobytes() for name, payload in answer.payloads.items()}


@pytest.fixture
def world(tiny_model_directory, tmp_path):
    model = make_model(tiny_model_directory, tmp_path / "model")
    silo = make_silo(tmp_path / "silo")
    federated = FEDERATED.model_copy(
        update={"error_feedback": True, "upload": CodecConfig(format="int4")}
    )
    plan, start = make_plan(model, federated=federated)
    return model, silo, TinyCoordinator(tmp_path / "coordinator", plan, start)


def test_killed_at_each_write_of_a_round_it_answers_the_same(world, tmp_path, monkeypatch):
    model, silo, coordinator = world
    undisturbed = SiteWorker(make_site(tmp_path / "a", model, silo))
    first = coordinator.whole(1)
    second = coordinator.change(2, coordinator.decode(undisturbed.answer(first)))
    expected = content(undisturbed.answer(second))

    site = make_site(tmp_path / "b", model, silo)
    SiteWorker(site).answer(first)
    kept = f"update-{second.sha256}.parcel"
    for name in ("replica.safetensors", "optimizer.pt", "residuals.safetensors", kept):
        assert die_at_write(site, second, name, monkeypatch)
        assert not (site.work / "runs" / second.run[:16] / "round-002" / kept).exists()
    assert ask_and_kill(make_site(tmp_path / "c", model, silo), [first], tmp_path, 3) is None
    answer = SiteWorker(site).answer(second)
    assert content(answer) == expected
    monkeypatch.setattr(worker_module, "train_update", lambda *_: pytest.fail("trained again"))
    again = SiteWorker(site).answer(Parcel.from_bytes(second.to_bytes()))
    assert again.to_bytes() == answer.to_bytes()
