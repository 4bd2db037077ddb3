"""Which hospitals take part: invitations (as digests only) and sites, in one SQLite file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medlsdm.errors import EnrolmentError, UsageError
from medlsdm.federation.identity import EnrolRequest, Invitation

PENDING, ADMITTED = "pending", "admitted"
MOST_PENDING = 100  # anybody may ask without an invitation

_TABLES = """
CREATE TABLE IF NOT EXISTS invitations (
    digest TEXT PRIMARY KEY, site TEXT NOT NULL, expires INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, status TEXT NOT NULL, node_key TEXT NOT NULL UNIQUE, identity TEXT NOT NULL,
    node_id TEXT NOT NULL DEFAULT '', enrolled INTEGER NOT NULL, seen INTEGER NOT NULL DEFAULT 0);
"""


@dataclass(frozen=True, slots=True)
class Site:
    """Describe one hospital as the coordinator knows it. Times are seconds since 1970."""

    name: str
    status: str
    node_key: str
    identity: str
    node_id: str
    enrolled: int
    seen: int


class Registry:
    """Keep invitations and sites. Each call is one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as database:
            database.executescript(_TABLES)
        path.chmod(0o600)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=20)
        try:
            with database:
                yield database
        finally:
            database.close()

    def invite(self, invitation: Invitation) -> None:
        """Remember an invitation by the digest of its token."""
        with self._open() as database:
            query = "SELECT 1 FROM sites WHERE name = ? AND status = ?"
            if database.execute(query, (invitation.site, ADMITTED)).fetchone():
                raise UsageError(f"The site {invitation.site} is enrolled already.", "Give a new site another name.")
            database.execute(
                "INSERT INTO invitations (digest, site, expires) VALUES (?, ?, ?)",
                (invitation.token_digest, invitation.site, invitation.expires),
            )

    def enrol(self, request: EnrolRequest) -> Site:
        """Accept a site: admitted with a valid token, pending without one. Asking again changes nothing.

        Whoever holds the invitation gets the name, even if somebody without one asked for it before.

        Raises:
            EnrolmentError: The token is unknown, used, expired or for another site, or the name is taken.
        """
        known = self.site(request.site)
        same = known is not None and (known.node_key, known.identity) == (request.node_key, request.identity)
        if known is not None and same and (known.status == ADMITTED or not request.token):
            return known
        if known is not None and not same and (known.status == ADMITTED or not request.token):
            raise EnrolmentError(
                f"The name {request.site} belongs to a site with other keys.", "Ask the coordinator for another name."
            )
        try:
            self._insert(request)
        except sqlite3.IntegrityError as error:
            raise EnrolmentError(
                "Another site has this name or this key.", "Make a new node with 'init', or ask for another name."
            ) from error
        site = self.site(request.site)
        assert site is not None
        return site

    def _insert(self, request: EnrolRequest) -> None:
        status = ADMITTED if request.token else PENDING
        with self._open() as database:
            if request.token:
                used = database.execute(
                    "UPDATE invitations SET used = 1 WHERE digest = ? AND site = ? AND used = 0 AND expires > ?",
                    (Invitation.model_construct(token=request.token).token_digest, request.site, int(time.time())),
                ).rowcount
                if not used:
                    raise EnrolmentError(
                        "The invitation is unknown, used up, expired or for another site.",
                        "Ask the coordinator for a new one.",
                    )
                database.execute("DELETE FROM sites WHERE name = ? AND status = ?", (request.site, PENDING))
            else:
                query = "SELECT COUNT(*) FROM sites WHERE status = ?"
                if database.execute(query, (PENDING,)).fetchone()[0] >= MOST_PENDING:
                    raise EnrolmentError("Too many sites wait to be admitted.", "Ask for an invitation.")
            database.execute(
                "INSERT INTO sites (name, status, node_key, identity, enrolled) VALUES (?, ?, ?, ?, ?)",
                (request.site, status, request.node_key, request.identity, int(time.time())),
            )

    def admit(self, name: str) -> None:
        """Let a pending site in."""
        with self._open() as database:
            if not database.execute("UPDATE sites SET status = ? WHERE name = ?", (ADMITTED, name)).rowcount:
                raise UsageError(f"No site called {name} has asked.", "See 'medlsdm-server status'.")

    def set_node_id(self, name: str, node_id: str) -> None:
        """Remember under which number Flower knows the site."""
        with self._open() as database:
            database.execute("UPDATE sites SET node_id = ? WHERE name = ?", (node_id, name))

    def touch(self, name: str) -> None:
        """Remember that the site was heard of now."""
        with self._open() as database:
            database.execute("UPDATE sites SET seen = ? WHERE name = ?", (int(time.time()), name))

    def site(self, name: str) -> Site | None:
        """Return one site, or None."""
        return next((s for s in self.sites() if s.name == name), None)

    def sites(self) -> list[Site]:
        """Return every site, by name."""
        query = "SELECT name, status, node_key, identity, node_id, enrolled, seen FROM sites ORDER BY name"
        with self._open() as database:
            return [Site(*row) for row in database.execute(query)]
