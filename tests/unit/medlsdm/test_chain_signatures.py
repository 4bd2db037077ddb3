"""The signed chain: nobody without the key rewrites it, a third party needs the public key only, a cut tail shows."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medlsdm.chain import GENESIS, ChainState, HashChain
from medlsdm.errors import IntegrityError, ResourceError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
LINES = 5


@pytest.fixture
def chain(tmp_path: Path) -> HashChain:
    chain = HashChain(tmp_path / "audit.jsonl", KEY)
    for number in range(LINES):
        chain.append("event", number=number)
    return chain


def edit(chain: HashChain, change: Callable[[list[dict]], list[dict]]) -> None:
    """Change the log and make the hashes right again, as one would who knows how but has no key."""
    records = change([json.loads(line) for line in chain.path.read_text().splitlines()])
    previous = GENESIS
    for n, record in enumerate(records):
        record |= {"n": n, "previous": previous}
        plain = {k: v for k, v in record.items() if k not in ("hash", "signature")}
        text = json.dumps(plain, sort_keys=True, ensure_ascii=True)
        previous = record["hash"] = hashlib.sha256(text.encode()).hexdigest()
    chain.path.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in records))


def alone(chain: HashChain, folder: Path) -> HashChain:
    """Hand a copy of the log, without the statement of its end, to somebody who has the public key."""
    folder.mkdir()
    (folder / "copy.jsonl").write_bytes(chain.path.read_bytes())
    return HashChain(folder / "copy.jsonl", public=KEY.public_key())


def test_each_line_is_signed_and_the_public_key_suffices(chain, tmp_path):
    state = chain.verify()
    assert state == ChainState(LINES, chain.head, 0, LINES)
    assert HashChain(chain.path, public=KEY.public_key()).verify() == state
    copy = alone(chain, tmp_path / "copy")
    assert copy.verify(end_must_be_stated=False) == ChainState(LINES, chain.head, 0, 0)
    with pytest.raises(IntegrityError, match=r"copy\.end is missing"):
        copy.verify()


@pytest.mark.parametrize("line", range(LINES))
def test_a_line_that_was_rewritten_with_right_hashes_is_named(chain, tmp_path, line):
    def rewrite(records):
        records[line]["fields"] = {"number": 99}
        return records

    edit(chain, rewrite)
    with pytest.raises(IntegrityError):
        chain.records()
    with pytest.raises(IntegrityError):
        chain.append("more")
    with pytest.raises(IntegrityError, match=rf"Line {line + 1} of copy\.jsonl is not signed"):
        alone(chain, tmp_path / "copy").verify(end_must_be_stated=False)


@pytest.mark.parametrize("line", range(LINES))
def test_a_line_that_was_taken_out_with_right_hashes_is_noticed(chain, tmp_path, line):
    edit(chain, lambda records: records[:line] + records[line + 1 :])
    with pytest.raises(IntegrityError):
        chain.verify()
    copy = alone(chain, tmp_path / "copy")
    if line == LINES - 1:  # a tail that was cut cleanly shows only by the end that was stated
        assert copy.verify(end_must_be_stated=False).entries == LINES - 1
    else:
        with pytest.raises(IntegrityError, match=f"Line {line + 1} "):
            copy.verify(end_must_be_stated=False)


@pytest.mark.parametrize("left", range(LINES))
def test_a_tail_that_was_cut_is_noticed(chain, left):
    lines = chain.path.read_bytes().splitlines(keepends=True)
    chain.path.write_bytes(b"".join(lines[:left]))
    with pytest.raises(IntegrityError, match=f"{left} of {LINES} lines are there"):
        chain.records()
    with pytest.raises(IntegrityError):
        chain.append("more")
    chain.end.unlink()
    if left > 1:  # one line may be there without the statement: the power went between the two
        with pytest.raises(IntegrityError, match="may have been cut"):
            chain.verify()


def test_an_end_that_is_older_than_the_log_is_fine_and_one_that_is_changed_is_not(chain):
    before = chain.end.read_bytes()
    chain.append("more")
    chain.end.write_bytes(before)  # the power went before the end was stated
    assert chain.verify() == ChainState(LINES + 1, chain.head, 0, LINES)
    said = json.loads(before)
    for change in ({"entries": 1}, {"head": "0" * 64}, {"signed_from": 3}, {"signature": "00" * 64}):
        chain.end.write_text(json.dumps(said | change))
        with pytest.raises(IntegrityError, match=r"audit\.end was changed"):
            chain.records()
    chain.end.write_text("[]")
    with pytest.raises(IntegrityError, match=r"audit\.end was changed"):
        chain.records()


FULL = """
import resource, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from medlsdm.chain import HashChain
from medlsdm.errors import ResourceError

chain = HashChain(Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
before = chain.path.read_bytes()
for room in (0, 1, 100, 300):
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, resource.RLIM_INFINITY))  # as a disk that fills up
    try:
        chain.append("more", note="x" * 300)
        print("it was written")
    except ResourceError as error:
        print(error.message)
    print(chain.path.read_bytes() == before)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
chain.append("more")
print(chain.verify().entries)
"""


def test_a_disk_that_fills_up_leaves_no_half_line_and_the_log_goes_on(chain):
    done = subprocess.run([sys.executable, "-c", FULL, str(chain.path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split("\n")[:-1] == [
        *(["audit.jsonl could not be written (File too large).", "True"] * 4),
        str(LINES + 1),
    ]


@pytest.mark.parametrize("left", [1, 40, -1])
def test_half_a_line_that_a_loss_of_power_left_is_not_there_and_the_log_goes_on(chain, left):
    before, stated = chain.path.read_bytes(), chain.end.read_bytes()
    chain.append("lost")
    chain.path.write_bytes(before + chain.path.read_bytes()[len(before) :][:left])
    with pytest.raises(IntegrityError, match="cut"):  # the end says that the line was there
        chain.records()
    chain.end.write_bytes(stated)
    assert "lost" not in [record["event"] for record in chain.records()]
    chain.append("after")
    assert chain.path.read_bytes().startswith(before)
    assert chain.records()[-1]["event"] == "after"
    chain.verify()


def test_a_record_whose_end_cannot_be_stated_is_not_there(chain, monkeypatch):
    before = chain.path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise ResourceError("audit.end could not be written (No space left on device).")

    with monkeypatch.context() as patched:
        patched.setattr("medlsdm.chain.write_atomic", full)
        with pytest.raises(ResourceError):
            chain.append("more")
    assert chain.path.read_bytes() == before
    chain.append("more")
    assert chain.verify().entries == LINES + 1


def test_a_log_of_an_earlier_version_is_unsigned_until_the_first_new_line(tmp_path):
    old = HashChain(tmp_path / "audit.jsonl")
    for number in range(3):
        old.append("event", number=number)
    chain = HashChain(old.path, KEY)
    assert chain.verify() == ChainState(3, chain.head, None, 0)
    chain.append("event")
    chain.append("event")
    assert chain.verify() == ChainState(5, chain.head, 3, 5)
    edit(chain, lambda records: [r | {"fields": {}} if r["n"] == 1 else r for r in records])
    with pytest.raises(IntegrityError):  # the first signature covers what came before it
        chain.verify()


def test_signatures_that_were_stripped_are_noticed(chain, tmp_path):
    def strip(records):
        return [{k: v for k, v in r.items() if k != "signature" or r["n"] < 3} for r in records]

    edit(chain, strip)
    with pytest.raises(IntegrityError, match=r"Line 4 of .* has lost its signature"):
        chain.records()
    edit(chain, lambda records: [{k: v for k, v in r.items() if k != "signature"} for r in records])
    with pytest.raises(IntegrityError, match="rewritten"):
        chain.records()
    assert alone(chain, tmp_path / "copy").verify(end_must_be_stated=False).signed_from is None


def test_another_key_is_another_site(chain, tmp_path):
    with pytest.raises(IntegrityError, match="this site's key"):
        HashChain(chain.path, OTHER).append("more")
    forged = HashChain(tmp_path / "forged.jsonl", OTHER)
    forged.append("event")
    with pytest.raises(IntegrityError, match=r"Line 1 of .* is not signed"):
        HashChain(forged.path, public=KEY.public_key()).verify(end_must_be_stated=False)


def test_any_changed_byte_is_found(chain):
    whole = chain.path.read_bytes()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 0x20  # the case of a letter, among others
        chain.path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            chain.verify()
