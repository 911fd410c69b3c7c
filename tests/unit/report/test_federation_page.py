from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from seen_page import Page
from synthetic_federation import digest, write_coordinator, write_measures
from typer.testing import CliRunner

from mutirao.cli.app import app
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.report.federation import print_federation, read_federation, write_federation_report
from mutirao.report.federation.curves import site_curves
from mutirao.report.federation.page import headline, pull_sentence, render_federation


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = write_coordinator(tmp_path_factory.mktemp("federation") / "work")
    write_measures(work)
    return work


@pytest.fixture(scope="module")
def html(work: Path) -> str:
    return render_federation(read_federation(work))


def test_everything_asked_for_is_on_the_page(html: str) -> None:
    page = Page(html)
    assert page.open == []
    for words in (
        "Three sites trained together for 4 of 4 rounds; the run is finished.",
        "11.1 kB went from the sites and 10.0 kB to them, 6.0 kB of it in the first round",
        "140.8 kB for the same steps: 6.7 times as much",
        "2 bytes × 64 × steps, each way",
        "those of west least (−0.20). west pulls against the others.",
        "an update with a value that is not finite was refused",
        "no site told an ε",
        "+0.120",
        "+0.045",
        "3 losses in measures.json are no finite numbers",
        digest("global 4"),
        digest("replica 4"),
        digest("update 1 3"),
        digest("south"),
        digest("run"),
    ):
        assert words in page.text


def test_page_is_inert_and_its_ids_are_unique(html: str) -> None:
    page = Page(html)
    page.check_is_inert()
    assert "default-src 'none'" in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert targets <= set(ids)


def test_figures_are_drawn_for_both_widths(html: str) -> None:
    labels = [v for tag, name, v in Page(html).attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 8
    assert len(set(labels)) == 4


def test_same_folder_gives_the_same_bytes(work: Path, html: str) -> None:
    assert render_federation(read_federation(work)) == html


def test_missing_round_is_a_gap_not_a_zero(work: Path) -> None:
    curves = site_curves(read_federation(work), lambda row: row.train_loss)
    assert [x for x, _ in curves["north"]] == [1, 3, 4]
    assert [x for x, _ in curves["south"]] == [1, 2, 3, 4]


def test_values_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work")
    rows = json.loads((work / "rounds.json").read_bytes())
    rows[1]["sites"]["south"]["train_loss"] = float("inf")
    (work / "rounds.json").write_text(json.dumps(rows))
    curves = site_curves(read_federation(work), lambda row: row.train_loss)
    assert [x for x, _ in curves["south"]] == [1, 3, 4]
    assert Page(write_federation_report(work).read_text(encoding="utf-8")).open == []


def test_secure_and_private_run_says_what_is_not_known(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work", is_secure=True, is_private=True)
    summary = read_federation(work)
    page = Page(render_federation(summary))
    assert pull_sentence(summary) == ""
    for words in (
        "sees the sum alone: it knows neither a site's norm nor its direction",
        "No site told a loss",
        "at δ = 1e-05; budget 3",
        "noise 1.1, clip 1",
    ):
        assert words in page.text


def test_hostile_names_and_sentences_stay_text(tmp_path: Path) -> None:
    sentence = "</td><script>alert(1)</script><svg/onload=alert(2)>"
    site = "<b onclick=x()>&amp;"
    work = write_coordinator(tmp_path / "work", sites=(site, '"><img src=x>'), sentence=sentence)
    answers = {"<img src=y>": {"loss": 1.0}}
    labels = ("global", f"alone {site}", "without <script>")
    (work / "measures.json").write_text(json.dumps({"losses": dict.fromkeys(labels, answers)}))
    journal = CoordinatorJournal(work)
    journal.write_status("failed", "<script>alert(3)</script>")
    page = Page(render_federation(read_federation(work)))
    assert page.open == []
    page.check_is_inert()
    assert "b" not in page.tags
    assert sentence in "".join(page.words)
    assert site in "".join(page.words)


def test_barely_started_run_gives_a_page(tmp_path: Path) -> None:
    CoordinatorJournal(tmp_path).write_status("running")
    page = Page(write_federation_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert "Not there yet: finished rounds" in page.text
    assert "the run goes on" in page.text


def test_only_the_newest_refusals_are_shown(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work")
    lines = [
        json.dumps({"time": "t", "round": 1, "site": "north", "sentence": f"no. {number}."})
        for number in range(1_000)
    ]
    (work / "refused.jsonl").write_text("\n".join(lines))
    page = Page(render_federation(read_federation(work)))
    assert "no. 999." in page.text
    assert "no. 799." not in page.text
    assert "The newest 200 of 1000" in page.text


def test_headline_of_a_failed_run(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work", num_rounds=2)
    CoordinatorJournal(work).write_status("failed", "north is missing")
    summary = read_federation(work)
    assert headline(summary) == "Three sites trained together for 2 of 2 rounds; the run stopped."
    assert "north is missing" in Page(render_federation(summary)).text


def test_terminal_shows_names_as_they_are(tmp_path: Path) -> None:
    work = write_coordinator(tmp_path / "work", sites=("[bold]x[/]", "south"))
    console = Console(width=200, record=True)
    print_federation(read_federation(work), console)
    text = console.export_text()
    assert "[bold]x[/]" in text
    assert "3.000 → 2.700" in text


def test_verb_writes_the_page(work: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(work), "--json"])
    assert result.exit_code == 0, result.output
    assert (work / "report.html").stat().st_size > 10_000
    assert re.search(r'"state": "finished"', result.output)
