"""What the README shows is run as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
from small_road import write_silo

ROOT = Path(__file__).parents[2]


def _blocks(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_quick_start_runs_as_it_is_printed(tmp_path, monkeypatch, capsys, tiny_model_directory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_model_directory, tmp_path / "my-model")
    write_silo(tmp_path / "my-notes", 0)
    (block,) = _blocks("README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "[CPF]" in printed
    assert "529.982.247-25" not in printed


@pytest.mark.parametrize("name", ["README.md", "README.pt-BR.md", "CONTRIBUTING.md"])
def test_links_within_the_project_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = [block for block in _blocks("README.md", "text") if "src/mutirao/" in block]
    named = set(re.findall(r"^  (\w+)(?:/|\.py)", tree, flags=re.MULTILINE))
    folder = ROOT / "src" / "mutirao"
    actual = {path.stem for path in folder.iterdir() if not path.name.startswith(("_", "py"))}
    assert named == actual


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text("utf-8")):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
