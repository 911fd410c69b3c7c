from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from seen_page import Page
from synthetic_advice import LOSS, NUM_BLOCKS, make_advice, noise_of, write_advice
from typer.testing import CliRunner

from mutirao.artifact import open_artifact
from mutirao.cli.app import app
from mutirao.errors import ArtifactError
from mutirao.report.advice import (
    is_advice,
    print_advice,
    read_advice,
    write_advice_report,
)
from mutirao.report.advice.charts import law_line, law_points, layer_series
from mutirao.report.advice.document import Interval
from mutirao.report.advice.page import prospect_rows, render_advice
from mutirao.report.advice.rises import (
    in_percent,
    interval_words,
    number_words,
    percent_words,
    range_words,
    size_ticks,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_advice(tmp_path_factory.mktemp("advice") / "advice", make_advice())


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return render_advice(read_advice(folder))


def render(tmp_path: Path, document: dict[str, Any]) -> Page:
    return Page(render_advice(read_advice(write_advice(tmp_path / "advice", document))))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_everything_asked_for_is_on_the_page(html: str) -> None:
    page = Page(html)
    assert page.open == []
    document = make_advice()
    chosen = document["candidates"][document["recommended"]]
    share = 100 * chosen["rise"]["mean"] / LOSS
    half = 100 * 1.96 * chosen["measured"]["standard_error"] / LOSS
    text = plain(page.text)
    for words in (
        document["sentence"],
        "144.4 MB on disk, 360.0 MB now",
        "16 → 6.42 bits per weight",
        f"+{share:.3f} %",
        f"± {half:.3f} %",
        "234.4 MB",
        "21.2",
        "10 ways measured",
        "on 12,240 held-out tokens; 20 to choose from",
        "at most 400.0 MB of memory",
        "at most 200.0 MB of disk",
        "a rise of the loss of at most 2 %",
        "to the power of 1.00 ± 0.07",
        "1 that cost more than a nat were left out",
        "Most sensitive: model.layers.0.mlp, with 0.023 nats per token.",
        "not on this logarithmic figure: 1",
        "The mix is worth it",
        "It takes 144.0 MB",
        "loses 0.123 nats per token against this choice (+4.94 %)",
        "gains 0.057 nats per token",
        "may help or hurt; it hurts from 3.1 × 10¹² tokens on",
        "4.2 × 10¹¹ to ∞",
        "17 % of the tokens with rounding on",
        "costs less from 1.1 × 10⁹ requests on",
        "323,456",
        "Nothing of it was measured on this model.",
        "A remark of its own.",
        "hf:made/up@1",
    ):
        assert words in text
    assert document["sentence"] in html[html.index("<h1>") : html.index("</h1>")]


def test_every_candidate_is_in_the_table(html: str) -> None:
    table = Page(html[html.index('id="candidates"') :].split("<table>")[1].split("</table>")[0])
    rows = make_advice()["candidates"]
    assert table.tags.count("tr") == 1 + len(rows)
    for row in rows:
        words = f"{row['bits']} bits in groups of {row['group_size']} by {row['method']}"
        assert words in table.text
        assert f"{row['total_bytes'] / 1e6:.1f} MB" in table.text
        assert f"{row['bits_per_weight']:.2f}" in table.text
    assert table.text.count("★") == 1
    assert table.text.count("over budget") == sum(not row["fits"] for row in rows)


def test_page_is_inert_and_its_references_meet(html: str) -> None:
    page = Page(html)
    page.check_is_inert()
    assert "default-src 'none'" in html
    assert not re.search(r"url\((?!#)", html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in page.attributes if name == "href"} <= set(ids)


def test_three_figures_say_what_they_show(html: str) -> None:
    labels = [v for tag, name, v in Page(html).attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 6
    assert len(set(labels)) == 3
    assert "the one to take is 4 bits in groups of 32 by gptq, 144.4 MB" in labels[0]
    assert "disk 200.0 MB" in html
    assert "allowed 2 %" in html


def test_same_document_gives_the_same_bytes(folder: Path, html: str) -> None:
    assert render_advice(read_advice(folder)) == html


def test_law_is_drawn_only_where_it_was_calibrated(folder: Path) -> None:
    advice = read_advice(folder)
    found = law_points(advice)
    assert found is not None
    # 8 measured candidates and one other way; the other lies below zero.
    assert len(found.measured) == 9
    assert found.num_below == 1
    (low, high), rises = found.lines["gptq"]
    assert (low, high) == (noise_of(5, 32), noise_of(2, 128))
    assert rises == pytest.approx([100 * 0.4 * noise / LOSS for noise in (low, high)], rel=1e-6)
    for rows in found.bands.values():
        assert all(low <= noise <= high for noise, _, _ in rows)
    row = found.bands["rtn"][0]
    assert row[0] == noise_of(4, 32)
    assert row[1:] == pytest.approx([80 * row[0] / LOSS / 1.6, 80 * row[0] / LOSS * 1.6])
    assert law_line(advice, "awq") is None


def test_depth_kind_and_bits_of_layers_are_read_from_names(folder: Path) -> None:
    series = layer_series(read_advice(folder))
    assert list(series) == ["attention", "network"]
    for points in series.values():
        assert [each.depth for each in points] == list(range(NUM_BLOCKS))
        assert [each.bits for each in points] == ["8", "4", "3", "4"] * 1 + [
            str(3 + n % 2) for n in range(4, NUM_BLOCKS)
        ]
    assert series["attention"][1].divergence == pytest.approx(0.01)


def test_bare_document_gives_a_page(tmp_path: Path) -> None:
    row = {
        key: make_advice()["candidates"][0][key]
        for key in ("method", "bits", "group_size", "total_bytes", "bits_per_weight", "rise")
    }
    keys = ("model", "loss", "num_weights", "original_bytes", "num_tokens", "sentence")
    document = {key: make_advice()[key] for key in keys}
    page = render(tmp_path, {**document, "candidates": [row], "recommended": 0})
    assert page.open == []
    for words in (
        "No budget was given",
        "The noise of each way is not in this advice",
        "The layers were not rounded one by one",
        "Nothing is foretold beyond this checkpoint",
        "predicted, not measured",
    ):
        assert words in page.text


def test_what_has_an_interval_shows_it_and_what_has_none_says_so(tmp_path: Path) -> None:
    advice = read_advice(write_advice(tmp_path / "advice", make_advice()))
    half, double, *others = prospect_rows(advice)
    assert half[2] == "+0.101 to +0.150 nats"
    assert double[2] == "no interval"  # written by an earlier version
    assert others[-1][2] == "no interval"
    page = Page(render_advice(advice))
    assert "This is arithmetic on them, so that it has no interval; how long" in page.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mix": None}, "No mix of bits was tried"),
        ({"parts": [], "mix": None}, "not rounded one by one"),
        ({"budget": {"memory_bytes": None, "disk_bytes": None, "loss_share": None}}, "No budget"),
        (
            {"prospects": {"more_training": None, "other_sizes": [], "qat_share": None,
                           "bill": None, "notes": ["It was not told."]}},
            "It was not told.",
        ),
        ({"other_measured": []}, "8 ways measured"),
        ({"law": {**make_advice()["law"], "parameters": {}}}, "The law"),
    ],
)  # fmt: skip
def test_missing_parts_do_not_break_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    page = render(tmp_path, make_advice() | changes)
    assert page.open == []
    assert words in page.text


def test_speeds_and_noise_may_be_missing(tmp_path: Path) -> None:
    document = make_advice()
    for row in (*document["candidates"], *document["other_measured"]):
        row.pop("speed", None)
        row.pop("noise")
    page = render(tmp_path, document)
    assert page.open == []
    assert "to run in" not in page.text[: page.text.index("The choice")]
    assert "The noise of each way is not in this advice" in page.text


def test_model_that_does_not_run_in_the_memory_says_so(tmp_path: Path) -> None:
    document = make_advice()
    document["candidates"][document["recommended"]]["speed"]["tokens_per_s"] = None
    assert "does not run within the 400.0 MB asked for" in render(tmp_path, document).text


def test_rises_beyond_all_measure_are_drawn(tmp_path: Path) -> None:
    document = make_advice()
    for row in document["candidates"]:
        if row["measured"] is None:
            row["predicted"] = row["rise"] = {"mean": 1e200, "low": -1e300, "high": 1e300}
    assert render(tmp_path, document).open == []


def test_rises_of_zero_and_below_are_drawn(tmp_path: Path) -> None:
    document = make_advice()
    for row in document["candidates"]:
        row["rise"] = {"mean": 0.0, "low": -0.0, "high": 0.0}
        row["measured"] = None
    assert render(tmp_path, document).open == []


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script><img src=x onerror=y()>'
    document = make_advice() | {"model": hostile, "sentence": hostile, "remarks": [hostile]}
    document["parts"] = [{"name": hostile, "divergence": 1.0}]
    document["mix"]["bits"] = {hostile: 4}
    document["prospects"]["notes"] = [hostile]
    document["prospects"]["bill"]["original"]["name"] = hostile
    for row in document["candidates"]:
        row["method"] = hostile
        if row["speed"]:
            row["speed"]["quantization"] = hostile
    page = render(tmp_path, document)
    assert page.open == []
    page.check_is_inert()
    assert "".join(page.words).count(hostile) > 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(make_advice() | {"recommended": 99}), "recommends candidate 99 of 20"),
        (json.dumps(make_advice() | {"candidates": []}), "candidates"),
        (json.dumps(make_advice() | {"loss": 0}), "loss"),
        (json.dumps(make_advice() | {"loss": math.nan}), "loss"),
        (json.dumps(make_advice() | {"original_bytes": 10**400}), "original_bytes"),
        (json.dumps({"model": "x"}), "is damaged"),
    ],
)
def test_damaged_document_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    folder = write_advice(tmp_path / "advice", text)
    with pytest.raises(ArtifactError, match=re.escape(words)) as caught:
        write_advice_report(folder)
    assert str(caught.value).count("\n") == 0
    assert len(str(caught.value)) < 400
    assert not (folder / "report.html").exists()


def test_altered_document_is_refused(tmp_path: Path) -> None:
    folder = write_advice(tmp_path / "advice", make_advice())
    path = folder / "advice.json"
    path.write_text(path.read_text().replace("small-model", "other-model"))
    with pytest.raises(ArtifactError, match="was altered"):
        read_advice(folder)


def test_verb_writes_a_page_that_leaves_the_artifact_whole(tmp_path: Path) -> None:
    folder = write_advice(tmp_path / "advice", make_advice())
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert str(folder / "report.html") in result.output.replace("\n", "")
    assert (folder / "report.html").stat().st_size > 10_000
    open_artifact(folder, "advice")
    assert is_advice(folder)
    again = CliRunner().invoke(app, ["report", str(folder), "--json"])
    numbers = json.loads(again.stdout)
    assert numbers["chosen"]["total_bytes"] == 144_375_000
    chosen = make_advice()["candidates"][numbers["recommended"]]
    assert numbers["chosen"]["rise_share"]["mean"] == pytest.approx(chosen["rise"]["mean"] / LOSS)


def test_terminal_shows_names_as_they_are(tmp_path: Path) -> None:
    document = make_advice() | {"sentence": "[bold]take[/] it"}
    console = Console(width=160, record=True)
    print_advice(read_advice(write_advice(tmp_path / "advice", document)), console)
    text = console.export_text()
    assert "[bold]take[/] it" in text
    assert "← take this" in text


def test_numbers_in_words() -> None:
    rise = in_percent(Interval(0.011, 0.009, 0.013), 2.0)
    assert plain(interval_words(rise)) == "+0.55 % ± 0.10 %"
    assert plain(range_words(rise)) == "+0.55 % (+0.45 to +0.65 %)"
    assert plain(percent_words(-0.0421)) == "−0.042 %"
    assert plain(percent_words(12.34)) == "+12.3 %"
    assert plain(percent_words(1234.5)) == "+1234 %"
    assert plain(number_words(2.1e-7)) == "2.1 × 10⁻⁷"
    assert plain(number_words(1e12)) == "1 × 10¹²"
    assert number_words(1234.0) == "1,234"
    assert number_words(None) == "∞"


@pytest.mark.parametrize(
    ("low", "high"), [(9e7, 2.6e8), (1e8, 1.01e10), (144e6, 145e6), (1, 1e15), (7e8, 7.7e8)]
)
def test_ticks_of_sizes_are_round_and_apart(low: float, high: float) -> None:
    ticks = size_ticks(low, high, most=7)
    assert len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))
    if high / low > 1.5:
        assert len(ticks) >= 2
