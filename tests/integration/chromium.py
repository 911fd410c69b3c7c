"""Pages in a real browser: what it shows, how wide that is, and how it prints."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name)) is not None
    ),
    None,
)
NEEDED = [
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


def browse(page: Path, profile: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measure(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """Return how a page lies on a screen of a width."""
    wrapper = folder / "wrapper.html"
    text = html.escape(page.read_text(encoding="utf-8"))
    wrapper.write_text(
        "<!doctype html><meta charset=utf-8>" + MEASURE.format(width=width, page=text)
    )
    dom = browse(wrapper, folder / "profile", "--dump-dom", "--window-size=1400,1000")
    found = re.search(r'<pre id="result">(.*?)</pre>', dom)
    assert found is not None
    result: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return result


def count_printed_pages(page: Path, folder: Path) -> tuple[int, list[float]]:
    """Print a page; return its sheets and the size of one, in points."""
    printed = folder / "printed.pdf"
    browse(page, folder / "profile", f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    content = printed.read_bytes()
    box = re.search(rb"/MediaBox *\[([^]]*)\]", content)
    assert box is not None
    return len(re.findall(rb"/Type */Page\b", content)), [float(x) for x in box.group(1).split()]
