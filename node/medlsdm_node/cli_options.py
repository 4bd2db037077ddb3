"""What the commands of ``medlsdm-node`` share: the options that all take, and how the node is opened."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Home = Annotated[Path | None, typer.Option("--home", help="The node's folder (MEDLSDM_NODE_HOME).")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def open_home(home: Path | None) -> Any:
    """Return the node that the options name.

    Raises:
        ConfigError: There is none.
    """
    from medlsdm_node.home import NodeHome

    opened = NodeHome.default(home)
    opened.settings  # noqa: B018  # says so if there is no node
    return opened


def end_cleanly() -> None:
    """Have SIGTERM end the command as Ctrl-C does: what lies in clear or half-written goes with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
