"""A vocabulary and its merges as a few flat arrays, instead of two hash maps.

The ``tokenizers`` library (0.23, 2026-11) takes 120 MB and 0.4 s to open Qwen2.5's 151,936
tokens and keeps 45 MB of them; these arrays are 4 MB and are read, not built, in 0.01 s.
What the library is good at stays with it: ``splitter`` is the same tokenizer with an alphabet
for a vocabulary, so that normalizing, cutting into words and finding added tokens are the
library's, and only the merges inside a word are done here.

One file holds it all: a magic line, the length of a JSON header, the header, the arrays.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError, explain_disk_errors
from mutirao.formats.gguf_tokenizer import SPACE

MAGIC = b"mutirao token tables 1\n"
MAX_TOKENS = 1 << 22
"""Largest token id that is believed: sixteen times the largest vocabulary of 2026."""

_DTYPES = {
    "splitter": np.uint8,
    "text": np.uint8,
    "text_offsets": np.uint32,
    "special_ids": np.int32,
    "pair_keys": np.int64,
    "pair_ranks": np.int32,
    "pair_results": np.int32,
    "word_hashes": np.int64,
    "word_ids": np.int32,
}


@dataclass(frozen=True)
class TokenTables:
    """Everything that encoding and decoding need; all arrays are one-dimensional."""

    splitter: NDArray[np.uint8]
    """tokenizer.json with an alphabet for a vocabulary, UTF-8; empty where merges cannot be
    done here, so that the library has to encode."""
    text: NDArray[np.uint8]
    """What every token stands for, as bytes, one after the other."""
    text_offsets: NDArray[np.uint32]
    """(vocabulary + 1,) where each token's bytes begin."""
    special_ids: NDArray[np.int32]
    """Control tokens, which are no text; sorted."""
    pair_keys: NDArray[np.int64]
    """(merges,) left id << 32 | right id; sorted."""
    pair_ranks: NDArray[np.int32]
    """(merges,) the order in which merges are done, lowest first."""
    pair_results: NDArray[np.int32]
    """(merges,) the token that a merge makes."""
    word_hashes: NDArray[np.int64]
    """(words,) hashes of the tokens that a whole word may be before any merge; sorted, and
    empty in vocabularies without ``ignore_merges``."""
    word_ids: NDArray[np.int32]
    """(words,) the tokens of ``word_hashes``."""
    space_id: int
    """Token of a space at which text may be cut, because no token goes on over one; or -1."""
    strips_space: bool
    """Whether a text's first space is not shown, since encoding had put one there."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, gaps included."""
        return len(self.text_offsets) - 1

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for; nothing for an id beyond the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        begin, end = self.text_offsets[token_id : token_id + 2]
        return self.text[begin:end].tobytes()

    def save(self, path: Path) -> None:
        """Write the tables, beside the target first.

        Raises:
            DiskFullError: no room is left.
        """
        arrays = {
            name: np.ascontiguousarray(getattr(self, name), _DTYPES[name]) for name in _DTYPES
        }
        body = b"".join(_padded(array.tobytes()) for array in arrays.values())
        header = json.dumps(
            {
                "lengths": {name: len(array) for name, array in arrays.items()},
                "checksum": zlib.crc32(body),
                "space_id": self.space_id,
                "strips_space": self.strips_space,
            }
        ).encode()
        partial = path.with_name(path.name + ".partial")
        with explain_disk_errors(path):
            partial.write_bytes(_opening(header) + body)
            partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> TokenTables:
        """Read tables that ``save`` wrote.

        Raises:
            FormatError: the file is missing, damaged or of another version.
        """
        try:
            data = np.fromfile(path, np.uint8)
            header, begin = _read_header(data)
            return cls(
                **_views(data, header, begin),
                space_id=int(header["space_id"]),
                strips_space=bool(header["strips_space"]),
            )
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise FormatError(
                f"{path} is missing or damaged ({error}); delete its folder, so that it is "
                "built again"
            ) from None


def build_tables(tokenizer: Mapping[str, Any]) -> TokenTables:
    """Make the tables of a tokenizer.

    Args:
        tokenizer: what a tokenizer.json holds.

    Raises:
        FormatError: of a kind that is not supported, or its parts do not fit together.
    """
    try:
        return _build_tables(tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(
            f"the tokenizer is damaged: {type(error).__name__}: {error}; download the model again"
        ) from None


def word_hash(text: bytes) -> int:
    """Return the hash under which ``word_hashes`` knows a token."""
    # Two weak sums together keep the words of a vocabulary apart, and need no OpenSSL (3 MB);
    # words that share one all the same are told apart by whoever looks one up.
    return zlib.crc32(text) << 31 ^ zlib.adler32(text)


def byte_alphabet() -> dict[str, int]:
    """Return which byte each character of byte-level vocabularies stands for.

    Printable Latin-1 stands for itself; the others follow from U+0100 on, as GPT-2 chose
    (Radford et al. 2019, github.com/openai/gpt-2, src/encoder.py).
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    alphabet = {chr(byte): byte for byte in itself}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _build_tables(tokenizer: Mapping[str, Any]) -> TokenTables:
    model = tokenizer["model"]
    added = {int(entry["id"]): entry for entry in tokenizer.get("added_tokens") or ()}
    vocab = _vocabulary(model) | {entry["content"]: index for index, entry in added.items()}
    if min(vocab.values()) < 0 or max(vocab.values()) >= MAX_TOKENS:
        raise ValueError(f"token ids lie outside 0 to {MAX_TOKENS}")
    spelling, strips_space = _decoder(tokenizer.get("decoder"))
    texts: list[bytes] = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        texts[index] = token.encode() if index in added else spelling(token)
    here = _merges_here(tokenizer)
    keys, ranks, results = _pairs(model["merges"], vocab) if here else ([], [], [])
    order = np.argsort(np.array(keys, np.int64), kind="stable")
    words = _words(texts, added) if here and model.get("ignore_merges") else []
    return TokenTables(
        splitter=_splitter(tokenizer, vocab, added) if here else np.zeros(0, np.uint8),
        text=np.frombuffer(b"".join(texts), np.uint8),
        text_offsets=np.cumsum([0, *map(len, texts)]).astype(np.uint32),
        special_ids=np.array(
            sorted(index for index, entry in added.items() if entry.get("special")), np.int32
        ),
        pair_keys=np.array(keys, np.int64)[order],
        pair_ranks=np.array(ranks, np.int32)[order],
        pair_results=np.array(results, np.int32)[order],
        word_hashes=np.array([hashed for hashed, _ in words], np.int64),
        word_ids=np.array([index for _, index in words], np.int32),
        space_id=_space_id(vocab, results) if here else -1,
        strips_space=strips_space,
    )


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {str(piece): index for index, (piece, _) in enumerate(model["vocab"])}
    return {str(token): int(index) for token, index in model["vocab"].items()}


def _decoder(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """Return how a token is turned into bytes, and whether a text's first space is dropped."""
    steps = list(decoder["decoders"]) if decoder and "decoders" in decoder else [decoder or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = byte_alphabet()
        return lambda token: _from_alphabet(token, alphabet), False
    if kinds == ["Metaspace"]:
        prepends = steps[0].get("prepend_scheme", "always") != "never"
        return lambda token: token.replace(SPACE, " ").encode(), prepends
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        return _from_sentencepiece, len(kinds) == 4
    raise FormatError(
        f"the tokenizer's decoder {' + '.join(map(str, kinds))} is not supported (expected "
        "ByteLevel, Metaspace, or Replace + ByteFallback + Fuse)"
    )


def _from_alphabet(token: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _merges_here(tokenizer: Mapping[str, Any]) -> bool:
    """Say whether words can be merged by these tables as the library would."""
    model = tokenizer["model"]
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(name) for name in unusual):
        return False
    if tokenizer.get("truncation") or tokenizer.get("padding"):
        return False
    # A word's bytes name it only where every token is spelled in bytes.
    return not model.get("ignore_merges") or tokenizer["decoder"]["type"] == "ByteLevel"


def _pairs(
    merges: Iterable[str | tuple[str, str]], vocab: Mapping[str, int]
) -> tuple[list[int], list[int], list[int]]:
    """Return keys, ranks and results of all merges; of a pair named twice, the last counts."""
    ranked: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"the merge of {left!r} and {right!r} names no token")
        ranked[vocab[left] << 32 | vocab[right]] = (rank, vocab[left + right])
    return (
        list(ranked),
        [rank for rank, _ in ranked.values()],
        [result for _, result in ranked.values()],
    )


def _words(texts: list[bytes], added: Mapping[int, Any]) -> list[tuple[int, int]]:
    """Return hash and id of every token that may be a whole word, sorted by hash."""
    return sorted(
        (word_hash(text), index) for index, text in enumerate(texts) if text and index not in added
    )


def _splitter(
    tokenizer: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[int, Any]
) -> NDArray[np.uint8]:
    model = dict(tokenizer["model"])
    kept = {model.get("unk_token"), *(entry["content"] for entry in added.values())}
    model["vocab"] = {
        token: index
        for token, index in vocab.items()
        if len(token) == 1 or token in kept or re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
    }
    model |= {"merges": [], "ignore_merges": False}
    reduced = json.dumps({**tokenizer, "model": model}, ensure_ascii=False)
    return np.frombuffer(reduced.encode(), np.uint8)


def _space_id(vocab: Mapping[str, int], results: list[int]) -> int:
    made = set(results)
    across = re.compile(f"[^{SPACE}]{SPACE}")
    if any(index in made and across.search(token) for token, index in vocab.items()):
        return -1
    return vocab.get(SPACE, -1)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _opening(header: bytes) -> bytes:
    """Return magic, length and header, ending where arrays may begin."""
    header += b" " * (-(len(MAGIC) + 4 + len(header)) % 8)
    return MAGIC + struct.pack("<I", len(header)) + header


def _read_header(data: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    size = len(MAGIC) + 4
    if data[: len(MAGIC)].tobytes() != MAGIC:
        raise ValueError("it is no such file, or of another version")
    (length,) = struct.unpack("<I", data[len(MAGIC) : size].tobytes())
    return json.loads(data[size : size + length].tobytes()), size + length


def _views(
    data: NDArray[np.uint8], header: Mapping[str, Any], begin: int
) -> dict[str, NDArray[Any]]:
    if zlib.crc32(data[begin:].data) != header["checksum"]:
        raise ValueError("its checksum differs")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in _DTYPES.items():
        num_bytes = int(header["lengths"][name]) * np.dtype(dtype).itemsize
        arrays[name] = data[begin : begin + num_bytes].view(dtype)
        begin += num_bytes + -num_bytes % 8
    if begin != len(data):
        raise ValueError("its length differs")
    return arrays
