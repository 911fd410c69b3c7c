"""Steps are done once, and again when what they were made from has changed."""

import pytest

from mutirao.artifact import write_artifact
from mutirao.demo.steps import Step, do_step, is_done


@pytest.fixture
def made():
    return []


def _step(path, made, content="x", settings=None, parents=()):
    def make():
        made.append(path.name)
        with write_artifact(path, "data") as writer:
            (writer.path / "file").write_text(content)

    return Step(path, make, settings or {}, tuple(parents))


def test_a_finished_step_counts_until_its_settings_change(tmp_path, made):
    records = tmp_path / "steps"
    step = _step(tmp_path / "run" / "a", made)
    assert not is_done(step, records)
    do_step(step, records)
    assert is_done(step, records)
    assert not is_done(_step(tmp_path / "run" / "a", made, settings={"k": 1}), records)


def test_a_changed_parent_undoes_its_children(tmp_path, made):
    records = tmp_path / "steps"
    parent = _step(tmp_path / "run" / "a", made)
    do_step(parent, records)
    child = _step(tmp_path / "run" / "b", made, parents=[parent.path])
    do_step(child, records)
    assert is_done(child, records)
    do_step(_step(tmp_path / "run" / "a", made, content="y"), records)
    assert not is_done(child, records)


def test_an_altered_artifact_is_made_again(tmp_path, made):
    records = tmp_path / "steps"
    step = _step(tmp_path / "run" / "a", made)
    do_step(step, records)
    (step.path / "file").write_text("z")
    assert not is_done(step, records)


def test_without_its_parent_a_step_is_not_done(tmp_path, made):
    step = _step(tmp_path / "run" / "b", made, parents=[tmp_path / "run" / "a"])
    assert not is_done(step, tmp_path / "steps")
