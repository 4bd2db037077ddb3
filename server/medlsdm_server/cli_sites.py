"""``medlsdm-server sites``: who takes part, who waits, who is cut off."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from medlsdm.terminal import print_json
from medlsdm_server.cli_options import Home, Json, open_home

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="List, admit, deny, revoke, re-invite and remove sites."
)

Name = Annotated[str, typer.Argument(help="The site's name.")]


def _registry(home: Path | None) -> Any:
    from medlsdm_server.registry import Registry

    return Registry(open_home(home).registry)


def _told(site: str, status: str, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"site": site, "status": status})
    else:
        print(sentence)


@app.command("list")
def list_sites(home: Home = None, as_json: Json = False) -> None:
    """List sites with their status, key, and when each was last heard of."""
    from medlsdm.federation.identity import shown
    from medlsdm_server.status import heard, site_rows

    rows = site_rows(open_home(home))
    if as_json:
        print_json(rows)
        return
    for row in rows:
        since = time.strftime("%Y-%m-%d", time.localtime(row["enrolled"]))
        print(f"{row['site']:20} {row['status']:9} since {since}  {heard(row)}\n  key {shown(row['key'])}")
    if not rows:
        print("No site yet. Invite one with 'medlsdm-server invite --hospital NAME'.")


@app.command()
def admit(site: Name, home: Home = None, as_json: Json = False) -> None:
    """Let a site in that waits. Compare the key that ``list`` shows by telephone first."""
    _registry(home).admit(site)
    _told(site, "admitted", f"{site} is admitted; its node connects by itself.", as_json=as_json)


@app.command()
def deny(site: Name, home: Home = None, as_json: Json = False) -> None:
    """Send a site away that waits. Its name is free again."""
    _registry(home).deny(site)
    _told(site, "denied", f"{site} is denied; its name is free again.", as_json=as_json)


@app.command()
def revoke(
    site: Name,
    home: Home = None,
    reason: Annotated[str, typer.Option(help="Why, for your own records.")] = "",
    as_json: Json = False,
) -> None:
    """Cut an admitted site off, within seconds, in the middle of a round too."""
    _registry(home).revoke(site, reason)
    _told(site, "revoked", f"{site} is revoked. To let it back: sites re-invite {site}.", as_json=as_json)


@app.command("re-invite")
def re_invite(
    site: Name,
    home: Home = None,
    out: Annotated[Path | None, typer.Option(help="Write the invitation to this file (0600).")] = None,
    valid_hours: Annotated[float, typer.Option(min=0.01, max=8760, help="How long it can be used.")] = 168.0,
    as_json: Json = False,
) -> None:
    """Invite a known site anew, with its old keys or new ones. Send the invitation over a secure channel."""
    from medlsdm_server.cli_options import hand_out
    from medlsdm_server.invitations import new_invitation

    opened = open_home(home)
    hand_out(new_invitation(opened, site, valid_hours, again=True), out, as_json=as_json)


@app.command()
def remove(site: Name, home: Home = None, as_json: Json = False) -> None:
    """Forget a site altogether. Its past contributions stay in the models."""
    _registry(home).remove(site)
    _told(site, "removed", f"{site} is removed.", as_json=as_json)
