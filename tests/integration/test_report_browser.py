"""The report in a real browser: shown whole, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib import image

from mutirao.report import write_report

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name)) is not None
    ),
    None,
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing (apt-get install chromium)"),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
DARK = "--blink-settings=preferredColorScheme=0"
MEASURE = """
<body style="margin:0"><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}">
</iframe><pre id="result"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const shown = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre"));
  const wide = shown.filter(e => e.getBoundingClientRect().right > {width} + 0.5);
  const tiny = [...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect())
    .filter(box => box.width > 0 && box.height < 9);
  document.querySelector("#result").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    wide: wide.map(e => e.tagName + "." + (e.getAttribute("class") || "")).slice(0, 5),
    drawn: [...page.querySelectorAll("svg.figure")].filter(e => e.clientWidth > 0).length,
    tiny: tiny.length,
  }});
}};
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).parents[1] / "unit" / "report" / "synthetic_run.py"
    spec = importlib.util.spec_from_file_location("synthetic_run", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Path = module.write_synthetic_run(tmp_path_factory.mktemp("browser") / "run")
    return write_report(run)


def browse(page: Path, profile: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_headline_numbers_are_in_the_dom(report: Path, tmp_path: Path) -> None:
    dom = browse(report, tmp_path / "profile", "--dump-dom")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", dom))
    for words in ("−0.253", "198 of 204", "0.58 → 0.76", "9 min 48 s", "0.29"):
        assert words in text
    assert dom.count("<svg") == 10


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_fits_the_screen(report: Path, tmp_path: Path, width: int) -> None:
    wrapper = tmp_path / "wrapper.html"
    page = html.escape(report.read_text(encoding="utf-8"))
    wrapper.write_text(
        "<!doctype html><meta charset=utf-8>" + MEASURE.format(width=width, page=page)
    )
    dom = browse(wrapper, tmp_path / "profile", "--dump-dom", "--window-size=1400,1000")
    found = re.search(r'<pre id="result">(.*?)</pre>', dom)
    assert found is not None
    result = json.loads(html.unescape(found.group(1)))
    assert result == {"width": width, "wide": [], "drawn": 5, "tiny": 0}


def test_light_and_dark_are_each_legible(report: Path, tmp_path: Path) -> None:
    brightness = []
    for name, flags in (("light", ()), ("dark", (DARK,))):
        shot = tmp_path / f"{name}.png"
        size = "--window-size=1280,2400"
        browse(report, tmp_path / f"profile-{name}", f"--screenshot={shot}", size, *flags)
        pixels = image.imread(shot)[..., :3]
        assert pixels.shape == (2400, 1280, 3)
        background = pixels[5, 5].mean()
        brightness.append(background)
        # Text and figures stand out from the background over the page.
        assert (abs(pixels.mean(axis=2) - background) > 0.5).mean() > 0.01
    assert brightness[0] > 0.9
    assert brightness[1] < 0.2
