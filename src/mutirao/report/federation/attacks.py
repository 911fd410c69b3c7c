"""Results of privacy attacks, read from what ``make bench-privacy`` writes.

They belong to the benchmark's model and text, not to the run of the sheet that shows them; they
tell what each defence changes. The reader takes the numbers that it knows wherever they are,
leaves out what is missing, and never stops over a value of another kind.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.errors import InputError

POSITION = "server"
"""Whose view is shown: the coordinator sees most."""
FALSE_POSITIVE_RATE = 0.01
MAX_TEXT = 200


@dataclass(frozen=True)
class AttackRow:
    """What attacks found under one defence; None for what was not measured."""

    defence: str
    """'plain', 'secure-aggregated', 'clipped', …"""
    claimed_epsilon: float | None
    auc: float | None
    """Membership inference; 0.5 is a coin toss."""
    auc_low: float | None
    auc_high: float | None
    true_positive_rate: float | None
    """Share of members found at a false positive rate of 1 %."""
    exposure_bits: float | None
    """Mean exposure of the canaries that were repeated most."""
    extracted: float | None
    """Share of those canaries that the model writes down."""
    attribution: float | None
    """Share of tokens whose site is named right."""
    chance: float | None
    """That share by guessing."""
    audited_epsilon: float | None
    """Lower bound on ε that an attack proves."""


@dataclass(frozen=True)
class Attacks:
    """All rows, and where they come from."""

    date: str
    data: str
    rows: tuple[AttackRow, ...]


def read_attacks(path: Path) -> Attacks:
    """Read the results of the privacy attacks.

    Raises:
        InputError: the file cannot be read, or holds no such results.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        document = None
    conditions = document.get("conditions") if isinstance(document, dict) else None
    if not isinstance(conditions, dict) or not conditions:
        raise InputError(
            f"{path} holds no results of privacy attacks (expected the JSON of "
            "benchmarks/bench_privacy.py)"
        )
    rows = (_read_row(str(name)[:MAX_TEXT], row) for name, row in conditions.items())
    return Attacks(_text(document, "date"), _text(document, "data"), tuple(rows))


def _read_row(defence: str, row: Any) -> AttackRow:
    seen = _find(row, "positions", POSITION)
    exposures = _find(seen, "exposure")
    most = max(
        (each for each in exposures if _number(each, "num_repetitions") is not None)
        if isinstance(exposures, list)
        else (),
        key=lambda each: _number(each, "num_repetitions") or 0.0,
        default=None,
    )
    repetitions = _number(most, "num_repetitions")
    rates = _find(seen, "membership", "rates")
    rate = next(
        (
            _number(each, "rate")
            for each in (rates if isinstance(rates, list) else ())
            if _number(each, "asked_false_positive_rate") == FALSE_POSITIVE_RATE
        ),
        None,
    )
    return AttackRow(
        defence=defence,
        claimed_epsilon=_number(row, "claimed_epsilon"),
        auc=_number(seen, "membership", "auc"),
        auc_low=_number(seen, "membership", "auc_low"),
        auc_high=_number(seen, "membership", "auc_high"),
        true_positive_rate=rate,
        exposure_bits=_number(most, "mean_bits"),
        extracted=_number(seen, "extracted", f"{repetitions:.0f}") if repetitions else None,
        attribution=_number(row, "tokens", "attribution", "accuracy"),
        chance=_number(row, "tokens", "attribution", "chance"),
        audited_epsilon=_number(seen, "audit", "epsilon"),
    )


def _find(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: Any, *keys: str) -> float | None:
    return _as_number(_find(value, *keys))


def _as_number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and type(value) is not bool
    return float(value) if is_number and math.isfinite(value) else None


def _text(document: dict[str, Any], key: str) -> str:
    return str(document.get(key) or "")[:MAX_TEXT]
