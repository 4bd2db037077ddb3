"""``medlsdm-node plans``: what the coordinator has asked to train, and whether this hospital agrees."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from medlsdm.terminal import print_json
from medlsdm_node.cli_options import Home, Json, open_home

asked = typer.Typer(help="See and approve training plans: list, show, approve, withdraw.", no_args_is_help=True)
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="The beginning of a plan's digest, six figures or more.")]


def _show(row: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    state = f"approved by {row['by']}" if row["approved"] else "not approved"
    seen = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["seen"]))
    print(f"{row['digest'][:12]}  {state}, first seen {seen}\n  {row['summary']}")


@asked.command("list")
def list_plans(home: Home = None, as_json: Json = False) -> None:
    """List the plans that the coordinator has asked for, oldest first."""
    from medlsdm_node.plans import plans

    found = plans(open_home(home))
    if as_json:
        print_json(found)
        return
    for row in found:
        _show(row, as_json=False)
    if not found:
        print("No plan has been asked for yet.")


@asked.command("show")
def show(digest: Digest, home: Home = None, as_json: Json = False) -> None:
    """Show one plan in plain words."""
    from medlsdm_node.plans import find

    _show(find(open_home(home), digest), as_json=as_json)


@asked.command("approve")
def approve(digest: Digest, home: Home = None, as_json: Json = False) -> None:
    """Allow a plan to train here. It matters where policy.yaml says 'plans: approved'. Audited."""
    from medlsdm_node.plans import decide

    _show(decide(open_home(home), digest, approved=True), as_json=as_json)


@asked.command("withdraw")
def withdraw(digest: Digest, home: Home = None, as_json: Json = False) -> None:
    """Take an approval back: the next round of the plan is refused. Audited."""
    from medlsdm_node.plans import decide

    _show(decide(open_home(home), digest, approved=False), as_json=as_json)
