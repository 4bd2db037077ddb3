"""Plans that the coordinator has asked for, by digest, with what people of this hospital said to them; and the roster.

The first sight of a plan is kept with a summary in plain words. Where ``policy.yaml`` says ``plans: approved``, a plan
trains only after ``medlsdm-node plans approve``. The roster of a plan names each hospital in its own signed words, so
that how many take part does not rest on the coordinator's word alone; a hospital's key is pinned when first seen.
"""

from __future__ import annotations

import json
import time
from typing import Any

from medlsdm.checks import write_atomic
from medlsdm.errors import IntegrityError, PolicyError, UsageError
from medlsdm.federation.identity import fingerprint, public_hex, verify_pledge
from medlsdm.federation.plan import RoundPlan
from medlsdm_node.account import who
from medlsdm_node.home import NodeHome
from medlsdm_node.policy import SitePolicy

SHOWN = 12


def _read(home: NodeHome, name: str) -> dict[str, Any]:
    path = home.root / name
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise IntegrityError(
            f"{name} cannot be read.", "Restore it from a backup, or delete it and decide anew."
        ) from error


def _write(home: NodeHome, name: str, content: dict[str, Any]) -> None:
    write_atomic(home.root / name, json.dumps(content, indent=1).encode(), mode=0o600)


def plans(home: NodeHome) -> list[dict[str, Any]]:
    """Return every plan that was asked for: digest, summary, when first seen, and whether it is approved."""
    rows = [{"digest": digest} | row for digest, row in _read(home, "plans.json").items()]
    return sorted(rows, key=lambda row: row["seen"])


def check_approved(home: NodeHome, plan: RoundPlan, policy: SitePolicy) -> None:
    """Keep a plan that is new; raise PolicyError where it needs an approval that it does not have."""
    known = _read(home, "plans.json")
    if plan.digest not in known:
        known[plan.digest] = {"summary": plan.summary, "seen": int(time.time()), "approved": False, "by": ""}
        _write(home, "plans.json", known)
        home.audit.append("plan-seen", plan=plan.digest, summary=plan.summary)
    if policy.plans == "approved" and not known[plan.digest]["approved"]:
        raise PolicyError(
            f"The plan {plan.digest[:SHOWN]} is not approved here.",
            f"Read 'medlsdm-node plans show {plan.digest[:SHOWN]}', then 'plans approve' it.",
        )


def decide(home: NodeHome, start: str, *, approved: bool) -> dict[str, Any]:
    """Approve a plan, or withdraw that; ``start`` is the beginning of its digest, at least six figures.

    Raises:
        UsageError: No plan, or more than one, begins so.
    """
    known = _read(home, "plans.json")
    digest = _one(known, start)
    known[digest] |= {"approved": approved, "by": who()}
    _write(home, "plans.json", known)
    home.audit.append("plan-approved" if approved else "plan-withdrawn", plan=digest, by=known[digest]["by"])
    return {"digest": digest} | known[digest]


def find(home: NodeHome, start: str) -> dict[str, Any]:
    """Return one plan by the beginning of its digest."""
    known = _read(home, "plans.json")
    digest = _one(known, start)
    return {"digest": digest} | known[digest]


def _one(known: dict[str, Any], start: str) -> str:
    found = [digest for digest in known if digest.startswith(start.lower())] if len(start) >= 6 else []
    if len(found) != 1:
        raise UsageError(f"{len(found) or 'No'} plans begin with {start!r}.", "See 'medlsdm-node plans list'.")
    return found[0]


def check_roster(home: NodeHome, plan: RoundPlan, policy: SitePolicy) -> None:
    """Raise PolicyError unless enough hospitals, this one among them, say in signed words that they take part."""
    if policy.min_sites <= 1 and not plan.roster:
        return
    ca = fingerprint(home.ca_cert.read_bytes()) if home.ca_cert.exists() else ""
    pinned = _read(home, "roster.json")
    counted: dict[str, str] = {}
    for entry in plan.roster:
        expected = (policy.known_sites or pinned).get(entry.site)
        if not verify_pledge(entry, ca):
            raise PolicyError(f"The roster's entry of {entry.site} is not signed by it.", "Call the coordinator.")
        if policy.known_sites and expected is None:
            continue
        if expected is not None and expected.replace(" ", "") != entry.identity:
            raise PolicyError(
                f"The key of {entry.site} is not the one that was known.",
                "Compare keys by telephone, then correct 'known_sites' in policy.yaml or delete roster.json.",
            )
        counted[entry.identity] = entry.site
    if public_hex(home.identity) not in {e.identity for e in plan.roster} or len(counted) < policy.min_sites:
        own = "included" if public_hex(home.identity) in counted else "not"
        raise PolicyError(
            f"The roster names {len(counted)} hospitals that count, this one {own};"
            f" at least {policy.min_sites} are required.",
            "Change 'min_sites' or 'known_sites' in policy.yaml to allow it.",
        )
    if fresh := {site: key for key, site in counted.items() if site not in pinned}:
        _write(home, "roster.json", pinned | fresh)
        home.audit.append("roster", sites=sorted(fresh))
