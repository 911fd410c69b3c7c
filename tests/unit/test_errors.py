"""The exception tree: what its docstring draws is what there is, with the exit codes."""

import errno
import inspect
import re
from pathlib import Path

import pytest

from mutirao import errors
from mutirao.errors import DiskFullError, MutiraoError, SourceError, explain_disk_errors


def all_kinds() -> dict[str, type[MutiraoError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: kind for name, kind in found if issubclass(kind, MutiraoError)}


def drawn() -> list[tuple[int, str, int]]:
    """Rows of (depth, name, exit code) of the tree in the docstring."""
    rows = re.findall(r"^( *(?:[│├└─ ]*))(\w+Error)\s+(\d)\s", errors.__doc__ or "", re.MULTILINE)
    return [((len(indent) - 4) // 4, name, int(code)) for indent, name, code in rows]


def test_the_drawing_is_complete_and_true() -> None:
    kinds = all_kinds()
    assert {name for _, name, _ in drawn()} == kinds.keys()
    path: list[str] = []
    for depth, name, exit_code in drawn():
        path = [*path[:depth], name]
        assert kinds[name].exit_code == exit_code
        parent = kinds[name].__base__
        assert parent is not None
        assert parent.__name__ == (path[depth - 1] if depth else "Exception")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_no_room_is_explained(error: Exception) -> None:
    with (
        pytest.raises(DiskFullError, match=r"no room left to write a/b.*MUTIRAO_HOME") as caught,
        explain_disk_errors(Path("a/b")),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "x"), ValueError("x"), SourceError("x"), KeyboardInterrupt()]
)
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explain_disk_errors(Path("a")):
        raise error
    assert caught.value is error
