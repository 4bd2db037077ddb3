"""Which hospitals take part: invitations (as digests only) and sites, in one SQLite file.

``pending`` sites asked without an invitation and wait; ``admitted`` ones take part; ``revoked`` ones are cut off and
stay on record, so that their keys and their name do not come back by themselves.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from medlsdm.errors import EnrolmentError, ResourceError, UsageError
from medlsdm.federation.identity import EnrolRequest, Invitation

PENDING, ADMITTED, REVOKED = "pending", "admitted", "revoked"
MOST_PENDING, MOST_PENDING_OF_ADDRESS = 100, 5  # anybody may ask without an invitation
PENDING_SECONDS, OLD_INVITATION_SECONDS = 86_400, 30 * 86_400
BUSY_SECONDS = 60.0

_TABLES = """
CREATE TABLE IF NOT EXISTS invitations (
    digest TEXT PRIMARY KEY, site TEXT NOT NULL, expires INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, status TEXT NOT NULL, node_key TEXT NOT NULL UNIQUE, identity TEXT NOT NULL,
    node_id TEXT NOT NULL DEFAULT '', enrolled INTEGER NOT NULL, seen INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL);
INSERT INTO version SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM version);
"""
_TABLE_COUNT = 3
_NEW_COLUMNS = {"sites": ("address", "pledge", "reason"), "invitations": ("replaces",)}
_FIELDS = "name, status, node_key, identity, node_id, enrolled, seen, pledge, reason"


@dataclass(frozen=True, slots=True)
class Site:
    """Describe one hospital as the coordinator knows it. Times are seconds since 1970.

    ``pledge`` is its own signed word that it takes part, ``reason`` why it was revoked.
    """

    name: str
    status: str
    node_key: str
    identity: str
    node_id: str
    enrolled: int
    seen: int
    pledge: str = ""
    reason: str = ""


class Registry:
    """Keep invitations and sites. Each call is one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as database:  # reading must need no room on the disk, so nothing is written that is there
            if len(database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table'").fetchall()) < _TABLE_COUNT:
                database.executescript(_TABLES)
            for table, columns in _NEW_COLUMNS.items():
                known = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
                for column in set(columns) - known:
                    database.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")
        if path.stat().st_mode & 0o777 != 0o600:
            path.chmod(0o600)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = None
        try:
            database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            yield database
        except sqlite3.OperationalError as error:
            raise ResourceError(f"The registry could not be used ({error}).", "Check free space.") from error
        finally:
            if database is not None:
                database.close()

    @contextmanager
    def _change(self, *, told: bool = True) -> Iterator[sqlite3.Connection]:
        """Open a transaction that has the right to write from its start, so that it never fails half way."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                if told:
                    database.execute("UPDATE version SET number = number + 1")
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:  # a full disk ends it by itself
                    database.execute("ROLLBACK")
                raise

    def version(self) -> int:
        """Return a number that grows with every change of who takes part, by whatever process."""
        with self._open() as database:
            return database.execute("SELECT number FROM version").fetchone()[0]

    def invite(self, invitation: Invitation, *, again: bool = False) -> None:
        """Remember an invitation by the digest of its token; ``again`` lets it replace a site that is known."""
        with self._change(told=False) as database:
            known = database.execute("SELECT status FROM sites WHERE name = ?", (invitation.site,)).fetchone()
            if known and known[0] != PENDING and not again:
                raise UsageError(
                    f"The site {invitation.site} is {known[0]} already.",
                    f"Let it enrol anew with 'medlsdm-server sites re-invite {invitation.site}'.",
                )
            if again and not known:
                raise UsageError(f"No site called {invitation.site} is known.", "Use 'medlsdm-server invite'.")
            database.execute("DELETE FROM invitations WHERE expires < ?", (int(time.time()) - OLD_INVITATION_SECONDS,))
            database.execute(
                "INSERT INTO invitations (digest, site, expires, replaces) VALUES (?, ?, ?, ?)",
                (invitation.token_digest, invitation.site, invitation.expires, "yes" if again else ""),
            )

    def enrol(self, request: EnrolRequest, address: str = "") -> Site:
        """Accept a site: admitted with a valid token, pending without one. Asking again changes nothing.

        Whoever holds the invitation gets the name, even if somebody without one asked for it before.

        Raises:
            EnrolmentError: The token is unknown, used, expired or for another site, the name is taken, or the site
                was revoked.
        """
        try:
            with self._change() as database:
                database.execute(
                    "DELETE FROM sites WHERE status = ? AND enrolled <= ?",
                    (PENDING, int(time.time()) - PENDING_SECONDS),
                )
                known = _site(database, request.site)
                same = known is not None and (known.node_key, known.identity) == (request.node_key, request.identity)
                again = known is not None and same and known.status == ADMITTED and not _good(database, request)
                if known is not None and same and (again or (known.status != REVOKED and not request.token)):
                    database.execute("UPDATE sites SET pledge = ? WHERE name = ?", (request.pledge, request.site))
                    return replace(known, pledge=request.pledge)  # the invitation that it came with, once more
                if known is not None and known.status == REVOKED and not request.token:
                    raise EnrolmentError("The coordinator has revoked this site.", "Ask for a new invitation.")
                if known is not None and not same and not request.token:
                    raise EnrolmentError(
                        f"The name {request.site} belongs to a site with other keys.",
                        "Ask the coordinator for another name.",
                    )
                _insert(database, request, known, address)
                site = _site(database, request.site)
        except sqlite3.IntegrityError as error:
            raise EnrolmentError(
                "Another site has this name or this key.", "Make a new node with 'init', or ask for another name."
            ) from error
        assert site is not None
        return site

    def admit(self, name: str) -> None:
        """Let a pending site in."""
        with self._change() as database:
            query = "UPDATE sites SET status = ? WHERE name = ? AND status IN (?, ?)"
            if not database.execute(query, (ADMITTED, name, PENDING, ADMITTED)).rowcount:
                raise _nobody(database, name, "has asked")

    def deny(self, name: str) -> None:
        """Send a pending site away; its name is free again."""
        with self._change() as database:
            if not database.execute("DELETE FROM sites WHERE name = ? AND status = ?", (name, PENDING)).rowcount:
                raise _nobody(database, name, "waits")

    def revoke(self, name: str, reason: str = "") -> None:
        """Cut an admitted site off; it stays on record and cannot enrol again without a new invitation."""
        with self._change() as database:
            query = "UPDATE sites SET status = ?, reason = ? WHERE name = ? AND status IN (?, ?)"
            if not database.execute(query, (REVOKED, reason, name, ADMITTED, REVOKED)).rowcount:
                raise _nobody(database, name, "is admitted")
            database.execute("DELETE FROM invitations WHERE site = ? AND used = 0", (name,))

    def remove(self, name: str) -> None:
        """Forget a site and its invitations altogether."""
        with self._change() as database:
            if not database.execute("DELETE FROM sites WHERE name = ?", (name,)).rowcount:
                raise _nobody(database, name, "is known")
            database.execute("DELETE FROM invitations WHERE site = ?", (name,))

    def set_node_id(self, name: str, node_id: str) -> None:
        """Remember under which number the running SuperLink knows the site."""
        with self._change() as database:
            database.execute("UPDATE sites SET node_id = ? WHERE name = ?", (node_id, name))

    def clear_node_ids(self) -> None:
        """Forget every number: they are good for one run of the SuperLink."""
        with self._change() as database:
            database.execute("UPDATE sites SET node_id = ''")

    def touch(self, name: str) -> None:
        """Remember that the site was heard of now."""
        with self._change(told=False) as database:
            database.execute("UPDATE sites SET seen = ? WHERE name = ?", (int(time.time()), name))

    def site(self, name: str) -> Site | None:
        """Return one site, or None."""
        with self._open() as database:
            return _site(database, name)

    def sites(self) -> list[Site]:
        """Return every site, by name; pending ones for a day."""
        query = f"SELECT {_FIELDS} FROM sites WHERE status != ? OR enrolled > ? ORDER BY name"  # noqa: S608  # constants
        with self._open() as database:
            return [Site(*row) for row in database.execute(query, (PENDING, int(time.time()) - PENDING_SECONDS))]


def _site(database: sqlite3.Connection, name: str) -> Site | None:
    row = database.execute(f"SELECT {_FIELDS} FROM sites WHERE name = ?", (name,)).fetchone()  # noqa: S608
    return Site(*row) if row else None


def _nobody(database: sqlite3.Connection, name: str, what: str) -> UsageError:
    known = _site(database, name)
    state = f" It is {known.status}." if known else ""
    return UsageError(f"No site called {name} {what}.{state}", "See 'medlsdm-server sites list'.")


_VALID = "digest = ? AND site = ? AND used = 0 AND expires > ?"


def _token(request: EnrolRequest) -> tuple[str, str, int]:
    return Invitation.model_construct(token=request.token).token_digest, request.site, int(time.time())


def _good(database: sqlite3.Connection, request: EnrolRequest) -> bool:
    row = database.execute(f"SELECT 1 FROM invitations WHERE {_VALID}", _token(request)).fetchone()  # noqa: S608
    return row is not None


def _insert(database: sqlite3.Connection, request: EnrolRequest, known: Site | None, address: str) -> None:
    """Write a site down, in place of the one that waited under its name, or of one that was invited anew."""
    if request.token:
        query = f"SELECT replaces FROM invitations WHERE {_VALID}"  # noqa: S608  # constants
        row = database.execute(query, _token(request)).fetchone()
        if known is not None and known.status == ADMITTED and not (row and row[0]):
            raise EnrolmentError(
                f"The name {request.site} belongs to a site with other keys.", "Ask the coordinator for another name."
            )
        if row is None or (known is not None and known.status == REVOKED and not row[0]):
            raise EnrolmentError(
                "The invitation is unknown, used up, expired or for another site.", "Ask the coordinator for a new one."
            )
        database.execute("UPDATE invitations SET used = 1 WHERE digest = ?", _token(request)[:1])
        database.execute("DELETE FROM sites WHERE name = ?", (request.site,))
    else:
        _check_room(database, address)
    database.execute(
        "INSERT INTO sites (name, status, node_key, identity, enrolled, address, pledge) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            request.site, ADMITTED if request.token else PENDING, request.node_key, request.identity,
            int(time.time()), address, request.pledge,
        ),
    )  # fmt: skip


def _check_room(database: sqlite3.Connection, address: str) -> None:
    """Raise EnrolmentError when too many sites wait."""
    waiting = [row[0] for row in database.execute("SELECT address FROM sites WHERE status = ?", (PENDING,))]
    if len(waiting) >= MOST_PENDING or (address and waiting.count(address) >= MOST_PENDING_OF_ADDRESS):
        raise EnrolmentError("Too many sites wait to be admitted.", "Ask for an invitation.")
