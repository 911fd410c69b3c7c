from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from seen_page import Page
from synthetic_advice import make_advice, write_advice, write_model, write_original
from typer.testing import CliRunner

from mutirao.artifact import open_artifact
from mutirao.cli.app import app
from mutirao.errors import InputError
from mutirao.report.advice import print_models, read_models, write_models_report
from mutirao.report.advice.models import find_differences


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    work = tmp_path_factory.mktemp("models")
    original = write_original(work / "original")
    return [
        write_model(work / "small", original),
        write_model(work / "smaller", original, method="rtn", bits=3, rise=0.0462),
        write_model(work / "byte", original, method="rtn", bits=8, rise=-0.0002),
        write_model(work / "cut", original, method="wanda,gptq", rise=None, ideal_bytes=99_000_000),
    ]


def refused(arguments: list[Any]) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def test_all_models_are_on_the_page(folders: list[Path], tmp_path: Path) -> None:
    path = write_models_report(folders, tmp_path / "page.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    page.check_is_inert()
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "Four compressed models; the smallest, smaller, takes 120.0 MB, 5.33 bits per weight, and "
        "its loss rises by 1.85 % ± 0.08 %.",
        "120.0 MB on disk, 360.0 MB before",
        "3.0 times smaller",
        "−0.008 % ± 0.078 %",
        "1 not measured",
        "+0.44 % ± 0.08 %",
        "wanda, gptq, groups of 32",
        "99.0 MB at best",
        "0.0234",
        "1 min 33 s",
        "1.9 GB",
        "9.78",
    ):
        assert words in text
    assert "cannot be held against each other" not in text
    original = read_models(folders)[0].parent_sha256
    assert original is not None
    assert text.count(original[:12]) == 4


def test_figure_names_what_was_measured(folders: list[Path], tmp_path: Path) -> None:
    html = write_models_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    labels = [v for tag, name, v in Page(html).attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 2
    assert "smaller 120.0 MB" in labels[0]
    assert "cut" not in labels[0].split(":")[1]


def test_page_stands_beside_the_first_model(folders: list[Path]) -> None:
    path = write_models_report(folders[:1])
    try:
        assert path == folders[0].parent / "small.html"
        open_artifact(folders[0], "model")
    finally:
        path.unlink()


def test_models_without_a_measured_rise_give_a_page(tmp_path: Path) -> None:
    original = write_original(tmp_path / "original")
    model = write_model(tmp_path / "cut", original, rise=None)
    page = Page(write_models_report([model]).read_text(encoding="utf-8"))
    assert page.open == []
    assert "what it costs was not measured" in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize("value", [float("nan"), "many", True, None, 10**400, 1e300])
def test_metric_that_is_no_number_is_not_measured(tmp_path: Path, value: Any) -> None:
    original = write_original(tmp_path / "original")
    model = write_model(
        tmp_path / "odd", original, peak_memory_bytes=value, **{"heldout.rise": value}
    )
    (found,) = read_models([model])
    assert found.heldout is None
    assert found.peak_memory_bytes is None
    assert Page(write_models_report([model]).read_text(encoding="utf-8")).open == []


def test_models_of_other_origin_are_not_held_against_each_other(tmp_path: Path) -> None:
    first = write_original(tmp_path / "original")
    model = write_model(tmp_path / "small", first)
    other = write_model(tmp_path / "again", model, original=2.6)
    models = read_models([model, other])
    assert find_differences(models) == [
        "they were made from 2 different models",
        "the loss before was 2.5000 to 2.6000 nats per token, so they were not measured on the "
        "same model and text",
    ]
    page = write_models_report([model, other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="differences"' in page
    fewer = write_model(tmp_path / "fewer", first, **{"heldout.num_tokens": 6})
    assert find_differences(read_models([model, fewer])) == [
        "they were measured on different numbers of tokens"
    ]


def test_labels_tell_folders_of_one_name_apart(tmp_path: Path) -> None:
    original = write_original(tmp_path / "original")
    folders = [write_model(tmp_path / name / "four", original) for name in ("a", "b")]
    models = read_models([*folders, folders[0]])
    assert sorted(each.label for each in models) == ["a/four", "b/four"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    original = write_original(tmp_path / "original")
    name = "<script>alert(1)<b onclick=x()>&amp;"
    model = write_model(tmp_path / name, original, method="<img src=x>")
    html = write_models_report([model], tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    page.check_is_inert()
    assert "b" not in page.tags
    assert name in "".join(page.words)
    console = Console(width=200, record=True)
    print_models(read_models([model]), console)
    assert "<img src=x>, groups of 32" in console.export_text()


def test_verb_compares_and_prints_json(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", *map(str, folders), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["byte", "small", "cut", "smaller"]
    assert rows["smaller"]["rise_share"]["mean"] == pytest.approx(0.0462 / 2.5)
    assert rows["cut"]["heldout"] is None
    assert out.stat().st_size > 10_000


def test_bad_input_is_one_sentence(folders: list[Path], tmp_path: Path) -> None:
    advice = write_advice(tmp_path / "advice", make_advice())
    original = folders[0].parent / "original"
    assert "was not compressed" in refused([original])
    assert "is not a compressed model" in refused([folders[0], advice])
    assert "only compressed models are shown together" in refused([advice, advice])
    assert "--out is for" in refused([advice, "--out", tmp_path / "x.html"])
    assert "is a folder" in refused([folders[0], "--out", tmp_path])
    assert "is not a folder" in refused([tmp_path / "nowhere"])
    assert not (tmp_path / "x.html").exists()
    assert not (advice / "report.html").exists()
