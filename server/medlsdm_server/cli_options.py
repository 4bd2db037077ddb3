"""What several commands of the coordinator share: options, the opened folder, handing out an invitation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medlsdm.terminal import print_json

Home = Annotated[Path | None, typer.Option("--home", help="The coordinator's folder (MEDLSDM_SERVER_HOME).")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def open_home(home: Path | None) -> Any:
    """Return the coordinator's folder, or say that ``init`` comes first."""
    from medlsdm_server.home import ServerHome

    opened = ServerHome.default(home)
    opened.settings()
    return opened


def hand_out(invitation: Any, out: Path | None, *, as_json: bool) -> None:
    """Write an invitation to a file, or print it."""
    from medlsdm.checks import write_atomic

    if out is not None:
        write_atomic(out, invitation.encode().encode() + b"\n", mode=0o600)
    if as_json:
        secret = {"file": str(out)} if out else {"invitation": invitation.encode()}
        print_json({"site": invitation.site, "expires": invitation.expires} | secret)
    else:
        print(f"Invitation for {invitation.site} in {out}" if out else invitation.encode())
