"""The audit command: signatures, copies in other hands, and receipts that remember a head."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deid_tools.report import StudyEvidence
from medlsdm.chain import HashChain
from medlsdm.errors import DataError, IntegrityError
from medlsdm.federation.identity import public_hex
from medlsdm.privacy.ledger import PrivacyLedger
from medlsdm.sharing.receipt import ExportReceipt
from medlsdm_node import evidence
from medlsdm_node.auditing import check, check_ledger, check_log, signed_words


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
    alone = check_log(copy, found["key"])
    assert "cannot be excluded" in alone.pop("end")
    assert alone == {
        "records": 2, "head": found["head"], "signed_from": 0, "end_stated": 0, "end_file": None}  # fmt: skip
    (tmp_path / "audit.end").write_bytes((home.root / "audit.end").read_bytes())
    assert check_log(copy, found["key"])["end_stated"] == 2
    with pytest.raises(IntegrityError):
        check_log(copy, "11" * 32)
    for path, key in ((copy, "x"), (copy, ""), (tmp_path / "absent", found["key"])):
        with pytest.raises(DataError):
            check_log(path, key)


def test_the_end_beside_a_copy_of_another_name_is_used_and_its_absence_is_said(home, tmp_path):
    for number in range(3):
        home.audit.append("gate", passed=number)
    key, copy = public_hex(home.identity), tmp_path / "from-st-anna.jsonl"
    lines = (home.root / "audit.jsonl").read_bytes().splitlines(keepends=True)
    ask = [sys.executable, "-c", "from medlsdm_node.cli import main; main()", "audit", "--log", str(copy), "--key", key]
    copy.write_bytes(b"".join(lines[:2]))
    said = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert "NO statement of its end was found" in said
    assert "cannot be excluded" in said
    assert "stated for" not in said
    (tmp_path / "audit.end").write_bytes((home.root / "audit.end").read_bytes())
    with pytest.raises(IntegrityError, match="cut at its end: 2 of 4"):
        check_log(copy, key)
    copy.write_bytes(b"".join(lines))
    found = check_log(copy, key)
    assert (found["end_stated"], found["end_file"]) == (4, "audit.end")
    assert "its end is stated for 4 records" in subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    (tmp_path / "audit.end").rename(tmp_path / "from-st-anna.end")
    (tmp_path / "audit.end").write_text("of another log")
    assert check_log(copy, key)["end_file"] == "from-st-anna.end"


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


def charge(home, round: int) -> None:
    """Do what a round does before it trains."""
    ledger = PrivacyLedger(home.root / "ledger.jsonl")
    check_ledger(home, home.audit.records())
    head = ledger.charge("model", round, "none", "d" * 64)
    home.audit.append("round", round=round, ledger=head)


def cut(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def rewritten(content: bytes) -> bytes:
    """Return as many charges as there were, of a smaller epsilon, with right hashes: the ledger is not signed."""
    with TemporaryDirectory() as name:
        ledger = PrivacyLedger(Path(name) / "ledger.jsonl")
        for n in range(content.count(b"\n")):
            ledger.charge("model", n, "dp-sgd", "d" * 64, epsilon=0.1)
        return (Path(name) / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize("change", [cut, rewritten, lambda content: b"", None])
def test_a_ledger_that_was_put_back_stops_training_and_is_said(home, change):
    path = home.root / "ledger.jsonl"
    for n in range(3):
        charge(home, n)
    assert check(home, None)["ledger"]["epsilon"] == "infinite"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    for act in (lambda: check(home, None), lambda: charge(home, 3)):
        with pytest.raises(IntegrityError, match="lacks a charge"):
            act()


def test_a_charge_whose_round_was_killed_before_its_entry_is_no_fault(home):
    charge(home, 0)
    PrivacyLedger(home.root / "ledger.jsonl").charge("model", 1, "none", "d" * 64)
    assert check(home, None)["ledger"]["charges"] == 2


def test_a_log_that_is_gone_is_noticed_with_its_end_or_without(home):
    log, end = home.root / "audit.jsonl", home.root / "audit.end"
    log.unlink()
    with pytest.raises(IntegrityError, match="cut at its end: 0 of 1"):
        check(home, None)
    end.unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        check(home, None)
    log.write_bytes(b"")
    with pytest.raises(IntegrityError, match="is gone"):
        check(home, None)


def test_evidence_that_an_older_log_does_not_know_and_a_clock_that_went_back_are_said(home, vault, pair, monkeypatch):
    log, end = home.root / "audit.jsonl", home.root / "audit.end"
    before = log.read_bytes(), end.read_bytes()
    document = {"patient": "P", "study": "S", "series": [{"token": "P-0/S-0"}]}
    study = StudyEvidence("P", "S", document)
    vault.put_pair("P-0.S-0", *pair)
    assert check(home, None)["pairs_not_in_log"] == 1
    digests = evidence.keep(home, [study], evidence.Outcome({}, {}, "folder", "d"))
    home.audit.append("ingest", evidence=digests)
    found = check(home, None)
    assert (found["evidence_not_in_log"], found["pairs_not_in_log"], found["clock_went_back"]) == (0, 0, [])
    log.write_bytes(before[0])
    end.write_bytes(before[1])
    found = check(home, None)
    assert (found["evidence_not_in_log"], found["pairs_not_in_log"]) == (1, 1)

    class Back(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2020, 1, 1, tzinfo=tz)

    monkeypatch.setattr("medlsdm.chain.datetime", Back)
    home.audit.append("while the clock is wrong")
    monkeypatch.undo()
    home.audit.append("later")
    assert check(home, None)["clock_went_back"] == [1]


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
