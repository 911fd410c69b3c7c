"""Every command of the how-to pages, run as it stands there, with a tiny random model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_road import SMALL_RECIPE, write_silo
from small_stores import has_kernels
from synthetic_gguf import engine_home
from tiny_trained import make_text, write_trained
from warm_commands import warm_commands

FOLDER = Path(__file__).parents[2] / "docs" / "how-to"
PAGES = sorted({*FOLDER.glob("*.md")} - {FOLDER / "three-sites.md"})  # test_three_sites.py
SLOW = {"own-folders"}  # the whole road, which test_road.py also takes
WARM = {"advise", "all-weights", "compress", "export", "federation-report"}
"""Pages of many commands that load a model in PyTorch."""
pytestmark = pytest.mark.timeout(900)


def _marked(page):
    marks = [pytest.mark.slow] if page.stem in SLOW else []
    return pytest.param(page, id=page.stem, marks=marks)


def _settings(model):
    """The small road's recipe without its silos, which the page names itself."""
    recipe = SMALL_RECIPE.format(model=json.dumps(str(model)), north='""', south='""')
    return re.sub(r"\[silos\].*?\n\n", "", recipe, flags=re.DOTALL)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A folder with a home where this machine has been probed; nothing without kernels."""
    folder = tmp_path_factory.mktemp("probed")
    if has_kernels():
        with engine_home(folder / "home", num_threads=len(os.sched_getaffinity(0))):
            pass
    return folder


@pytest.fixture(scope="module")
def warm():
    with warm_commands() as folder:
        yield folder


@pytest.mark.parametrize("page", [_marked(page) for page in PAGES])
def test_commands_run_as_printed(page, tmp_path, tiny_model_directory, probed, request):
    write_silo(tmp_path / "clinic", 0)
    write_silo(tmp_path / "laboratory", 500)
    (tmp_path / "recipe.toml").write_text(_settings(tiny_model_directory))
    shutil.copytree(probed, tmp_path, dirs_exist_ok=True)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if page.stem in WARM:
        paths.insert(0, str(request.getfixturevalue("warm")))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "MUTIRAO_HOME": str(tmp_path / "home"),
    }
    if page.stem == "advise":  # a random model loses nothing by rounding
        write_trained(tiny_model_directory, tmp_path / "model")
        (tmp_path / "notes.txt").write_text(make_text(1200))
    else:
        shutil.copytree(tiny_model_directory, tmp_path / "model")
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
        if language == "python" and page.stem == "serve":
            continue  # asks the server; test_serve.py runs it
        shell = ["bash", "-euo", "pipefail", "-c", block]
        result = subprocess.run(
            shell if language == "sh" else [sys.executable, "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
    if page.stem == "own-folders":
        assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
