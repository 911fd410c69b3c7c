from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_federation import NUM_VALUES, STEPS, digest, write_coordinator, write_measures

from mutirao.errors import ArtifactError, InputError, RecipeError
from mutirao.federated.coordinator.measures import MEASURES_NAME, SiteLoss
from mutirao.federated.coordinator.measures import Measures as Written
from mutirao.report.federation import is_federation, read_federation
from mutirao.report.federation.folder import FederationSummary
from mutirao.report.federation.measures import read_measures


@pytest.fixture
def summary(tmp_path: Path) -> FederationSummary:
    return read_federation(write_coordinator(tmp_path / "work"))


def test_bytes_are_those_of_the_journal(summary: FederationSummary) -> None:
    # north is missing in round 2: 3 answers; the first request has 2,000 bytes, later ones 500.
    north, total = summary.traffic("north"), summary.total_traffic
    assert (north.bytes_sent, north.bytes_received) == (3 * 1_000, 2_000 + 2 * 500)
    assert total.bytes_sent == 3 * 1_000 + 4 * 1_010 + 4 * 1_020
    assert total.bytes_received == 3_000 + 3_500 + 3_500
    assert summary.first_bytes == 6_000


def test_synchronous_bytes_are_two_a_value_each_way_and_step(summary: FederationSummary) -> None:
    traffic = summary.traffic("south")
    assert summary.num_values == NUM_VALUES
    assert traffic.synchronous_bytes == 2 * 2 * NUM_VALUES * 4 * STEPS
    assert traffic.saving == pytest.approx(traffic.synchronous_bytes / (4_040 + 3_500))


def test_without_a_state_nothing_is_claimed(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work")
    for path in work.glob("state/000/*"):
        path.unlink()
    summary = read_federation(work)
    assert summary.total_traffic.synchronous_bytes is None
    assert summary.total_traffic.saving is None
    assert any("state" in what for what in summary.missing)


def test_sites_are_known_without_the_plan(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work")
    (work / "coordinator.json").unlink()
    summary = read_federation(work)
    assert summary.sites == ("north", "south", "west")
    assert summary.plan is None
    assert summary.num_rounds == 4


def test_epsilon_is_the_last_one_told(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work", is_private=True)
    assert read_federation(work).epsilon("south") == pytest.approx(0.8)
    assert read_federation(write_coordinator(tmp_path / "plain")).epsilon("south") is None


def test_json_holds_the_plans_hash(summary: FederationSummary) -> None:
    document = json.loads(summary.to_json())
    assert summary.plan is not None
    assert document["plan_sha256"] == summary.plan.sha256
    assert document["rounds"][3]["global_sha256"] == digest("global 4")
    assert document["traffic"]["north"]["bytes_sent"] == 3_000


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert not is_federation(tmp_path)
    with pytest.raises(InputError, match="not a coordinator's folder"):
        read_federation(tmp_path)


@pytest.mark.parametrize("name", ["rounds.json", "coordinator.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    work = write_coordinator(tmp_path / "work")
    (work / name).write_text('["cut')
    with pytest.raises((ArtifactError, RecipeError), match=name):
        read_federation(work)


def test_a_damaged_status_is_listed_as_missing(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work")
    (work / "status.json").write_text('["cut')
    summary = read_federation(work)
    assert summary.state == "unknown"
    assert "where the run stands (status.json)" in summary.missing


def test_measures_keep_finite_numbers_alone(tmp_path: Path) -> None:
    write_measures(tmp_path)
    measures = read_measures(tmp_path)
    assert measures is not None
    assert measures.round == 4
    assert measures.cross_site == {
        "global": {"north": 2.5, "south": 2.75, "west": 2.9},
        "north": {"north": 2.4, "south": 3.0},
    }
    assert measures.leave_one_out["north"] == pytest.approx({"north": 0.12, "south": -0.03})
    assert measures.contributions == {"north": 0.045}
    assert measures.columns == ["north", "south", "west"]
    assert measures.num_dropped == 3


def test_measures_are_read_as_they_are_written(tmp_path: Path) -> None:
    losses = {
        label: {"north": SiteLoss(loss=loss, num_tokens=10)}
        for label, loss in (("global", 2.0), ("without south", 2.5), ("alone south", 3.0))
    }
    written = Written(round=2, losses=losses, contributions={"south": 0.5})
    (tmp_path / MEASURES_NAME).write_text(written.model_dump_json())
    measures = read_measures(tmp_path)
    assert measures is not None
    assert measures.cross_site == {"global": {"north": 2.0}, "south": {"north": 3.0}}
    assert measures.leave_one_out == {"south": {"north": 0.5}}
    assert (measures.contributions, measures.num_dropped) == ({"south": 0.5}, 0)


@pytest.mark.parametrize(
    "content", ["{}", '{"losses": 3, "contributions": []}', '{"losses": {"global": 1}}']
)
def test_measures_of_other_forms_are_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "measures.json").write_text(content)
    measures = read_measures(tmp_path)
    assert measures is not None
    assert measures.cross_site == measures.leave_one_out == {}


def test_measures_that_are_no_object_are_damage(tmp_path: Path) -> None:
    (tmp_path / "measures.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"measures\.json"):
        read_measures(tmp_path)
