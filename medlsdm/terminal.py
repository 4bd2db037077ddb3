"""What the command lines share: one line for each mistake, JSON for machines, exit codes.

Results go to stdout, everything else to stderr. ``MEDLSDM_DEBUG=1`` shows the trace of an
unexpected error; it stays on this machine.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, NoReturn

import click
import typer

from medlsdm.errors import MedlsdmError, ResourceError, UsageError

_STOPPED = 130


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _fail(program: str, error: MedlsdmError) -> NoReturn:
    print(f"{program}: {error}", file=sys.stderr)
    if "--json" in sys.argv:
        print_json({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    sys.exit(error.exit_status)


def run(app: typer.Typer, program: str) -> NoReturn:
    """Run a typer app as a program: every error becomes one line and its documented exit status."""
    try:
        status = app(prog_name=program, standalone_mode=False) or 0
        if status == _STOPPED:  # typer turns Ctrl-C into a silent status
            raise KeyboardInterrupt
        sys.exit(status)
    except MedlsdmError as error:
        _fail(program, error)
    except click.ClickException as error:
        _fail(program, UsageError(error.format_message(), f"See '{program} --help'."))
    except (click.Abort, KeyboardInterrupt):
        print(f"{program}: stopped", file=sys.stderr)
        sys.exit(_STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _fail(program, ResourceError("Memory ran out.", "Use smaller volumes, a smaller preset or fewer at a time."))
    except OSError as error:
        _fail(program, ResourceError(f"The system refused: {error.strerror or error}.", "Check path and permissions."))
    except Exception as error:
        if os.environ.get("MEDLSDM_DEBUG"):
            traceback.print_exc()
        _fail(
            program,
            MedlsdmError(f"Unexpected {type(error).__name__}.", "Set MEDLSDM_DEBUG=1 to see where, and report it."),
        )
