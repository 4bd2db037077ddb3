"""Check what this node wrote about itself: audit log, ledger, and the receipt of an export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from medlsdm.federation.identity import public_hex
from medlsdm_node.home import NodeHome


def check(home: NodeHome, folder: Path | None) -> dict[str, Any]:
    """Verify every line of audit log and ledger, and the receipt of an exported folder if given.

    Raises:
        IntegrityError: Something was changed; the message says what.
    """
    from medlsdm.privacy.ledger import PrivacyLedger
    from medlsdm.sharing.receipt import verify_receipt

    records = home.audit.records()
    spent = PrivacyLedger(home.root / "ledger.jsonl").spent()
    epsilon = "infinite" if math.isinf(spent.epsilon) else round(spent.epsilon, 4)
    receipt = None
    if folder is not None:
        verified = verify_receipt(folder, bytes.fromhex(public_hex(home.identity)))
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
        "head": home.audit.head,
        "ledger": {"charges": spent.charges, "epsilon": epsilon, "statement": spent.statement},
        "receipt": receipt,
    }


def _summary(fields: dict[str, Any]) -> str:
    short = (f"{k}={str(v)[:24]}" for k, v in fields.items() if not isinstance(v, (dict, list)))
    return " ".join(short)
