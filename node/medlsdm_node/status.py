"""What the node is doing, in one small file that the round writes and ``status`` reads."""

from __future__ import annotations

import json
import time
from typing import Any, NoReturn

from medlsdm.checks import write_atomic
from medlsdm.errors import ConfigError
from medlsdm.federation.identity import public_hex
from medlsdm_node.home import NodeHome

WATCH_SECONDS = 0.5
ROUND_ACTIVITIES = ("starting", "encoding", "training", "sending", "refused")  # what a coordinator may know of


def write_activity(home: NodeHome, activity: str, **fields: Any) -> None:
    """Say what the node does now: ``idle``, ``training``, ``synthesising``, ..."""
    content = json.dumps({"activity": activity, "time": round(time.time(), 2)} | fields)
    write_atomic(home.run / "activity.json", content.encode())


def read_activity(home: NodeHome) -> dict[str, Any]:
    """Return what the node does now."""
    try:
        return json.loads((home.run / "activity.json").read_bytes())
    except (OSError, ValueError):
        return {"activity": "idle", "time": 0}


def watch_activity(home: NodeHome) -> NoReturn:
    """Print the activity as one JSON line whenever it changes, until stopped."""
    last: dict[str, Any] = {}
    while True:
        now = read_activity(home)
        if now != last:
            print(json.dumps(now), flush=True)
            last = now
        time.sleep(WATCH_SECONDS)


def read_losses(home: NodeHome) -> list[dict[str, Any]]:
    """Return the training losses of this node: stage, round, step, loss."""
    if not home.losses.exists():
        return []
    lines = home.losses.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def node_status(home: NodeHome) -> dict[str, Any]:
    """Return everything that ``status`` shows; pseudonyms and counts stay on this machine."""
    from medlsdm_node.vault import PAIR, SYNTHETIC, Vault
    from medlsdm_node.working import leftovers

    settings = home.settings
    vault = Vault(home)
    server = json.loads(home.server_file.read_bytes()) if home.server_file.exists() else None
    return {
        "site": settings.site,
        "home": str(home.root),
        "key": public_hex(home.identity),
        "schema": settings.label_schema.name,
        "server": f"{server['host']}:{server['port']}" if server else None,
        "patients": len(vault.subjects()),
        "pairs": len(vault.names(PAIR)),
        "waiting_synthetic": len(vault.names(SYNTHETIC)),
        "models": sorted(p.name for p in home.models.iterdir() if not p.name.startswith(".")),
        "activity": read_activity(home),
        "left_in_clear": leftovers(home),
        **_received(home),
        "losses": read_losses(home),
        "audit_records": len(home.audit.records()),
        "deidentification": _deidentification(home),
    }


def _received(home: NodeHome) -> dict[str, int]:
    """Count the studies that wait in the spool to be taken in, and the items of ``quarantine list``."""
    from medlsdm_node.quarantine import items
    from medlsdm_node.spool import Spool

    spool = Spool(home)
    with spool.lock():  # or a file that is let go of meanwhile would be missed
        waiting = sum(spool.waiting(study) is not None for study in spool.studies())
        return {"waiting_studies": waiting, "quarantine": len(items(home))}


def _deidentification(home: NodeHome) -> dict[str, Any]:
    """Say under which settings this node de-identifies, and what in them is weaker than the default."""
    from medlsdm_node.deid_settings import load_deid

    try:
        rules = load_deid(home)
        rules.check_segmenter()
    except ConfigError as error:
        return {"error": str(error)}
    chosen = rules.settings
    return {
        "recipe": " + ".join([chosen.recipe, *chosen.options]),
        "text": chosen.text,
        "faces": chosen.faces,
        "pictures": chosen.pictures,
        "settings": rules.digest,
        "weaker": list(rules.weaker),
    }
