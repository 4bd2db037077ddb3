"""The audit command: signatures, copies in other hands, and receipts that remember a head."""

from __future__ import annotations

import json

import pytest

from medlsdm.chain import HashChain
from medlsdm.errors import DataError, IntegrityError
from medlsdm.federation.identity import public_hex
from medlsdm.sharing.receipt import ExportReceipt
from medlsdm_node.auditing import check, check_log, signed_words


def receipt(home, head: str, folder) -> None:
    folder.mkdir()
    facts = {
        "id": "x",
        "time": "t",
        "site": "site-a",
        "files": {},
        "card_digest": "c",
        "checkpoint_digests": (),
        "gate": {},
    }
    signed = ExportReceipt(**facts, audit_head=head).sign(home.identity)
    (folder / "receipt.json").write_bytes(signed.to_bytes())


def test_a_node_signs_from_its_first_record(home, tmp_path):
    home.audit.append("gate", passed=1)
    found = check(home, None)
    assert (found["signed_from"], len(found["records"])) == (0, 2)
    assert found["key"] == public_hex(home.identity)
    copy = tmp_path / "audit.jsonl"
    copy.write_bytes((home.root / "audit.jsonl").read_bytes())
    assert check_log(copy, found["key"]) == {
        "records": 2, "head": found["head"], "signed_from": 0, "end_stated": 0}  # fmt: skip
    (tmp_path / "audit.end").write_bytes((home.root / "audit.end").read_bytes())
    assert check_log(copy, found["key"])["end_stated"] == 2
    with pytest.raises(IntegrityError):
        check_log(copy, "11" * 32)
    for path, key in ((copy, "x"), (copy, ""), (tmp_path / "absent", found["key"])):
        with pytest.raises(DataError):
            check_log(path, key)


def test_a_log_that_does_not_hold_a_receipts_entry_was_cut(home, tmp_path):
    log, end = home.root / "audit.jsonl", home.root / "audit.end"
    before = log.read_bytes(), end.read_bytes()
    receipt(home, home.audit.append("gate", passed=1), tmp_path / "export")
    assert check(home, tmp_path / "export")["receipt"]["id"] == "x"
    log.write_bytes(before[0])  # both files as they were: nothing of the machine alone would show it
    end.write_bytes(before[1])
    assert check(home, None)["signed_from"] == 0
    with pytest.raises(IntegrityError, match="cut or rewritten"):
        check(home, tmp_path / "export")


def test_an_old_log_goes_on_and_says_since_when_it_is_signed(home):
    log, end = home.root / "audit.jsonl", home.root / "audit.end"
    log.unlink()
    end.unlink()
    HashChain(log).append("created")
    assert "NO record is signed" in signed_words(check(home, None)["signed_from"])
    home.audit.append("joined")
    assert signed_words(check(home, None)["signed_from"]) == "unsigned until record 1, signed from it on"
    assert signed_words(0) == "every record is signed"
    assert "signature" not in json.loads(log.read_text().splitlines()[0])
