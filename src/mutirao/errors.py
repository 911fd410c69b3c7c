"""Every error that Mutirão raises on purpose, and the exit code each ends a command with.

    MutiraoError                 1  something failed
    ├── InputError               2  what was asked for cannot be accepted
    │   ├── RecipeError          2  a recipe is missing, broken, or has an unknown key
    │   ├── SourceError          2  a source is malformed or names nothing
    │   ├── DataError            2  a silo is empty, not UTF-8, or has no usable record
    │   ├── FormatError          2  a model file is truncated, damaged or unsupported
    │   ├── ShapeError           2  tensors do not fit together
    │   ├── PortInUseError       2  a port that was asked for is taken
    │   └── OutOfRangeError      2  a prediction was asked for outside of what was measured
    ├── ArtifactError            1  an artifact is incomplete or was altered
    ├── NetworkError             1  a download failed or no network is there
    │   └── ChecksumError        1  what came is not what was pinned
    ├── DiskFullError            1  no room is left to write
    ├── InferenceError           1  the engine failed while it ran: a read error, no memory
    │   └── MissingKernelError   1  there is no native kernel, and no compiler to make one
    ├── PrivacyBudgetError       1  a step would exceed what may be spent on the units' privacy
    ├── RankLostError            1  a process that shares the training of a step is gone
    └── FederationError          1  a site or the server was lost, or answered wrongly
        ├── UpdateError          1  a site's update is malformed, non-finite or of another shape
        ├── PolicyError          1  a site's own policy does not allow what was asked of it
        ├── AuditError           1  a site's audit log was altered, cut, or cannot be continued
        └── ProtocolError        1  a message of secure aggregation is malformed, forged or unsafe

A message is one sentence or two: what came, what is accepted, what to do next. An
interrupt (Ctrl-C) ends a command with 130, as shells expect.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED_EXIT_CODE = 130


class MutiraoError(Exception):
    """Base of every deliberate error; its message is shown to people as it is."""

    exit_code = 1


class InputError(MutiraoError):
    """What the user gave cannot be accepted; nothing was changed."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe is missing, broken, has an unknown key or a bad value."""


class SourceError(InputError):
    """A source is malformed or names nothing."""


class DataError(InputError):
    """A silo is empty, not UTF-8, or has no usable record."""


class FormatError(InputError):
    """A model file is truncated, damaged or of a kind that is not supported."""


class ShapeError(InputError):
    """Tensors do not fit together."""


class PortInUseError(InputError):
    """A port that was asked for is taken by another process."""


class OutOfRangeError(InputError):
    """A prediction was asked for outside of the range that its law was calibrated in."""


class ArtifactError(MutiraoError):
    """An artifact is incomplete, or differs from what its manifest says."""


class NetworkError(MutiraoError):
    """A download failed, or no network is there."""


class ChecksumError(NetworkError):
    """A downloaded file is not the pinned one."""


class DiskFullError(MutiraoError):
    """No room is left where something had to be written."""


class InferenceError(MutiraoError):
    """The engine failed while it ran: a read error, a damaged store, no memory."""


class MissingKernelError(InferenceError):
    """There is no native kernel for this machine, and no compiler to make one."""


class PrivacyBudgetError(MutiraoError):
    """A step would exceed what may be spent on the units' privacy; nothing of it was done."""


class RankLostError(MutiraoError):
    """A process that shares the training of a step is gone; the steps can be done again."""


class FederationError(MutiraoError):
    """A site or the server was lost, or answered wrongly."""


class UpdateError(FederationError):
    """A site's update is malformed, non-finite or of another shape."""


class PolicyError(FederationError):
    """A site's own policy does not allow what was asked of it."""


class AuditError(FederationError):
    """A site's audit log was altered, cut, or cannot be continued."""


class ProtocolError(FederationError):
    """A message of secure aggregation is malformed or forged, or would reveal too much."""


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left', from Python or from a native writer, into DiskFullError.

    Args:
        path: what was being written; named in the message.

    Raises:
        DiskFullError: the block failed for want of room or quota.
    """
    try:
        yield
    except MutiraoError:
        raise
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors reports the same condition as its own error type, in words only.
        if is_full or "os error 28" in str(error) or "No space left" in str(error):
            raise DiskFullError(
                f"no room left to write {path}: free some space there, or name another "
                "folder with --out or MUTIRAO_HOME, and run the same command again"
            ) from error
        raise
