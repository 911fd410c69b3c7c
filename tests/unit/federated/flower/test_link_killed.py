"""A SuperLink that is killed while it starts is started again; one that fails ends the run."""

import pytest

from mutirao.errors import FederationError
from mutirao.federated.flower.deployment import LOOPBACK, Federation, GivenUpError, claim_port
from mutirao.federated.plan import Coordinator, Plan


@pytest.fixture
def federation(tmp_path):
    coordinator = Coordinator(
        plan=Plan(model_sha256="0" * 64),
        sites={"north": "1" * 64},
        work=tmp_path / "work",
        run_id="ab" * 32,
    )
    return Federation(coordinator, LOOPBACK, claim_port(0, LOOPBACK))


def test_a_superlink_killed_as_it_starts_is_left_to_the_watch(federation):
    federation._link.command = ["sh", "-c", "kill -9 $$"]
    with federation._unless_killed():
        federation._start_link()
    assert federation._link.exit_code == -9
    with federation._unless_killed():
        federation._submit()
    for _ in range(6):
        with federation._unless_killed():
            federation._restart_what_ended()
    told = pytest.raises(GivenUpError, match="6 restarts without progress")
    with told, federation._unless_killed():
        federation._restart_what_ended()


def test_a_superlink_that_fails_as_it_starts_ends_the_run(federation):
    federation._link.command = ["false"]
    told = pytest.raises(FederationError, match="the SuperLink did not start on port")
    with told, federation._unless_killed():
        federation._start_link()
