"""The coordinator's command line: thin; each command parses, calls and prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from medlsdm.terminal import print_json, run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Coordinate hospitals that train together.")

Home = Annotated[Path | None, typer.Option("--home", help="The coordinator's folder (MEDLSDM_SERVER_HOME).")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def _open(home: Path | None) -> Any:
    from medlsdm_server.home import ServerHome

    opened = ServerHome.default(home)
    opened.settings()
    return opened


@app.command()
def init(
    host: Annotated[list[str], typer.Option(help="Name or address that hospitals use; may be repeated.")],
    home: Home = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that hospitals use.")] = 8443,
    name: Annotated[str, typer.Option(help="Name of the federation.")] = "medlsdm",
    as_json: Json = False,
) -> None:
    """Make a coordinator: its folder, CA and server certificate."""
    from medlsdm.federation.identity import fingerprint, shown
    from medlsdm_server.authority import create_certificates
    from medlsdm_server.home import ServerHome, ServerSettings

    opened, settings = ServerHome.default(home), ServerSettings(name=name, hosts=tuple(host), port=port)
    opened.create(settings)
    create_certificates(opened, settings)
    digest = fingerprint(opened.ca_cert.read_bytes())
    if as_json:
        print_json({"home": str(opened.root), "ca": digest, "hosts": host, "port": port})
        return
    print(f"Coordinator in {opened.root}")
    print(f"CA fingerprint: {shown(digest)}")
    print("Next: medlsdm-server start, then medlsdm-server invite --hospital NAME")


@app.command()
def invite(
    hospital: Annotated[str, typer.Option(help="Short name of the site: letters, digits, dashes.")],
    home: Home = None,
    out: Annotated[Path | None, typer.Option(help="Write the invitation to this file (0600).")] = None,
    valid_hours: Annotated[float, typer.Option(min=0.01, max=8760)] = 168.0,
    as_json: Json = False,
) -> None:
    """Make a one-time invitation. It is a secret: hand it over on a safe way."""
    import re

    from medlsdm.checks import write_atomic
    from medlsdm.errors import UsageError
    from medlsdm.federation.identity import SITE_NAME, Invitation, fingerprint
    from medlsdm_server.registry import Registry

    opened = _open(home)
    if not re.fullmatch(SITE_NAME, hospital):
        raise UsageError("A site's name has 1-32 small letters, digits or dashes.", "For example: --hospital st-anna.")
    invitation = Invitation.new(hospital, fingerprint(opened.ca_cert.read_bytes()), valid_hours)
    Registry(opened.registry).invite(invitation)
    if out is not None:
        write_atomic(out, invitation.encode().encode() + b"\n", mode=0o600)
    if as_json:
        secret = {"file": str(out)} if out else {"invitation": invitation.encode()}
        print_json({"site": hospital, "expires": invitation.expires} | secret)
    else:
        print(f"Invitation for {hospital} in {out}" if out else invitation.encode())


@app.command()
def admit(hospital: Annotated[str, typer.Argument(help="A site that waits.")], home: Home = None) -> None:
    """Let a site in that asked without an invitation. Compare the key that ``status`` shows by telephone first."""
    from medlsdm_server.registry import Registry

    Registry(_open(home).registry).admit(hospital)
    print(f"{hospital} is admitted; its node connects by itself.")


@app.command()
def start(
    home: Home = None,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104  # hospitals come from outside
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the one given to init.")] = None,
) -> None:
    """Run the coordinator until it is stopped (Ctrl-C or SIGTERM)."""
    import sys

    from medlsdm_server.service import serve

    opened = _open(home)
    chosen = port or opened.settings().port
    serve(opened, bind, chosen, lambda: print(f"Coordinator ready on port {chosen}.", file=sys.stderr, flush=True))


@app.command()
def launch(
    home: Home = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each stage; default: the plan's.")] = None,
    plan: Annotated[str, typer.Option(help="A plan of configs/federation, or a YAML file.")] = "default",
    sites: Annotated[int | None, typer.Option(min=1, help="How many sites must take part.")] = None,
    resume: Annotated[str, typer.Option(help="Go on with this launch from its last checkpoint.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    as_json: Json = False,
) -> None:
    """Train across the hospitals: rounds of stage 1, then of stage 2."""
    from medlsdm.errors import RoundError
    from medlsdm_server import launch as launching
    from medlsdm_server.status import launch_status
    from medlsdm_server.superlink import CONNECTION, flwr

    opened = _open(home)
    if resume:
        chosen = launching.read_launch(opened, resume)
    else:
        wanted = launching.load_plan(plan)
        stages = {s: getattr(wanted, s).model_copy(update={"rounds": rounds}) for s in ("stage1", "stage2")}
        wanted = wanted.model_copy(update=(stages if rounds else {}) | ({"sites": sites} if sites else {}))
        chosen = launching.new_launch(opened, wanted)
    archive = _app_folder(opened)
    launching.note(opened, chosen.id, "launched")
    answer = flwr(opened, "run", str(archive), CONNECTION, "--run-config", f'launch="{chosen.id}"')
    status = launch_status(opened, chosen.id)
    if not detach:
        status = _follow(opened, chosen.id, str(answer.get("run-id", "")), quiet=as_json)
    if as_json:
        print_json(status | {"run": str(answer.get("run-id", ""))})
    if status["state"] == "failed":
        raise RoundError(f"Launch {chosen.id} failed: {status['message']}", f"Resume: launch --resume {chosen.id}")
    if not as_json:
        print(f"Launch {chosen.id}: {status['state']}.")


def _app_folder(home: Any) -> Path:
    import shutil

    from medlsdm.federation.app import APP_FOLDER

    folder = home.run / "federation"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(APP_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _follow(home: Any, identity: str, flower_run: str, *, quiet: bool) -> dict[str, Any]:
    """Wait for the end of a launch; show a line a round. A run that Flower lost counts as failed."""
    from rich.console import Console

    from medlsdm_server.status import launch_status
    from medlsdm_server.superlink import flwr

    console, shown, checked = Console(stderr=True, quiet=quiet, soft_wrap=True), 0, time.monotonic()
    while True:
        status = launch_status(home, identity)
        for row in status["finished_rounds"][shown:]:
            parts = (f"{s['site']} {s['loss'] if s['loss'] is not None else s['refused'] or '-'}" for s in row["sites"])
            console.print(
                f"{row['stage']} round {row['round']}/{row['rounds']}: {', '.join(parts)} "
                f"({row['seconds']:.0f} s, training {row['training_seconds']:.0f} s)",
                highlight=False,
            )
        shown = len(status["finished_rounds"])
        if status["state"] in ("finished", "failed"):
            return status
        if flower_run and time.monotonic() - checked > 30:
            checked = time.monotonic()
            runs = flwr(home, "list", "--run-id", flower_run).get("runs", [{}])
            said = str(runs[0].get("status", ""))
            if said.startswith("finished") and launch_status(home, identity)["state"] in ("waiting", "running"):
                return status | {"state": "failed", "message": f"Flower ended the run ({said})."}
        time.sleep(0.5)


@app.command()
def status(home: Home = None, as_json: Json = False) -> None:
    """Show sites, the newest launch and the newest model."""
    from medlsdm.federation.identity import shown
    from medlsdm_server.status import server_status

    found = server_status(_open(home))
    if as_json:
        print_json(found)
        return
    print("running" if found["running"] else "not running")
    for site in found["sites"]:
        key = f"  key {shown(site['key'])}" if site["status"] == "pending" else ""
        print(f"  {site['site']:20} {site['status']}{key}")
    if found["launch"]:
        row = found["launch"]
        print(
            f"launch {row['id']}: {row['state']}, {row['stage']} round {row['round']}/{row['rounds']} {row['message']}"
        )
    if found["model"]:
        print(f"model  {found['model']['id']}")


@app.command()
def models(home: Home = None, as_json: Json = False) -> None:
    """List the checkpoints that rounds made, oldest first."""
    from medlsdm_server.models import list_models

    opened = _open(home)
    found = [m.to_json() for m in list_models(opened.models)]
    if as_json:
        print_json(found)
        return
    for row in found:
        print(f"{row['id']}  {row['size_bytes'] / 1e6:.1f} MB  card {row['digest'][:16]}  {opened.models / row['id']}")
    if not found:
        print("No model yet. Launch rounds with 'medlsdm-server launch'.")


def main() -> None:
    """Run the program."""
    run(app, "medlsdm-server")
