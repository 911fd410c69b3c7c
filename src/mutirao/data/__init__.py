"""Private text, made ready on its owner's machine: read, filtered, cleared, split, encoded.

The road is ``prepare_silo``: ``readers`` → ``quality`` → ``duplicates`` → ``identifiers``
→ ``split``; ``tokenization`` turns what it leaves into training examples. The names below
load their module when first used, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutirao.data.config import DataConfig, DuplicateConfig, QualityConfig
    from mutirao.data.duplicates import DuplicateFilter
    from mutirao.data.identifiers.replacement import redact
    from mutirao.data.identifiers.search import Identifier, find_identifiers
    from mutirao.data.prepare import (
        PreparationReport,
        load_records,
        load_report,
        prepare_silo,
    )
    from mutirao.data.quality import QualityFilter
    from mutirao.data.readers.folder import folder_sha256, list_files, read_folder
    from mutirao.data.records import Record
    from mutirao.data.split import side_of
    from mutirao.data.tokenization import Example, encode_record, encode_records

_MODULES = {
    "DataConfig": "config",
    "DuplicateConfig": "config",
    "DuplicateFilter": "duplicates",
    "Example": "tokenization",
    "Identifier": "identifiers.search",
    "PreparationReport": "prepare",
    "QualityConfig": "config",
    "QualityFilter": "quality",
    "Record": "records",
    "encode_record": "tokenization",
    "encode_records": "tokenization",
    "find_identifiers": "identifiers.search",
    "folder_sha256": "readers.folder",
    "list_files": "readers.folder",
    "load_records": "prepare",
    "load_report": "prepare",
    "prepare_silo": "prepare",
    "read_folder": "readers.folder",
    "redact": "identifiers.replacement",
    "side_of": "split",
}

__all__ = [
    "DataConfig",
    "DuplicateConfig",
    "DuplicateFilter",
    "Example",
    "Identifier",
    "PreparationReport",
    "QualityConfig",
    "QualityFilter",
    "Record",
    "encode_record",
    "encode_records",
    "find_identifiers",
    "folder_sha256",
    "list_files",
    "load_records",
    "load_report",
    "prepare_silo",
    "read_folder",
    "redact",
    "side_of",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
