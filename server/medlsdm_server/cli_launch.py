"""``medlsdm-server launch`` and ``stop``: begin, follow, resume and end a training across the hospitals."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from medlsdm.terminal import print_json
from medlsdm_server.cli_options import Home, Json, open_home

ENDED = ("finished", "failed", "stopped", "interrupted")


def launch(
    home: Home = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each stage; default: the plan's.")] = None,
    plan: Annotated[str, typer.Option(help="A plan of configs/federation, or a YAML file.")] = "default",
    sites: Annotated[int | None, typer.Option(min=1, help="How many sites must take part.")] = None,
    resume: Annotated[str, typer.Option(help="Go on with this launch from its last checkpoint.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost and check it.")] = False,
    as_json: Json = False,
) -> None:
    """Train across the hospitals: rounds of stage 1, then of stage 2."""
    from medlsdm.errors import BusyError, RoundError
    from medlsdm_server import launch as launching
    from medlsdm_server.status import launch_status, running

    opened = open_home(home)
    if resume:
        chosen = launching.read_launch(opened, resume)
    else:
        wanted = launching.load_plan(plan)
        stages = {s: getattr(wanted, s).model_copy(update={"rounds": rounds}) for s in ("stage1", "stage2")}
        wanted = wanted.model_copy(update=(stages if rounds else {}) | ({"sites": sites} if sites else {}))
        if dry_run:
            _show_cost(opened, wanted, as_json=as_json)
            return
        chosen = None
    if not running(opened):
        raise BusyError("The coordinator is not running.", "Run 'medlsdm-server start' in another terminal.")
    if chosen is None:
        chosen = launching.new_launch(opened, wanted)
    elif launch_status(opened, chosen.id)["state"] == "finished":
        raise BusyError(f"The launch {chosen.id} is finished already.", "Launch a new one.")
    launching.note(opened, chosen.id, "resumed" if resume else "launched")
    status = launch_status(opened, chosen.id)
    if not detach:
        status = _follow(opened, chosen.id, "", quiet=as_json)
    if as_json:
        print_json(status)
    if status["state"] == "failed":
        raise RoundError(f"Launch {chosen.id} failed: {status['message']}", f"Resume: launch --resume {chosen.id}")
    if not as_json:
        print(f"Launch {chosen.id}: {status['state']}.")


def _show_cost(home: Any, plan: Any, *, as_json: bool) -> None:
    from medlsdm_server.cost import cost_of

    found = cost_of(home, plan)
    if as_json:
        print_json(found)
        return
    print(f"plan       {found['digest'][:16]}  {found['summary']}")
    for stage, row in found["stages"].items():
        print(
            f"{stage}     {row['rounds']} rounds of {row['steps']} steps, weights of {row['bytes'] / 1e6:.2f} MB:"
            f" {row['sent_bytes'] / 1e6:.1f} MB each way for each site"
        )
    print(f"on a line of {found['line_mbit']:g} Mbit/s: {found['line_minutes']:.1f} minutes of sending and receiving")
    for check in found["checks"]:
        print(f"{'ok   ' if check['ok'] else 'LOOK '}  {check['what']}")


def stop(
    launch: Annotated[str, typer.Argument(help="The launch to end; 'medlsdm-server status' names it.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """End a launch after the step in hand. Its checkpoints stay; 'launch --resume' goes on with it."""
    from medlsdm_server import launch as launching
    from medlsdm_server.status import launch_status

    opened = open_home(home)
    launching.read_launch(opened, launch)
    if launch_status(opened, launch)["state"] not in ENDED:
        launching.note(opened, launch, "stopped")
    state = launch_status(opened, launch)["state"]
    if as_json:
        print_json({"id": launch, "state": state})
    else:
        print(f"Launch {launch}: {state}.")


def show(row: dict[str, Any]) -> None:
    """Print how far a launch is, and who refused the last round that fell short."""
    place = f", {row['stage']} round {row['round']}/{row['rounds']}" if row["stage"] else ""
    missing = f"; missing: {', '.join(row['missing'])}" if row["missing"] else ""
    print(f"launch {row['id']}: {row['state']}{place}{missing} {row['message']}".rstrip())
    last = (row["short_rounds"] or row["finished_rounds"])[-1:]
    for site in last[0]["sites"] if last else ():
        if site["refused"]:
            print(f"  {site['site']}: {site['refused']}")


def _follow(home: Any, identity: str, flower_run: str, *, quiet: bool) -> dict[str, Any]:
    """Wait for the end of a launch; show a line whenever something happens."""
    from rich.console import Console

    from medlsdm_server.launch import read_events
    from medlsdm_server.status import launch_status, running

    console, shown = Console(stderr=True, quiet=quiet, soft_wrap=True), 0
    while True:
        events = read_events(home, identity)
        for event in events[shown:]:
            if line := _line(event):
                console.print(line, highlight=False, markup=False)
        shown = len(events)
        status = launch_status(home, identity)
        if status["state"] in ENDED and (status["state"] != "interrupted" or not running(home)):
            return status
        time.sleep(0.5)


def _line(event: dict[str, Any]) -> str:
    """Say one event of a diary in a line, or '' for those that need none."""
    from medlsdm_server.text import plain

    where = f"{event.get('stage')} round {event.get('round')}/{event.get('rounds')}"
    if event["event"] in ("round", "short"):
        said = (
            f"{s['site']} {plain(s['refused']) or ('-' if s['loss'] is None else s['loss'])}" for s in event["sites"]
        )
        took = f" ({event['seconds']:.0f} s, training {event['training_seconds']:.0f} s)" if "seconds" in event else ""
        return f"{where}{' fell short' if event['event'] == 'short' else ''}: {', '.join(said)}{took}"
    if event["event"] == "gathering":
        return f"{where}: waiting for sites; missing: {', '.join(event['missing']) or 'none that is admitted'}"
    if event["event"] in ("lost", "again"):
        return plain(event["message"])
    return ""
