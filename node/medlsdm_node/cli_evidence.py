"""``medlsdm-node evidence``: thin; each command parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medlsdm.terminal import print_json
from medlsdm_node.cli_options import Home, Json, open_home

kept = typer.Typer(help="What was done to each study: list (the default), show, report.")
Kept = Annotated[str, typer.Argument(metavar="ID", help="A record of 'evidence list'.")]


@kept.callback()
def evidence_default(context: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """List the evidence, unless told otherwise."""
    if context.invoked_subcommand is None:
        evidence_list(home, as_json)


@kept.command("list")
def evidence_list(home: Home = None, as_json: Json = False) -> None:
    """List the evidence of every study that was taken in: one line for each time."""
    from medlsdm_node.evidence import records

    rows = [record.to_json() for record in records(open_home(home))]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        what = f"{row['series']} series, {row['images']} images, {row['pairs']} pairs, {row['held']} files held"
        marks = "".join(
            [
                "  weaker than the default" if row["weaker"] else "",
                f"  {row['pictures']} pictures" if row["pictures"] else "",
                "" if row["in_audit_log"] else "  NOT IN THE AUDIT LOG",
            ]
        )
        print(f"{row['id']}  {row['made']}  {row['patient']}  {row['study']}  {what}{marks}")
    if not rows:
        print("There is no evidence yet.")


@kept.command("show")
def evidence_show(item: Kept, home: Home = None, as_json: Json = False) -> None:
    """Show one record: counts by attribute, never a value; --json for all of it."""
    from medlsdm_node.evidence import find

    record = find(open_home(home), item)
    if as_json:
        print_json(record.document | {"in_audit_log": record.in_log})
        return
    for name, value in record.to_json().items():
        print(f"{name:14} {'; '.join(value) if isinstance(value, list) else value}")
    for row in record.document["series"]:
        print(f"{row['token']}  {row['modality']}  {row['images']} images  face: {row['face'] or '-'}")
        for fate, listed in row["attributes"].items():
            print(f"  {fate:36} {len(listed)} attributes")
        for what, count in row["others"].items():
            print(f"  {what:36} {count}")
    for reason, count in record.document["held"]["reasons"].items():
        print(f"  held: {count} x {reason}")


@kept.command("report")
def evidence_report(
    item: Kept,
    out: Annotated[Path, typer.Option(help="A new HTML file, outside every export.")],
    home: Home = None,
    without_pictures: Annotated[
        bool, typer.Option("--without-pictures", help="Leave out the pictures of originals.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one record as a page for the privacy officer; audited, since its pictures show originals."""
    from medlsdm_node.evidence import write_report

    done = write_report(open_home(home), item, out, pictures=not without_pictures)
    if as_json:
        print_json(done)
        return
    print(f"{done['id']} is in {done['out']}, readable by this account only.")
    if done["pictures"]:
        print("It shows originals: it must stay inside the hospital.")
