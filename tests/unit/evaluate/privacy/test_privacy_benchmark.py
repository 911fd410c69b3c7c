"""The privacy benchmark at its smallest: it goes on where it stopped, and its controls hold."""

import json
import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks"))
import bench_privacy
from privacy_settings import DATA


@pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is missing; name its parent in MUTIRAO_TEST_DATA"
)
def test_short_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "privacy.json"
    arguments = ["bench", "--short", "--run", str(tmp_path / "run"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--figure", str(tmp_path / "privacy.svg")])
    logger = logging.getLogger("mutirao.train.private")
    monkeypatch.setattr(logger, "level", logger.level)  # put back: other tests hear this logger
    assert bench_privacy.main() == 0
    result = json.loads(out.read_bytes())
    conditions = result["conditions"]
    found = {name: row["positions"]["server"] for name, row in conditions.items()}
    assert found["untrained"]["membership"]["auc"] < 0.6
    assert found["plain"]["membership"]["auc_low"] > 0.7
    assert found["dp-low"]["membership"]["auc"] < found["plain"]["membership"]["auc_low"]
    assert conditions["plain"]["tokens"]["attribution"]["accuracy"] == 1.0
    summed = conditions["secure-aggregated"]["tokens"]
    assert summed["attribution"]["low"] < 0.25 < summed["attribution"]["high"]
    assert summed["attribution_when_one_leaves"]["accuracy"] > summed["attribution"]["high"]
    for row in conditions.values():
        if row["claimed_epsilon"] is not None:
            assert all(
                each["audit"]["epsilon"] <= row["claimed_epsilon"]
                for each in row["positions"].values()
            )
    many = result["many_runs_small_model"]
    assert many["as claimed"]["epsilon"] <= many["as claimed"]["claimed_epsilon"]
    assert many["no noise"]["epsilon"] > 1.5
    assert (tmp_path / "privacy.svg").is_file()
    # A second call finds everything done, and says the same.
    capsys.readouterr()
    logger = logging.getLogger("mutirao.train.private")
    monkeypatch.setattr(logger, "level", logger.level)  # put back: other tests hear this logger
    assert bench_privacy.main() == 0
    assert json.loads(out.read_bytes()) == result
    assert capsys.readouterr().err == ""
