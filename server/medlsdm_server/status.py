"""What the coordinator knows, as JSON values: sites, the current launch, models. True at the moment of asking."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from medlsdm_server import models
from medlsdm_server.contacts import Contact, read_contacts
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import is_led, launches, read_events
from medlsdm_server.registry import Registry

HEARD_SECONDS = 60


def launch_status(home: ServerHome, launch: str) -> dict[str, Any]:
    """Return how far a launch is: its state, stage, round, a row a finished round, and refusals of rounds tried again.

    ``state`` is ``pending`` (it waits for its turn or starts), ``waiting for sites``, ``running``, ``finished``,
    ``failed``, ``stopped`` or ``interrupted`` (no coordinator leads it now).
    """
    events = read_events(home, launch)
    last = next((e for e in reversed(events) if e["event"] in ("asked", "round", "gathering", "short")), {})
    closing = ("finished", "failed", "stopped", "interrupted", "launched", "resumed", "started")
    closed = next((e for e in reversed(events) if e["event"] in closing), {"event": "launched"})
    return {
        "id": launch,
        "state": _state(home, launch, closed["event"], last.get("event", "")),
        "stage": last.get("stage", ""),
        "round": last.get("round", 0),
        "rounds": last.get("rounds", 0),
        "finished_rounds": [e for e in events if e["event"] == "round"],
        "short_rounds": [e for e in events if e["event"] == "short"],
        "missing": last.get("missing", []) if last.get("event") == "gathering" else [],
        "message": _message(events),
    }


def _state(home: ServerHome, launch: str, closed: str, last: str) -> str:
    if closed in ("finished", "failed", "stopped", "interrupted"):
        return closed
    if is_led(home, launch):
        return "waiting for sites" if last == "gathering" else "running"
    return "pending" if running(home) else "interrupted"


def _message(events: list[dict[str, Any]]) -> str:
    """Return why a launch failed, or what went wrong last, if nothing has gone right since."""
    for event in reversed(events):
        if event["event"] in ("failed", "lost", "again", "interrupted"):
            return str(event.get("message", ""))
        if event["event"] in ("round", "finished", "launched", "resumed"):
            return ""
    return ""


def site_rows(home: ServerHome) -> list[dict[str, Any]]:
    """Return every site, never a token. ``key`` is what ``join`` shows on the other side, ``seen`` its last call."""
    contacts = read_contacts(home)
    rows = []
    for site in Registry(home.registry).sites():
        contact = contacts.get(site.name, Contact())
        rows.append(
            {
                "site": site.name, "status": site.status, "key": site.identity, "enrolled": site.enrolled,
                "seen": int(contact.at) or site.seen, "activity": contact.activity, "clock_s": contact.clock_s,
                "reason": site.reason,
            }
        )  # fmt: skip
    return rows


def heard(row: dict[str, Any]) -> str:
    """Say in words when a site was last heard of."""
    if not row["seen"]:
        return "never heard of"
    ago = max(int(time.time() - row["seen"]), 0)
    units = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    since = next((f"{ago // seconds} {word}" for seconds, word in units if ago >= seconds), "0 s")
    clock = f", its clock is {row['clock_s']:+.0f} s off" if abs(row["clock_s"]) > 5 else ""
    return (f"heard {since} ago" if ago < HEARD_SECONDS else f"silent for {since}") + clock


def server_status(home: ServerHome) -> dict[str, Any]:
    """Return sites, the launch whose turn it is (or the newest), and the newest model."""
    known = launches(home)
    model = models.latest(home.models)
    current = next((i for i in known if is_led(home, i)), known[-1] if known else None)
    return {
        "running": running(home),
        "sites": site_rows(home),
        "launch": launch_status(home, current) if current else None,
        "model": model.to_json() if model else None,
    }


def running(home: ServerHome) -> dict[str, Any] | None:
    """Return port and process of the running coordinator; one that was killed left its note behind."""
    try:
        address = json.loads((home.run / "address.json").read_text())
        os.kill(int(address["pid"]), 0)
    except (OSError, ValueError, KeyError):
        return None
    return address
