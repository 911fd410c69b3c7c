from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import matplotlib
import pytest
from seen_page import Page
from synthetic_run import SILOS, write_synthetic_run

from mutirao.errors import InputError
from mutirao.evaluate.losses import Difference
from mutirao.report import figures, wording
from mutirao.report.collect import summarize
from mutirao.report.drawing import spread
from mutirao.report.page import heat, next_commands, render_page, write_report


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return render_page(summarize(run))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_elements_are_balanced(page: Page) -> None:
    assert page.open == []


def test_headline_figures_are_there(page: Page) -> None:
    # mean of −0.21, −0.19 and −0.36; 1.4196 MB over 4.95 MB
    for words in (
        "−0.253",
        "0.29",
        "198 of 204",
        "0.58 → 0.76",
        "9 min 48 s",
        "peak 3.0 GB",
        "22 % lower perplexity",
        "Names of people are not removed.",
        "The patients are synthetic.",
        "comes from a 4-bit file (Q4_1), so its 4-bit figure flatters",
        "This is no medical advice.",
        "0 of 60 injected",
    ):
        assert words in page.text


def test_every_silo_and_model_is_in_the_table(html: str) -> None:
    table = Page(html[html.index('<table class="heat">') :].split("</table>")[0])
    for silo in SILOS:
        assert f"{silo} alone" in table.text
    assert table.tags.count("tr") == 4
    assert table.tags.count("td") == 15


def test_all_figures_are_drawn_for_both_widths(page: Page) -> None:
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 10
    assert len(set(labels)) == 5


def test_ids_are_unique_and_references_meet(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, name, value in page.attributes if name == "href"]
    assert set(targets) <= set(ids)
    clips = re.findall(r"url\(#([^)]+)\)", " ".join(value for *_, value in page.attributes))
    assert set(clips) <= set(ids)


def test_nothing_is_loaded_and_nothing_runs(html: str, page: Page) -> None:
    assert "script" not in page.tags
    assert not {"link", "img", "iframe", "object", "embed", "video", "audio"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href", "action", "data", "srcset"}:
            assert value.startswith("#")
        if name == "style":
            assert "url(h" not in value
    assert not re.search(r"@import|url\(\s*['\"]?(https?:|//)", html)
    assert "default-src 'none'" in html


def test_excerpts_of_private_text_are_left_out(html: str) -> None:
    assert "SECRET-EXCERPT" not in html


def test_same_run_gives_the_same_bytes(run: Path, html: str) -> None:
    assert render_page(summarize(run)) == html


def test_matplotlib_settings_are_as_before(run: Path) -> None:
    before = dict(matplotlib.rcParams)
    figures.draw_losses(summarize(run))
    assert dict(matplotlib.rcParams) == before


def test_hostile_names_and_answers_stay_text(tmp_path: Path) -> None:
    silos = ("<b onclick=x()>&amp;", '"><img src=x>', "$\\frac{1}$ 病院")
    answer = "</p><script>alert(1)</script><svg/onload=alert(2)>"
    run = write_synthetic_run(tmp_path / "run", silos=silos, answer=answer)
    page = Page(render_page(summarize(run)))
    assert page.open == []
    assert not {"script", "img", "b"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert answer in "".join(page.words)
    for silo in silos:
        assert silo in "".join(page.words)


@pytest.mark.parametrize("until", ["data", "federated"])
def test_partial_run_gives_a_page_that_says_so(tmp_path: Path, until: str) -> None:
    run = write_synthetic_run(tmp_path / "run", until=until)
    path = write_report(run)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == run / "report.html"
    assert page.open == []
    assert "This run is not complete." in page.text
    assert "Not there yet: the answer" in page.text
    assert "mutirao demo --out" in page.text
    assert "mutirao chat" not in page.text


def test_barely_started_run_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert "the base model (model)" in page.text


def test_losses_that_are_not_told_do_not_stop_the_page(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", until="federated")
    path = run / "federated" / "rounds.json"
    path.write_text(re.sub(r'"train_loss": [0-9.]+', '"train_loss": null', path.read_text()))
    assert "not told" in Page(render_page(summarize(run))).text


def test_no_run_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_do_not_stop_the_page(run: Path) -> None:
    summary = summarize(run)
    row = summary.losses[0]
    broken = {**row.differences, "federated": Difference(-0.1, math.inf)}
    broken["alone-research"] = Difference(math.nan, math.nan)
    losses = (dataclasses.replace(row, differences=broken), *summary.losses[1:])
    page = Page(render_page(dataclasses.replace(summary, losses=losses)))
    assert "± unknown" in page.text
    assert "not finite" in page.text


def test_many_silos_with_long_names_are_drawn(run: Path) -> None:
    summary = summarize(run)
    row = summary.losses[0]
    rows = tuple(dataclasses.replace(row, silo=f"ward-{n:02d}-" + "x" * 60) for n in range(9))
    figure = figures.draw_losses(dataclasses.replace(summary, losses=rows))
    assert figure is not None
    assert figure.count("…") > 0


def test_commands_quote_the_run_folder(run: Path) -> None:
    summary = dataclasses.replace(summarize(run), run="/tmp/my runs/a'b")
    commands = [command for command, _ in next_commands(summary)]
    assert commands[-2] == """mutirao report '/tmp/my runs/a'"'"'b'"""
    assert commands[-1].startswith("mutirao demo --silo clinic=")


def test_heat_says_better_in_blue_and_worse_in_orange() -> None:
    assert "0, 114, 178, 0.550" in heat(Difference(-0.4, 0.1), 0.4)
    assert "230, 120, 0, 0.275" in heat(Difference(0.2, 0.1), 0.4)
    assert heat(None, 0.4) == ""
    assert heat(Difference(math.nan, 0.1), 0.4) == ""


def test_labels_are_moved_apart_in_their_order() -> None:
    moved = spread([1.0, 1.1, 5.0], 2.0)
    assert moved[1] - moved[0] == pytest.approx(2.0)
    assert moved[2] > moved[1]
    assert spread([3.0, 9.0], 2.0) == [3.0, 9.0]
    assert spread([], 2.0) == []


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (-0.25349, 3, "−0.253"),
        (0.02, 3, "+0.020"),
        (-0.0001, 3, "0.000"),
        (math.inf, 3, "not finite"),
    ],
)
def test_signed(value: float, decimals: int, expected: str) -> None:
    assert wording.signed(value, decimals) == expected


def test_small_errors_get_a_fourth_digit() -> None:
    assert wording.plus_minus(Difference(0.00031, 0.00012)) == "+0.0003 ± 0.0001"
    assert wording.plus_minus(Difference(-0.21, 0.014)) == "−0.210 ± 0.014"
    assert wording.plus_minus(None) == "–"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.2868, "0.29"), (0.00123, "0.0012"), (3.46, "3.5"), (46.2, "46"), (1234.0, "1234"),
     (0.0, "0"), (None, "unknown")],
)  # fmt: skip
def test_ratio(value: float | None, expected: str) -> None:
    assert wording.ratio(value) == expected


def test_headline_claims_nothing_within_uncertainty(run: Path) -> None:
    summary = summarize(run)
    unclear = dataclasses.replace(summary, mean_difference=Difference(-0.01, 0.02))
    assert "no differently" in wording.headline(unclear)
    worse = dataclasses.replace(summary, mean_difference=Difference(0.1, 0.01))
    assert "worse: 11\N{NO-BREAK SPACE}% higher perplexity" in wording.headline(worse)
