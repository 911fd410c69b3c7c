"""Tokens to text while they come, and the end of a text at a stop.

A token may be half a character, or the beginning of a text that generation has to stop
before; neither is let out until it is known what it becomes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from mutirao.inference.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns tokens into text as they come; all pieces together are what ``decode`` returns."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special: bool = True
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: the model's.
            prompt_ids: what the text goes on from. The space that some tokenizers put before
                a text is shown as a space after other text, and left out at the beginning or
                after a control token.
            skip_special: leave control tokens out.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begins = not prompt_ids or prompt_ids[-1] in tokenizer.special_ids
        self._drops_space = begins and tokenizer.tables.strips_space

    def push(self, token_ids: Iterable[int]) -> str:
        """Take tokens in; return the characters that are complete, perhaps none."""
        shown = (index for index in token_ids if index not in self._skipped)
        return self._begun(self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown))))

    def finish(self) -> str:
        """Return what is left, half a character as U+FFFD."""
        return self._begun(self._decoder.decode(b"", final=True))

    def _begun(self, text: str) -> str:
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass pieces on up to the first stop text, which may come spread over several.

    Args:
        pieces: a text, as it comes.
        stop: texts to end before; empty ones are not looked for.

    Yields:
        The text's pieces; what a stop text could begin with is held until it is known.
    """
    stops = [text for text in stop if text]
    held = ""
    for piece in pieces:
        held += piece
        # The stop that is complete first counts, so that it does not matter how pieces fall.
        found = [(begin + len(text), begin) for text in stops if (begin := held.find(text)) >= 0]
        if found:
            if before := held[: min(found)[1]]:
                yield before
            return
        keep = _length_of_possible_start(held, stops)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def _length_of_possible_start(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a stop text could begin with."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
