"""Write the files that ``Tokenizer.open`` reads, from a GGUF file or a model directory.

``tokenizer.json`` and ``tokenizer_config.json`` are Hugging Face's and can be opened by
transformers; ``tokenizer.tables`` is the same in arrays (see ``token_tables``). Done once per
model, when its weight store is built, at several times the memory that using them takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mutirao.errors import FormatError, explain_disk_errors
from mutirao.formats.gguf_tokenizer import convert_gguf_tokenizer
from mutirao.inference.text.token_tables import build_tables
from mutirao.inference.text.tokenizer import CONFIG_FILE, TABLES_FILE, TOKENIZER_FILE


def write_tokenizer(
    source: Path, directory: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model's tokenizer into a folder.

    Args:
        source: a GGUF file, or a Hugging Face directory with a tokenizer.json.
        directory: folder to write into; created if missing.
        metadata: the GGUF file's, with its arrays; not needed for a directory.

    Raises:
        FormatError: the tokenizer is missing, damaged, or of a kind that is not supported.
        DiskFullError: no room is left.
    """
    try:
        if metadata is not None:
            tokenizer, config = convert_gguf_tokenizer(metadata)
        else:
            tokenizer = _read_json(source / TOKENIZER_FILE)
            config = _directory_config(source, tokenizer)
        tables = build_tables(tokenizer)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None
    with explain_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / TOKENIZER_FILE, tokenizer)
        _write_json(directory / CONFIG_FILE, config)
        tables.save(directory / TABLES_FILE)


def _directory_config(source: Path, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    own = _read_json(source / CONFIG_FILE, missing_ok=True)
    ids = _token_ids(tokenizer)
    names = {name: text for name, value in own.items() if (text := _named(name, value))}
    bos = names.get("bos_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **names,
        "bos_token_id": ids.get(bos) if bos else None,
        "eos_token_ids": _ends(source, ids, names),
        "chat_template": _chat_template(source, own),
    }


def _named(name: str, value: Any) -> str | None:
    """Return a special token's text, which may be written as an object."""
    if not name.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of added tokens, and of the vocabulary where it is a table."""
    vocab = tokenizer.get("model", {}).get("vocab") if isinstance(tokenizer, dict) else None
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    for entry in tokenizer.get("added_tokens") or ():
        ids[entry["content"]] = entry["id"]
    return ids


def _ends(source: Path, ids: Mapping[str, int], names: Mapping[str, str]) -> list[int]:
    """Return every token that ends a generation: the model's own list and the tokenizer's."""
    generation = _read_json(source / "generation_config.json", missing_ok=True)
    model = _read_json(source / "config.json", missing_ok=True)
    ends = generation.get("eos_token_id", model.get("eos_token_id"))
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    own = names.get("eos_token", "")
    named = [ids[own]] if own in ids else []
    try:
        return sorted({int(index) for index in [*listed, *named]})
    except (TypeError, ValueError):
        raise FormatError(
            f"eos_token_id={ends!r} is not accepted (expected a token id or a list of them)"
        ) from None


def _chat_template(source: Path, own: Mapping[str, Any]) -> str | None:
    """Return the template from its own file, or from tokenizer_config.json."""
    path = source / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{path.name} cannot be read: {error}") from None
    template = own.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"it has no {path.name} (expected a directory with one; transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path.name} is damaged (expected a JSON object)")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)
