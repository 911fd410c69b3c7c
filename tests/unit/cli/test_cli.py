"""The command line: instant help, exit codes, clear words."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

MUTIRAO = str(Path(sys.executable).parent / "mutirao")
HEAVY = ("torch", "transformers", "flwr", "numpy", "spacy", "datatrove", "matplotlib", "peft")


def mutirao(*arguments, **options):
    return subprocess.run(
        [MUTIRAO, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.alone
def test_help_answers_in_half_a_second():
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert mutirao("--help").returncode == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import mutirao.cli.app; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_recipe_types_import_no_framework():
    code = (
        "import sys; import mutirao.demo.recipe; "
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_schema_is_json_with_descriptions():
    schema = json.loads(mutirao("schema").stdout)
    assert schema["properties"]["question"]["description"]


def test_init_writes_a_recipe_that_loads_as_the_defaults(tmp_path):
    from mutirao.config import load_recipe
    from mutirao.demo.recipe import DemoRecipe

    path = tmp_path / "recipe.toml"
    assert mutirao("init", str(path)).returncode == 0
    assert load_recipe(DemoRecipe, path) == DemoRecipe()
    again = mutirao("init", str(path))
    assert again.returncode == 2
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--config", "nowhere.toml"], "does not exist"),
        (["demo", "--set", "lora.rnk=4"], "did you mean rank?"),
        (["demo", "--set", "lora.rank=many"], "lora.rank"),
        (["demo", "--set", "nonsense"], "dotted.key=value"),
        (["demo", "--silo", "one"], "NAME=FOLDER"),
        (["demo", "--silo", "a=/tmp", "--silo", "a=/tmp"], "twice"),
        (["demo", "--silo", "a=/nowhere-1"], "at least two"),
        (["demo", "--silo", "a=/nowhere-1", "--silo", "b=/nowhere-2"], "not a folder"),
        (["demo", "--set", 'model="pypi:x"'], "pypi:PACKAGE==VERSION"),
        (["report", "nowhere-at-all"], "nowhere-at-all"),
        (["run", "nowhere-at-all", "--prompt", "x"], "nowhere-at-all"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    result = mutirao(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path):
    run = tmp_path / "run"
    result = mutirao("demo", "--dry-run", "--json", "--out", str(run))
    estimate = json.loads(result.stdout)
    assert estimate["training_tokens"] >= 90_000
    assert estimate["seconds"] > 0
    assert not run.exists()


def test_doctor_reports_as_json():
    findings = {row["name"]: row for row in json.loads(mutirao("doctor", "--json").stdout)}
    assert findings["torch"]["status"] == "ok"
    assert "free" in findings["disk"]["value"]
