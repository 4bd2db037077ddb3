"""``medlsdm-server certificate``: until when the server's certificate is good, and a new one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from medlsdm.terminal import print_json
from medlsdm_server.cli_options import Home, Json, open_home

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Show and renew the server's certificate.")


def _row(state: Any) -> dict[str, Any]:
    return {
        "what": state.what, "until": state.until.isoformat(), "days_left": round(state.days_left, 1),
        "hosts": list(state.hosts),
    }  # fmt: skip


@app.command()
def show(home: Home = None, as_json: Json = False) -> None:
    """Show until when the certificates are good, and for which hosts."""
    from medlsdm_server.authority import certificate_states

    rows = [_row(state) for state in certificate_states(open_home(home))]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        hosts = f" for {', '.join(row['hosts'])}" if row["hosts"] else ""
        print(f"{row['what']}{hosts}: until {row['until'][:10]}, {row['days_left']:.0f} days left")


@app.command()
def renew(
    home: Home = None,
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the server; default: as before.")] = None,
    as_json: Json = False,
) -> None:
    """Make a new server certificate from the same CA. A running coordinator takes it up; nodes need nothing."""
    from medlsdm_server.authority import renew_server_certificate

    row = _row(renew_server_certificate(open_home(home), host or ()))
    if as_json:
        print_json(row)
    else:
        print(f"The new certificate for {', '.join(row['hosts'])} is good until {row['until'][:10]}.")
