"""``join``: trust the server, enrol, wait to be admitted, then serve rounds until stopped."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from medlsdm.errors import EnrolmentError, MedlsdmError, NetworkError, UsageError
from medlsdm.federation.identity import Invitation, public_hex, shown
from medlsdm_node.coordinator import Coordinator, ServerAddress
from medlsdm_node.home import NodeHome, NodeSettings
from medlsdm_node.policy import load_policy
from medlsdm_node.status import ROUND_ACTIVITIES, read_activity, write_activity
from medlsdm_node.working import wipe_leftovers

ASK_SECONDS = 2.0
LOG_BYTES, LOGS_KEPT = 5 << 20, 3


def read_invitation(file: Path | None, environment: str | None) -> Invitation | None:
    """Return the invitation from a file, else from ``MEDLSDM_INVITATION``, else None."""
    if file is not None and not file.is_file():
        raise UsageError(f"There is no invitation file {str(file)!r}.", "Check the path.")
    text = file.read_text(encoding="utf-8", errors="replace") if file else environment
    return Invitation.decode(text) if text else None


def prepare(
    home: NodeHome, server: str, invitation: Invitation | None, default_settings: NodeSettings | None
) -> Coordinator:
    """Make the node if there is none, pin the server and enrol.

    Raises:
        EnrolmentError: The invitation or the server is not right. Nothing is kept of it.
        NetworkError: Nobody answers.
    """
    address = ServerAddress.parse(server)
    if not home.settings_file.exists() and default_settings is not None:
        home.create(default_settings)
    if invitation is not None and invitation.site != home.settings.site:
        raise EnrolmentError(
            f"The invitation is for {invitation.site}; this node is {home.settings.site}.",
            "Use the right invitation, or a node made with that name (init --site).",
        )
    load_policy(home.policy_file)
    coordinator = Coordinator(home, address)
    fresh = not home.ca_cert.exists()
    try:
        coordinator.pin(invitation.ca if invitation else None, _confirm)
        _enrol(coordinator, invitation, fresh)
    except MedlsdmError:
        if fresh:
            coordinator.unpin()
        raise
    home.audit.append("joined", server=str(coordinator.address))
    return coordinator


def _enrol(coordinator: Coordinator, invitation: Invitation | None, fresh: bool) -> None:
    """Enrol. A node that has been here before goes on even while the coordinator cannot be reached."""
    try:
        coordinator.enrol(invitation)
    except NetworkError:
        if fresh:
            raise


def _confirm(found: str) -> bool:
    """Show the server's fingerprint to a person and ask."""
    if not sys.stdin.isatty():
        raise UsageError("There is no invitation, and nobody here to confirm the server.", "Give --invitation FILE.")
    print(f"The server's CA has the fingerprint\n  {shown(found)}", file=sys.stderr)
    print("Compare it with what the coordinator tells you by telephone.", file=sys.stderr)
    return input("Is it the same? [yes/no] ").strip().lower() in ("y", "yes")


def serve(home: NodeHome, coordinator: Coordinator, say: Callable[[str], None]) -> None:
    """Connect and serve rounds until SIGTERM or Ctrl-C."""
    from medlsdm_node.supernode import SuperNode, install_app

    handler = RotatingFileHandler(home.logs / "node.log", maxBytes=LOG_BYTES, backupCount=LOGS_KEPT)
    logging.basicConfig(handlers=[handler], level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with home.locked("join"):
        if left := wipe_leftovers(home):
            say(f"{left} folders that an earlier run left in clear when it was killed were deleted.")
        node = SuperNode(home, coordinator, say)

        def stop(*_: Any) -> None:
            node.stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        _wait_for_admission(home, coordinator, node, say)
        try:
            if not node.stopping:
                archive = install_app(home)
                write_activity(home, "waiting")
                say(f"{home.settings.site} serves {coordinator.address} with the app {archive}. Ctrl-C stops it.")
                node.watch(_announcer(home, node, say))
        finally:
            node.stop()
            write_activity(home, "stopped")
    say("Stopped.")


def _wait_for_admission(home: NodeHome, coordinator: Coordinator, node: Any, say: Callable[[str], None]) -> None:
    """Ask until the coordinator has admitted this site, however long it cannot be reached."""
    told = ""
    while not node.stopping:
        try:
            if coordinator.status() == "admitted":
                return
            news = f"Waiting for the coordinator to admit this site. Its key: {shown(public_hex(home.identity))}"
        except NetworkError as error:
            news = f"{error} Trying again."
        if news != told:
            say(news)
            told = news
        time.sleep(ASK_SECONDS)


def _announcer(home: NodeHome, node: Any, say: Callable[[str], None]) -> Callable[[], None]:
    """Return what says a line whenever the node begins or ends something, and notes when it waits again."""
    last: tuple[Any, ...] = ()

    def tick() -> None:
        nonlocal last
        now = read_activity(home)
        if now["activity"] in ROUND_ACTIVITIES and node.waits:
            write_activity(home, "waiting")
        key = (now["activity"], now.get("stage"), now.get("round"))
        if key != last and now["activity"] in ("training", "encoding", "refused"):
            where = f"{now.get('stage')} round {now.get('round')}/{now.get('rounds')}" if "stage" in now else ""
            say(f"{now['activity']} {where}{now.get('reason', '')}")
        last = key

    return tick
