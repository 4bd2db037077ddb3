"""What the coordinator knows, as JSON values: sites, the current launch, models."""

from __future__ import annotations

import json
import os
from typing import Any

from medlsdm_server import models
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import read_events
from medlsdm_server.registry import Registry


def launch_status(home: ServerHome, launch: str) -> dict[str, Any]:
    """Return how far a launch is: its last state, stage, round, and one row a finished round."""
    events = read_events(home, launch)
    rounds = [e for e in events if e["event"] == "round"]
    state = next((e["event"] for e in reversed(events) if e["event"] in ("started", "finished", "failed")), "waiting")
    last = next((e for e in reversed(events) if e["event"] in ("asked", "round")), {})
    return {
        "id": launch,
        "state": {"started": "running"}.get(state, state),
        "stage": last.get("stage", ""),
        "round": last.get("round", 0),
        "rounds": last.get("rounds", 0),
        "finished_rounds": rounds,
        "message": next((e["message"] for e in reversed(events) if e["event"] == "failed"), ""),
    }


def server_status(home: ServerHome) -> dict[str, Any]:
    """Return sites, newest launch and newest model, never a token. ``key`` is what ``join`` shows on the other side."""
    sites = [
        {"site": s.name, "status": s.status, "key": s.identity, "enrolled": s.enrolled, "seen": s.seen}
        for s in Registry(home.registry).sites()
    ]
    launches = sorted(home.launches.glob("*.spec.json"), key=lambda p: p.stat().st_mtime)
    newest = launches[-1].name.removesuffix(".spec.json") if launches else None
    model = models.latest(home.models)
    return {
        "running": _running(home),
        "sites": sites,
        "launch": launch_status(home, newest) if newest else None,
        "model": model.to_json() if model else None,
    }


def _running(home: ServerHome) -> dict[str, Any] | None:
    """Return port and process of the running coordinator; one that was killed left its note behind."""
    try:
        address = json.loads((home.run / "address.json").read_text())
        os.kill(int(address["pid"]), 0)
    except (OSError, ValueError, KeyError):
        return None
    return address
