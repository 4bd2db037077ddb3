"""The coordinator's command line: thin; each command parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medlsdm.terminal import print_json, run
from medlsdm_server import cli_certificate, cli_launch, cli_sites
from medlsdm_server.cli_launch import _follow  # noqa: F401
from medlsdm_server.cli_options import Home, Json, hand_out, open_home

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Coordinate hospitals that train together.")
app.add_typer(cli_sites.app, name="sites")
app.add_typer(cli_certificate.app, name="certificate")


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
    """Make a one-time invitation. It is a secret: send it over a secure channel."""
    from medlsdm_server.invitations import new_invitation

    hand_out(new_invitation(open_home(home), hospital, valid_hours), out, as_json=as_json)


@app.command()
def admit(hospital: Annotated[str, typer.Argument(help="A site that waits.")], home: Home = None) -> None:
    """Let a site in that asked without an invitation. Compare the key that ``status`` shows by telephone first."""
    from medlsdm_server.registry import Registry

    Registry(open_home(home).registry).admit(hospital)
    print(f"{hospital} is admitted; its node connects by itself.")


@app.command()
def start(
    home: Home = None,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104  # hospitals come from outside
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the one given to init.")] = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Leave unfinished launches as they are.")] = False,
) -> None:
    """Run the coordinator until it is stopped (Ctrl-C or SIGTERM). Unfinished launches go on by themselves."""
    import sys

    from medlsdm_server.service import serve

    opened = open_home(home)
    chosen = port or opened.settings().port
    serve(opened, bind, chosen, lambda line: print(line, file=sys.stderr, flush=True), resume=not no_resume)


app.command("launch")(cli_launch.launch)
app.command("stop")(cli_launch.stop)


@app.command()
def status(home: Home = None, as_json: Json = False) -> None:
    """Show sites, the newest launch and the newest model."""
    from medlsdm.federation.identity import shown
    from medlsdm_server.status import heard, server_status

    found = server_status(open_home(home))
    if as_json:
        print_json(found)
        return
    print("running" if found["running"] else "not running")
    for site in found["sites"]:
        key = f"  key {shown(site['key'])}" if site["status"] == "pending" else f"  {heard(site)}"
        print(f"  {site['site']:20} {site['status']}{key}")
    if found["launch"]:
        cli_launch.show(found["launch"])
    if found["model"]:
        print(f"model  {found['model']['id']}")


@app.command()
def models(home: Home = None, as_json: Json = False) -> None:
    """List the checkpoints that rounds made, oldest first."""
    from medlsdm_server.models import list_models

    opened = open_home(home)
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
