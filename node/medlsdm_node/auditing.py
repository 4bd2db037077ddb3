"""Check what a node wrote about itself: audit log with its signatures, ledger, and the receipt of an export."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medlsdm.chain import HashChain
from medlsdm.errors import DataError, IntegrityError
from medlsdm.federation.identity import public_hex
from medlsdm_node import evidence
from medlsdm_node.home import NodeHome
from medlsdm_node.vault import PAIR, Vault

_RESTORE = "Restore it from a good copy."


def check(home: NodeHome, folder: Path | None) -> dict[str, Any]:
    """Verify every line of audit log and ledger, and the receipt of an exported folder if given.

    A receipt names the log's head at its time: a log that no longer holds it was cut or rewritten.

    Raises:
        IntegrityError: Something was changed; the message says what.
    """
    from medlsdm.privacy.ledger import PrivacyLedger
    from medlsdm.sharing.receipt import verify_receipt

    state, records = home.audit.verify(), home.audit.records()
    if not records:
        raise IntegrityError("The audit log is gone: a node writes its first line when it is made.", _RESTORE)
    check_ledger(home, records)
    spent = PrivacyLedger(home.root / "ledger.jsonl").spent()
    epsilon = "infinite" if math.isinf(spent.epsilon) else round(spent.epsilon, 4)
    receipt = None
    if folder is not None:
        verified = verify_receipt(folder, bytes.fromhex(public_hex(home.identity)))
        if verified.audit_head not in {r["hash"] for r in records}:
            raise IntegrityError(
                "The audit log does not hold the entry that the receipt names: it was cut or rewritten.",
                _RESTORE,
            )
        receipt = {"id": verified.id, "site": verified.site, "files": len(verified.files)}
    return {
        "records": [
            {
                "n": r["n"],
                "time": r["time"],
                "event": r["event"],
                "fields": r["fields"],
                "summary": _summary(r["fields"]),
            }
            for r in records
        ],
        "head": state.head,
        "signed_from": state.signed_from,
        "clock_went_back": [b["n"] for a, b in pairwise(records) if b["time"] < a["time"]],
        **_unknown(home),
        "key": public_hex(home.identity),
        "ledger": {"charges": spent.charges, "epsilon": epsilon, "statement": spent.statement},
        "receipt": receipt,
    }


def _unknown(home: NodeHome) -> dict[str, int]:
    """Count what the vault holds and the log does not know: the log is an older copy, or an ingest was killed."""
    kept = evidence.records(home)
    known = {row["token"] for record in kept if record.in_log for row in record.document["series"]}
    pairs = ("/".join(name.split(".")[:2]) for name in Vault(home).names(PAIR))
    return {
        "evidence_not_in_log": sum(not record.in_log for record in kept),
        "pairs_not_in_log": sum(token not in known for token in pairs),
    }


def check_ledger(home: NodeHome, records: list[dict[str, Any]]) -> None:
    """Refuse a ledger that lacks a charge of which the signed log knows: it was put back, and a budget with it.

    Args:
        home: The node.
        records: The audit log, verified.

    Raises:
        IntegrityError: It was cut, removed or replaced by an older copy; or the ledger itself was changed.
    """
    charges = {record["hash"] for record in HashChain(home.root / "ledger.jsonl").records()}
    rounds = [record["fields"] for record in records if record["event"] == "round"]
    named = {fields["ledger"] for fields in rounds if "ledger" in fields}
    if len(rounds) > len(charges) or named - charges:
        raise IntegrityError(
            "The privacy ledger lacks a charge that the audit log names: it was cut or replaced.",
            "Restore it from a good copy; until then nothing is trained.",
        )


def check_log(path: Path, key: str) -> dict[str, Any]:
    """Verify a copy of some site's audit log with that site's public key; nothing else of the site is needed.

    Args:
        path: ``audit.jsonl``, under any name; the statement of its end is looked for beside it, as a file of the same
            name with ``.end``, else as ``audit.end``.
        key: The site's Ed25519 key in hex, known from elsewhere.

    Raises:
        DataError: There is no such file, or the key is not one.
        IntegrityError: Something was changed; the message says what.
    """
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except ValueError:
        raise DataError("The key is not 64 hex digits.", "The site's 'medlsdm-node audit' prints it.") from None
    if not path.is_file():
        raise DataError(f"There is no log {str(path)!r}.", "Check the path.")
    ends = [end for end in (path.with_suffix(".end"), path.with_name("audit.end")) if end.is_file()]
    state = HashChain(path, public=public, end=ends[0] if ends else None).verify(end_must_be_stated=False)
    return {
        "records": state.entries,
        "head": state.head,
        "signed_from": state.signed_from,
        "end_stated": state.stated,
        "end_file": ends[0].name if ends else None,
        "end": end_words(state.stated),
    }


def end_words(stated: int) -> str:
    """Say in words what is known of a log's end."""
    if stated:
        return f"its end is stated for {stated} records"
    return "NO statement of its end was found (audit.end): records cut off its end cannot be excluded"


def signed_words(signed_from: int | None) -> str:
    """Say in words how much of a log is signed."""
    if signed_from is None:
        return "NO record is signed: an earlier version wrote them, or their signatures were stripped"
    return "every record is signed" if not signed_from else f"unsigned until record {signed_from}, signed from it on"


def _summary(fields: dict[str, Any]) -> str:
    short = (f"{k}={str(v)[:24]}" for k, v in fields.items() if not isinstance(v, (dict, list)))
    return " ".join(short)
