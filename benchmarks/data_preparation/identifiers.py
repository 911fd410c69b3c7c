"""How well and how fast identifiers are found, beside Presidio's pattern recognisers.

On made-up notes, whose identifiers are known, ours alone: they hold Brazilian types that Presidio
does not have. On Presidio's own evaluation texts (presidio-research, dev.json), both, on the types
that both have. A find counts when it has the type and the very place of what is there; counts with
any overlap are given beside.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peer_environment import call, make_environment

from data_preparation.notes import make_notes
from mutirao.data.identifiers.recognisers import RECOGNISERS
from mutirao.data.identifiers.search import find_identifiers
from mutirao.environment import cache_directory

REQUIREMENTS = ("presidio-analyzer==2.2.366",)
SHARED_TYPES = {
    "CREDIT_CARD": "CREDIT_CARD",
    "EMAIL_ADDRESS": "EMAIL",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "PHONE_NUMBER": "PHONE",
    "US_SSN": "SSN",
    "URL": "URL",
    "DOMAIN_NAME": "URL",
}
"""Presidio's names, and those of its texts, with ours."""
NUM_NOTES = 4000
ROUNDS = 3

Span = tuple[int, int, str]
Overlap = Callable[[Span, Span], bool]


def measure(texts_path: Path) -> dict[str, Any]:
    """Return quality and speed; ``texts_path`` is presidio-research's dev.json."""
    notes = make_notes(NUM_NOTES, seed=1)
    found = [_ours(note.text) for note in notes]
    labelled = json.loads(texts_path.read_text(encoding="utf-8"))
    texts = [each["full_text"] for each in labelled]
    truth = [_truth(each) for each in labelled]
    ours = [[span for span in _ours(text) if span[2] in SHARED_TYPES.values()] for text in texts]
    theirs, speeds = _beside(texts, [note.text for note in notes])
    return {
        "notes": {
            "num": len(notes),
            "by_type": _by_type([note.spans for note in notes], found),
        },
        "presidio_pii": {
            "num": len(texts),
            "ours": _scores(truth, ours),
            "presidio": _scores(truth, theirs),
        },
        "speed": speeds,
    }


def _ours(text: str) -> list[Span]:
    return [(each.start, each.end, each.type) for each in find_identifiers(text)]


def _truth(labelled: dict[str, Any]) -> list[Span]:
    return [
        (span["start_position"], span["end_position"], SHARED_TYPES[span["entity_type"]])
        for span in labelled["spans"]
        if span["entity_type"] in SHARED_TYPES
    ]


def _is_same(one: Span, other: Span) -> bool:
    return one == other


def _overlaps(one: Span, other: Span) -> bool:
    return one[2] == other[2] and one[0] < other[1] and other[0] < one[1]


def _scores(truth: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]) -> dict[str, Any]:
    return {
        "exact": _score(truth, found, _is_same),
        "overlap": _score(truth, found, _overlaps),
        "by_type": _by_type(truth, found),
    }


def _score(
    truth: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]], match: Overlap
) -> dict[str, float]:
    """Return precision, recall and their harmonic mean over all types together."""
    hits = misses = false = 0
    for right, got in zip(truth, found, strict=True):
        caught = sum(any(match(span, each) for each in got) for span in right)
        hits, misses = hits + caught, misses + len(right) - caught
        false += sum(not any(match(each, span) for span in right) for each in got)
    precision, recall = hits / max(1, hits + false), hits / max(1, hits + misses)
    return {
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / max(1e-9, precision + recall), 4),
    }


def _by_type(
    truth: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]
) -> dict[str, dict[str, float]]:
    counts = Counter(span[2] for spans in truth for span in spans)
    names = sorted(counts | Counter(span[2] for spans in found for span in spans))
    return {
        name: {"num": counts[name]}
        | _score(
            [[span for span in spans if span[2] == name] for spans in truth],
            [[span for span in spans if span[2] == name] for spans in found],
            _is_same,
        )
        for name in names
    }


def _beside(texts: list[str], notes: list[str]) -> tuple[list[list[Span]], dict[str, Any]]:
    """Return Presidio's finds in the texts, and both speeds on the notes, in turns."""
    folder = cache_directory() / "bench-data"
    python = make_environment(folder / "env-presidio", REQUIREMENTS)
    script = str(Path(__file__).parent / "presidio_peer.py")
    asked, answered = folder / "texts.json", folder / "spans.json"

    def run(content: list[str]) -> dict[str, Any]:
        asked.write_text(json.dumps(content), encoding="utf-8")
        call([str(python), script, str(asked), str(answered)])
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return result

    found = [
        [(start, end, SHARED_TYPES[name]) for start, end, name, _ in spans if name in SHARED_TYPES]
        for spans in run(texts)["spans"]
    ]
    sample = notes[: NUM_NOTES // 4]
    num_bytes = sum(len(note.encode()) for note in sample)
    ratios, ours_s, theirs_s = [], [], []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for note in sample:
            find_identifiers(note)
        ours_s.append(time.process_time() - begin)
        theirs_s.append(run(sample)["seconds"])
        ratios.append(theirs_s[-1] / ours_s[-1])
    return found, {
        "bytes": num_bytes,
        "our_types": len({each.type for each in RECOGNISERS}),
        "our_recognisers": len(RECOGNISERS),
        "presidio_recognisers": 20,
        "our_mb_per_s": round(num_bytes / 1e6 / statistics.median(ours_s), 3),
        "presidio_mb_per_s": round(num_bytes / 1e6 / statistics.median(theirs_s), 3),
        "ratios": [round(each, 2) for each in ratios],
    }
