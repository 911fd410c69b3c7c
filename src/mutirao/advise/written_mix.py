"""The mix of bits that an advice holds, for who compresses by it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.advise.advice import FILE_NAME, KIND
from mutirao.artifact import open_artifact
from mutirao.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenMix:
    """Bits by layer, as they were advised."""

    bits: dict[str, int]
    """Per code, by the layer's name."""
    group_size: int
    """Weights that share a scale."""
    uniform_bits: int
    """The same bits for all, in whose bytes the mix is."""


def read_mix(path: Path) -> WrittenMix:
    """Read the mix of an advice; a warning says so where it was found not to be worth it.

    Args:
        path: an artifact of kind 'advice', or a file that holds what its advice.json does.

    Raises:
        InputError: there is no such file, it is no advice, or it has no mix.
        ArtifactError: the artifact is of another kind, or was altered.
    """
    if path.is_dir():
        open_artifact(path, KIND)
        path = path / FILE_NAME
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"advice {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"advice {path} is not valid JSON; ask mutirao advise again") from None
    if not isinstance(document, dict) or "mix" not in document:
        raise InputError(f"{path} is no advice (expected what mutirao advise wrote)")
    mix = document["mix"]
    if mix is None:
        raise InputError(
            f"advice {path} has no mix of bits (expected one that was asked for with --layers and "
            "recommends 3 or 4 bits: at 2 and 8, nothing can move from one layer to another); "
            "compress with --bits"
        )
    if not _is_whole(mix):
        raise InputError(f"advice {path} is damaged: its mix of bits; ask mutirao advise again")
    if mix.get("is_better") is False:
        logger.warning(
            "this mix was found not to be worth it: it diverges less than %d bits for all by a "
            "tenth at most",
            mix["uniform_bits"],
        )
    return WrittenMix(mix["bits"], mix["group_size"], mix["uniform_bits"])


def _is_whole(mix: Any) -> bool:
    if not isinstance(mix, dict) or not isinstance(mix.get("bits"), dict):
        return False
    numbers = [*mix["bits"].values(), mix.get("group_size"), mix.get("uniform_bits")]
    return len(numbers) > 2 and all(type(each) is int for each in numbers)
