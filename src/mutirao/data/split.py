"""Decide which side of the train/held-out split a record stands on, by its words alone.

The side follows from a hash of the text, not from position or chance: the same document
goes to the same side in every run, on every machine and at every site, so that a text
which two sites share is never trained on at one and tested on at the other. Where a record
has a given part (a question), that part alone decides, so that one question with two
wordings of the answer does not stand on both sides. Pieces of one long document are
records of their own and may stand on different sides.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from mutirao.data.duplicates import normalise
from mutirao.data.records import Record

Side = Literal["train", "heldout"]


def side_of(record: Record, heldout_share: float) -> Side:
    """Return the side on which a record stands.

    Args:
        record: as read, before identifiers are removed.
        heldout_share: expected share of records held out, 0 to 1. A record held out at
            one share is held out at every larger share.
    """
    text = normalise(record.context or record.text)
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "heldout" if position < heldout_share else "train"
