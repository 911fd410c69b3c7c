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
        # Whoever read the output has gone; nothing more can or need be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        console.print("[bold red]error:[/] ", end="")
        console.print(f"{where}{error.strerror or error}; name another place", markup=False)
        exit_code = 1
    if exit_code == INTERRUPTED_EXIT_CODE:
        going_on = "demo" in sys.argv[1:2]
        console.print(
            "interrupted; finished stages are kept: run the same command to go on"
            if going_on
            else "interrupted"
        )
    sys.exit(exit_code)


def _run() -> int:
    """Run the command; outside its standalone mode Typer leaves errors and exits to us."""
    from mutirao.cli.app import app

    try:
        return int(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
