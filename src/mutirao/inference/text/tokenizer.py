"""Text to tokens and back, and chat templates, with neither transformers nor torch.

A folder that ``tokenizer_files.write_tokenizer`` wrote is opened in milliseconds and few
megabytes: words are cut by the ``tokenizers`` library and merged here from flat arrays (see
``token_tables``), in the library's order: the lowest rank first, of equal ranks the leftmost.
Vocabularies without merges (Unigram) are encoded by the library itself, opened at need.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import Encoding

from mutirao.errors import FormatError, InputError
from mutirao.inference.text.token_tables import TokenTables, word_hash

if TYPE_CHECKING:
    from mutirao.inference.text.chat_template import ChatTemplate

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TABLES_FILE = "tokenizer.tables"


class Tokenizer:
    """A model's tokenizer."""

    def __init__(self, directory: Path, tables: TokenTables, config: Mapping[str, Any]) -> None:
        """Use tables and a configuration that ``open`` has read."""
        self.directory = directory
        self.tables = tables
        self.vocab_size = tables.vocab_size
        """Token ids are below this; a model may have more outputs, which mean nothing."""
        self.eos_ids = frozenset(int(index) for index in config["eos_token_ids"])
        """Every token that ends a generation."""
        bos_id = config.get("bos_token_id")
        self.bos_id = None if bos_id is None else int(bos_id)
        self.special_ids = frozenset(tables.special_ids.tolist())
        """Control tokens, which are not shown."""
        self._template_source: str | None = config.get("chat_template")
        self._names = {name: text for name, text in config.items() if name.endswith("_token")}

    @classmethod
    def open(cls, directory: Path) -> Tokenizer:
        """Open the tokenizer in a folder.

        Raises:
            FormatError: a file is missing or damaged.
        """
        path = directory / CONFIG_FILE
        tables = TokenTables.load(directory / TABLES_FILE)
        try:
            return cls(directory, tables, json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} is missing or damaged ({error}); delete its folder, so that it is "
                "built again"
            ) from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text; names of special tokens in it become these tokens.

        Args:
            text: what to encode; for about 170 bytes of memory per byte meanwhile.
            special: put what the model wants before a text, such as its begin-of-text token;
                not for a text that a chat template made, which has put it there itself.

        Raises:
            InputError: the text holds half a surrogate pair, which is no character.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"character {error.start} of the text is half a surrogate pair (expected text "
                    "that can be written as UTF-8)"
                ) from None
        encoding = self._library.encode(text, add_special_tokens=special)
        if not len(self.tables.splitter):
            return list(encoding.ids)
        merged = _Merger(self.tables)
        return [index for word in self._words(encoding) for index in merged(word)]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of tokens.

        Bytes that are no UTF-8 are shown as U+FFFD. Ids beyond the vocabulary are nothing.

        Args:
            token_ids: what to decode.
            skip_special: leave control tokens out.
        """
        skipped = self.special_ids if skip_special else ()
        shown = (index for index in token_ids if index not in skipped)
        text = b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")
        return text[1:] if self.tables.strips_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; half a character is possible."""
        return self.tables.token_bytes(token_id)

    @property
    def has_chat_template(self) -> bool:
        """Say whether the model takes messages."""
        return bool(self._template_source)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as a prompt, to be encoded with ``special=False``.

        Args:
            messages: {"role", "content"} each, and what else the template knows.
            add_generation_prompt: end with the beginning of the model's own turn.

        Raises:
            InputError: the model has no template, or it refuses these messages.
            FormatError: the template is broken.
        """
        return self._chat_template.render(messages, add_generation_prompt)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if not self._template_source:
            raise InputError(
                "the model has no chat template and takes no messages; give it a plain prompt to "
                "go on from"
            )
        from mutirao.inference.text.chat_template import ChatTemplate  # 7 MB, not for plain prompts

        return ChatTemplate(self._template_source, self._names)

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        if len(self.tables.splitter):
            return tokenizers.Tokenizer.from_buffer(self.tables.splitter.tobytes())
        path = self.directory / TOKENIZER_FILE
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise FormatError(f"{path} is missing or damaged: {error}") from None

    def _words(self, encoding: Encoding) -> Iterator[tuple[int, ...]]:
        """Cut an encoding in letters into the words inside which merges are done."""
        ids, words = encoding.ids, encoding.word_ids
        space_id = self.tables.space_id
        begin = 0
        for end in range(1, len(ids) + 1):
            inside = (
                end < len(ids)
                and words[end] is not None
                and words[end] == words[end - 1]
                and not (ids[end] == space_id and ids[end - 1] != space_id)
            )
            if not inside:
                yield tuple(ids[begin:end])
                begin = end


class _Merger:
    """Merges words; remembers those it has seen while one text is encoded."""

    def __init__(self, tables: TokenTables) -> None:
        self._tables = tables
        self._merged: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._pairs: dict[int, tuple[int, int] | None] = {}

    def __call__(self, word: tuple[int, ...]) -> tuple[int, ...]:
        if len(word) < 2:
            return word
        if (known := self._merged.get(word)) is None:
            known = self._merged[word] = self._whole(word) or self._merge(word)
        return known

    def _whole(self, word: tuple[int, ...]) -> tuple[int, ...]:
        """Return the one token that the word is, where such tokens go before merges."""
        hashes = self._tables.word_hashes
        if not len(hashes):
            return ()
        text = b"".join(map(self._tables.token_bytes, word))
        hashed = word_hash(text)
        for position in range(int(hashes.searchsorted(hashed)), len(hashes)):
            if hashes[position] != hashed:
                break
            index = int(self._tables.word_ids[position])
            if self._tables.token_bytes(index) == text:
                return (index,)
        return ()

    def _merge(self, word: tuple[int, ...]) -> tuple[int, ...]:
        ids = list(word)
        following = [*range(1, len(ids)), -1]
        preceding = [-1, *range(len(ids) - 1)]
        waiting: list[tuple[int, int, int, int, int]] = []

        def look(at: int) -> None:
            left, right = ids[at], ids[following[at]]
            if (found := self._pair(left, right)) is not None:
                heapq.heappush(waiting, (found[0], at, left, right, found[1]))

        for at in range(len(ids) - 1):
            look(at)
        while waiting:
            _, at, left, right, result = heapq.heappop(waiting)
            gone = following[at]
            if ids[at] != left or gone < 0 or ids[gone] != right:
                continue  # one of the two has been merged since
            ids[at], ids[gone] = result, -1
            following[at] = following[gone]
            if following[at] >= 0:
                preceding[following[at]] = at
                look(at)
            if preceding[at] >= 0:
                look(preceding[at])
        return tuple(index for index in ids if index >= 0)

    def _pair(self, left: int, right: int) -> tuple[int, int] | None:
        """Return rank and result of a merge, if there is one."""
        key = left << 32 | right
        if key not in self._pairs:
            keys = self._tables.pair_keys
            position = int(keys.searchsorted(key))
            found = None
            if position < len(keys) and keys[position] == key:
                ranks, results = self._tables.pair_ranks, self._tables.pair_results
                found = int(ranks[position]), int(results[position])
            self._pairs[key] = found
        return self._pairs[key]
