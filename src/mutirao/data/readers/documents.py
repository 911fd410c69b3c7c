"""Documents as records: plain text, Markdown, HTML and PDF, long ones cut at blank lines.

HTML is read for its visible text (Beautiful Soup, over the standard library's parser): scripts,
styles and what is hidden by its tag are left out, navigation is not, which the quality rules see.
A PDF is read for its text layer (pypdf); a scan has none, and is told, not recognised.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator

from mutirao.data.readers.opening import Source, decode, read_lines, read_whole
from mutirao.data.records import Record

PIECE_CHARACTERS = 4000
"""About 1,000 tokens of English: a few training windows; assumption."""
_INVISIBLE = ["script", "style", "template", "noscript", "head", "svg", "object"]
_BLOCKS = [
    *("p", "div", "section", "article", "header", "footer", "table", "tr", "li", "ul", "ol", "br"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "dt", "dd", "figcaption"),
]


def read_text(source: Source) -> Iterator[Record]:
    """Yield the pieces of a plain text or Markdown file."""
    return _records(source, (line for _, line in read_lines(source)))


def read_html(source: Source) -> Iterator[Record]:
    """Yield the pieces of a page's visible text."""
    data = read_whole(source)
    text = decode(source, data) if data is not None else None
    if text is not None:
        yield from _records(source, visible_text(text).split("\n"))


def read_pdf(source: Source) -> Iterator[Record]:
    """Yield the pieces of a PDF's text layer."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it writes what it finds odd
    data = read_whole(source)
    if data is None:
        return
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(data)).pages]
    except (PyPdfError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        # pypdf raises whatever a damaged object leads to.
        source.tell("damaged file", "is no PDF that can be read, or is locked by a password")
        return
    if not any(page.strip() for page in pages):
        source.tell("no text layer", "has no text layer: a scan has to be recognised first")
        return
    yield from _records(source, "\n\n".join(pages).split("\n"))


def visible_text(html: str) -> str:
    """Return what a page shows, a line for each block."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for tag in soup(_INVISIBLE):
        tag.decompose()
    for tag in soup(_BLOCKS):
        tag.insert_before("\n")
        tag.append("\n")
    lines = (" ".join(line.split()) for line in soup.get_text().split("\n"))
    return "\n".join(lines)


def _records(source: Source, lines: Iterable[str]) -> Iterator[Record]:
    for number, piece in enumerate(_split_at_blank_lines(lines), start=1):
        yield Record(id=f"{source.name}#{number}", source=source.name, text=piece)


def _split_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join paragraphs into pieces of at most PIECE_CHARACTERS, cutting longer paragraphs."""
    piece = ""
    for paragraph in _paragraphs(lines):
        for part in _cut(paragraph):
            if piece and len(piece) + 2 + len(part) > PIECE_CHARACTERS:
                yield piece
                piece = part
            else:
                piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    num_characters = 0
    for line in lines:
        if line.strip():
            paragraph.append(line)
            num_characters += len(line)
        # A book without blank lines must not be gathered whole.
        if paragraph and (not line.strip() or num_characters > 4 * PIECE_CHARACTERS):
            yield "\n".join(paragraph)
            paragraph, num_characters = [], 0
    if paragraph:
        yield "\n".join(paragraph)


def _cut(paragraph: str) -> Iterator[str]:
    """Cut a long paragraph at the last line end, else sentence, else space that fits."""
    start = 0
    while len(paragraph) - start > PIECE_CHARACTERS:
        window = paragraph[start : start + PIECE_CHARACTERS]
        end = max(window.rfind("\n"), window.rfind(". ") + 1)
        if end < PIECE_CHARACTERS // 2:
            end = window.rfind(" ")
        if end < PIECE_CHARACTERS // 2:
            end = PIECE_CHARACTERS
        yield paragraph[start : start + end].strip()
        start += end
    if rest := paragraph[start:].strip():
        yield rest
