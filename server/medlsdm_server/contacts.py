"""When each site was last heard of, and what its node says it does: kept by the gateway, read by everybody else."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from medlsdm_server.home import ServerHome

SAVE_SECONDS = 1.0


@dataclass(slots=True)
class Contact:
    """Hold one site's contact. Times are seconds since 1970, 0 for never.

    ``at`` is its last call, ``pulled`` its last successful question for work, ``activated`` when its SuperNode
    last signed on, ``activity`` what the node does (``activity``, ``model``, ``stage``, ``round``), ``clock_s``
    how far its clock is ahead of ours.
    """

    at: float = 0.0
    pulled: float = 0.0
    activated: float = 0.0
    clock_s: float = 0.0
    activity: dict[str, Any] = field(default_factory=dict)


class Contacts:
    """Note contacts in memory; ``save`` writes them for other processes, at most once a second."""

    def __init__(self, home: ServerHome) -> None:
        self.home, self.sites = home, read_contacts(home)
        self._saved, self._changed = 0.0, False

    def of(self, site: str) -> Contact:
        """Return the contact of a site to write into."""
        self._changed = True
        return self.sites.setdefault(site, Contact())

    def save(self) -> None:
        """Write what changed. A loss of power may lose it: it is worth seconds only, so nothing is synced."""
        now = time.monotonic()
        if not self._changed or now - self._saved < SAVE_SECONDS:
            return
        self._saved, self._changed = now, False
        path = _file(self.home)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({site: asdict(contact) for site, contact in self.sites.items()}))
        os.replace(draft, path)


def _file(home: ServerHome) -> Any:
    return home.run / "contacts.json"


def read_contacts(home: ServerHome) -> dict[str, Contact]:
    """Return each site's contact by name; empty where no gateway has run or the file cannot be read."""
    try:
        rows = json.loads(_file(home).read_text())
        names = {f.name for f in fields(Contact)}
        return {site: Contact(**{k: v for k, v in row.items() if k in names}) for site, row in rows.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
