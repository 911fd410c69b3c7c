"""The federation's page on any screen, and the evidence sheet on one A4 page of paper."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType

import chromium
import pytest

from mutirao.report.federation import write_evidence, write_federation_report

pytestmark = chromium.NEEDED
A4_POINTS = (595, 842)


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    source = Path(__file__).parents[1] / "unit" / "report" / "synthetic_federation.py"
    spec = importlib.util.spec_from_file_location("synthetic_federation", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = synthetic.write_coordinator(tmp_path_factory.mktemp("federation") / "work")
    synthetic.write_measures(work)
    return write_federation_report(work)


def test_numbers_are_in_the_dom(report: Path, tmp_path: Path) -> None:
    dom = chromium.browse(report, tmp_path / "profile", "--dump-dom")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", dom))
    for words in ("3.200 → 2.900", "6.7", "+0.120", "west pulls against the others"):
        assert words in text
    assert dom.count("<svg") == 8


@pytest.mark.parametrize("width", [320, 1280])
def test_page_fits_the_screen(report: Path, tmp_path: Path, width: int) -> None:
    result = chromium.measure(report, tmp_path, width)
    assert result == {"width": width, "wide": [], "drawn": 4, "tiny": 0}


@pytest.mark.parametrize("language", ["en", "pt-BR"])
@pytest.mark.parametrize("is_protected", [False, True])
def test_sheet_of_ten_rounds_is_one_a4_page(
    synthetic: ModuleType,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    language: str,
    is_protected: bool,
) -> None:
    caplog.set_level(logging.ERROR, "mutirao.federated.site.policy")
    policy = tmp_path / "policy.toml"
    work = synthetic.write_site(
        tmp_path / "site", is_masked=is_protected, is_private=is_protected, policy=policy
    )
    attacks = synthetic.write_attacks(tmp_path / "privacy.json")
    sheet = write_evidence(work, policy=policy, attacks=attacks, language=language)
    num_pages, box = chromium.count_printed_pages(sheet, tmp_path)
    assert num_pages == 1
    assert box[2:] == pytest.approx(A4_POINTS, abs=1)


def test_sheet_fits_a_phone(synthetic: ModuleType, tmp_path: Path) -> None:
    sheet = write_evidence(synthetic.write_site(tmp_path / "site"))
    result = chromium.measure(sheet, tmp_path, 390)
    assert (result["width"], result["wide"]) == (390, [])
