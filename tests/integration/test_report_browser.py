"""The report in a real browser: shown whole, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import chromium
import pytest
from matplotlib import image

from mutirao.report import write_report
from mutirao.report.advice import write_advice_report, write_models_report

pytestmark = chromium.NEEDED


def load_synthetic(name: str) -> ModuleType:
    source = Path(__file__).parents[1] / "unit" / "report" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = load_synthetic("synthetic_run")
    run: Path = module.write_synthetic_run(tmp_path_factory.mktemp("browser") / "run")
    return write_report(run)


@pytest.fixture(scope="module")
def advice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = load_synthetic("synthetic_advice")
    folder = tmp_path_factory.mktemp("advice") / "advice"
    return write_advice_report(module.write_advice(folder, module.make_advice()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = load_synthetic("synthetic_advice")
    work = tmp_path_factory.mktemp("models")
    original = module.write_original(work / "original")
    rises = {2: 0.31, 3: 0.046, 4: 0.011, 8: -0.0002}
    return write_models_report(
        [
            module.write_model(work / f"model-of-{bits}-bits", original, bits=bits, rise=rise)
            for bits, rise in rises.items()
        ]
    )


def test_headline_numbers_are_in_the_dom(report: Path, tmp_path: Path) -> None:
    dom = chromium.browse(report, tmp_path / "profile", "--dump-dom")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", dom))
    for words in ("−0.253", "198 of 204", "0.58 → 0.76", "9 min 48 s", "0.29"):
        assert words in text
    assert dom.count("<svg") == 10


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_fits_the_screen(report: Path, tmp_path: Path, width: int) -> None:
    result = chromium.measure(report, tmp_path, width)
    assert result == {"width": width, "wide": [], "drawn": 5, "tiny": 0}


def test_light_and_dark_are_each_legible(report: Path, tmp_path: Path) -> None:
    brightness = []
    for name, flags in (("light", ()), ("dark", (chromium.DARK,))):
        shot = tmp_path / f"{name}.png"
        size = "--window-size=1280,2400"
        chromium.browse(report, tmp_path / f"profile-{name}", f"--screenshot={shot}", size, *flags)
        pixels = image.imread(shot)[..., :3]
        assert pixels.shape == (2400, 1280, 3)
        background = pixels[5, 5].mean()
        brightness.append(background)
        # Text and figures stand out from the background over the page.
        assert (abs(pixels.mean(axis=2) - background) > 0.5).mean() > 0.01
    assert brightness[0] > 0.9
    assert brightness[1] < 0.2


def test_numbers_of_an_advice_are_in_the_dom(advice: Path, tmp_path: Path) -> None:
    dom = chromium.browse(advice, tmp_path / "profile", "--dump-dom")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", dom))
    for words in ("Take 4 bits in groups of 32 by gptq", "on disk, 360.0 MB now", "disk 200.0 MB"):
        assert words in text
    assert dom.count("<svg") == 6


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_pages_of_fewer_bits_fit_the_screen(
    advice: Path, models: Path, tmp_path: Path, width: int
) -> None:
    for page, drawn in ((advice, 3), (models, 1)):
        result = chromium.measure(page, tmp_path, width)
        assert result == {"width": width, "wide": [], "drawn": drawn, "tiny": 0}
