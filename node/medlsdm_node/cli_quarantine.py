"""``medlsdm-node quarantine``: thin; each command parses, calls and prints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from medlsdm.terminal import print_json
from medlsdm_node.cli_options import Home, Json, end_cleanly, open_home

held = typer.Typer(help="Work through what was held: list (the default), show, release, purge.")
Item = Annotated[str, typer.Argument(metavar="ID", help="An item of 'quarantine list'.")]


@held.callback()
def held_default(context: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """List what is held, unless told otherwise."""
    if context.invoked_subcommand is None:
        held_list(home, as_json)


@held.command("list")
def held_list(home: Home = None, as_json: Json = False) -> None:
    """List what is held: id, since when, how many files or series, and the reason."""
    from medlsdm_node.quarantine import items

    found = items(open_home(home))
    if as_json:
        print_json([item.to_json() for item in found])
        return
    for item in found:
        what = f"{len(item.tokens)} series" if item.tokens else f"{len(item.paths)} files"
        print(f"{item.id}  {item.since}  {item.origin:8}  {what:>10}  {item.reason}")
    if not found:
        print("Nothing is held.")


@held.command("show")
def held_show(
    item: Item,
    home: Home = None,
    identify: Annotated[bool, typer.Option("--identify", help="Show the UIDs of received files; audited.")] = False,
    as_json: Json = False,
) -> None:
    """Show one item: its reason, its series by pseudonym, and where its files lie on this machine."""
    from medlsdm_node.quarantine import show

    end_cleanly()
    found = show(open_home(home), item, identify=identify)
    if as_json:
        print_json(found)
        return
    print(f"{found['id']}  {found['since']}  {found['origin']}\n{found['reason']}")
    for line in [*found["series"], *found["paths"]]:
        print(f"  {line}")
    for uids in found.get("uids", []):
        print("  " + "  ".join(f"{keyword}={value}" for keyword, value in uids.items()))


@held.command("release")
def held_release(item: Item, home: Home = None, as_json: Json = False) -> None:
    """Run the pipeline again on what an item belongs to; no check is waived."""
    from medlsdm_node.quarantine import release

    end_cleanly()
    found = release(open_home(home), item)
    if as_json:
        print_json(found)
        return
    print(f"{found['pairs']} scans were added to the vault.")
    for reason, count in sorted(found["held"].items()):
        print(f"  held: {count} x {reason}")


@held.command("purge")
def held_purge(
    item: Item,
    home: Home = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what the node holds of an item, for good; a folder of the hospital is never touched."""
    from medlsdm.errors import UsageError
    from medlsdm_node.quarantine import find, purge

    opened = open_home(home)
    found = find(opened, item)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("Purging deletes for good, and nobody here can confirm it.", "Give --yes.")
        if not typer.confirm(f"Delete {len(found.paths)} files ({found.reason}) for good?", err=True):
            raise typer.Abort
    done = purge(opened, item)
    if as_json:
        print_json(done)
    else:
        print(f"{done['item']} is purged: {done['deleted']} files deleted.")
