"""Drop records that say again what an earlier record of the silo said; the first is kept.

Exact duplicates share a hash of their normalised words. Near-duplicates share at least
``threshold`` of their word 5-grams: MinHash signatures (Broder 1997; rensa's
implementation) put candidates in common buckets, and each candidate's Jaccard similarity
is then counted exactly, so that a chance collision drops nothing and the result depends on
nothing but the order of the records.

Whole records are compared, frame and all, and word 5-grams with a threshold of 0.8 leave
apart two notes that share a form but not their content. Records with task "outcome" are
compared exactly only: two patients told in one sentence frame differ by a word or two, and
that word is the finding. Dropping them would change how common the outcome is.

Near-duplicates across silos are not looked for: no silo may see another's text.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Literal

from rensa import RMinHash, RMinHashLSH

from mutirao.data.config import DuplicateConfig
from mutirao.data.records import Record

Reason = Literal["exact duplicate", "near duplicate"]

_SEED = 0x6D757469
"""Fixed: two runs over the same text must drop the same records."""

_ROWS_PER_BAND = 4
"""With 128 permutations, 32 bands: a pair of similarity 0.8 becomes a candidate with
probability above 0.9999, one of 0.5 with 0.87 and one of 0.2 with 0.05."""

_NOT_WORDS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Return the words of a text, lower-cased and compatibility-folded, single-spaced."""
    return _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


class DuplicateFilter:
    """Remembers the words of the records it let pass: memory grows with their text."""

    def __init__(self, config: DuplicateConfig | None = None) -> None:
        self.config = config or DuplicateConfig()
        self._hashes: set[bytes] = set()
        self._kept_words: list[str] = []
        self._index = RMinHashLSH(
            threshold=self.config.threshold,
            num_perm=self.config.num_permutations,
            num_bands=self.config.num_permutations // _ROWS_PER_BAND,
        )

    def reason(self, record: Record) -> Reason | None:
        """Return why a record is dropped, or None and remember it."""
        is_outcome = record.task == "outcome"
        # Of an outcome record every sign counts: "ST -1" is not "ST 1".
        words = record.text if is_outcome else normalise(record.text) or record.text
        digest = hashlib.sha256(words.encode("utf-8")).digest()
        if digest in self._hashes:
            return "exact duplicate"
        if not is_outcome and self._is_near_duplicate(words):
            return "near duplicate"
        self._hashes.add(digest)
        return None

    def _is_near_duplicate(self, words: str) -> bool:
        """Compare with what was kept; keep it too if it is like nothing there."""
        shingles = self._shingle(words)
        signature = RMinHash(num_perm=self.config.num_permutations, seed=_SEED)
        signature.update(sorted(shingles))
        for key in self._index.query(signature):
            if _jaccard(shingles, self._shingle(self._kept_words[key])) >= self.config.threshold:
                return True
        self._index.insert(len(self._kept_words), signature)
        self._kept_words.append(words)
        return False

    def _shingle(self, text: str) -> frozenset[str]:
        words = text.split()
        size = min(self.config.shingle_words, len(words))
        return frozenset(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    union = len(a | b)
    return len(a & b) / union if union else 1.0
