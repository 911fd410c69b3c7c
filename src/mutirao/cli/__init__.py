"""The command line: one file per verb.

A verb parses, loads its recipe, calls one library function and prints. Heavy imports stay
inside the verbs, so that ``mutirao --help`` answers at once. Exit codes: 0 done, 1 failed,
2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

from mutirao.environment import silence
from mutirao.errors import INTERRUPTED_EXIT_CODE, MutiraoError


def main() -> None:
    """Run a command and end the process with its exit code."""
    silence()
    import click

    from mutirao.console import configure_logging, console

    configure_logging(verbose=bool(os.environ.get("MUTIRAO_VERBOSE")))
    try:
        exit_code = _run()
    except click.ClickException as error:
        error.show()
        exit_code = error.exit_code
    except MutiraoError as error:
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        exit_code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 1
    if exit_code == INTERRUPTED_EXIT_CODE:
        console.print("interrupted; what was finished is kept: run the same command to go on")
    sys.exit(exit_code)


def _run() -> int:
    """Run the command; outside its standalone mode Typer leaves errors and exits to us."""
    from mutirao.cli.app import app

    try:
        return int(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
