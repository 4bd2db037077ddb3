"""The door for a PACS, with pynetdicom as the sender on loopback."""

from __future__ import annotations

import copy
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pynetdicom import AE, build_context

from medlsdm.errors import BusyError, ConfigError, DataError, PolicyError, ResourceError
from medlsdm_node import quarantine
from medlsdm_node.home import NodeHome
from medlsdm_node.intake import Intake, expire
from medlsdm_node.receive import OUT_OF_RESOURCES, SUCCESS, Receiver
from medlsdm_node.receive_settings import ReceiveSettings, load_receive
from medlsdm_node.spool import Spool
from medlsdm_node.vault import PAIR, Vault

from .conftest import changed

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pydicom"),
    pytest.mark.filterwarnings(
        "ignore:unclosed <socket:ResourceWarning"
    ),  # pynetdicom's sender leaves it to the collector
]
RULES = {"calling": ["PACS"], "addresses": ["127.0.0.0/8"], "port": 0, "min_free_bytes": 0, "quiet_seconds": 0.01}


@contextmanager
def listening(home: NodeHome, **rules: object) -> Iterator[Receiver]:
    receiver = Receiver(Spool(home), ReceiveSettings.model_validate(RULES | rules))
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def push(receiver: Receiver, datasets: list, calling: str = "PACS", called: str = "MEDLSDM") -> list[int] | None:
    """Send over one association; return the status of each, or None if the association is refused."""
    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 120
    for pair in sorted({(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in datasets}):
        ae.add_requested_context(*pair)
    association = ae.associate("127.0.0.1", receiver.port, ae_title=called)
    if not association.is_established:
        return None
    statuses = [association.send_c_store(ds).get("Status", -1) for ds in datasets]
    association.release()
    return statuses


def intake(home: NodeHome, receiver: Receiver) -> Intake:
    return Intake(home, receiver.spool, (receiver,), receiver.settings, lambda _: None)


def settle(receiver: Receiver) -> None:
    """Wait until no association is open."""
    end = time.monotonic() + 120
    while receiver.server.active_associations:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_study_that_is_pushed_ends_in_the_vault_and_equal_copies_change_nothing(home, study):
    with listening(home) as receiver:
        assert push(receiver, study) == [SUCCESS] * 9
        settle(receiver)
        (name,) = receiver.spool.studies()
        assert len(receiver.spool.files(name)) == 9
        assert push(receiver, study[:3]) == [SUCCESS] * 3
        settle(receiver)
        assert len(receiver.spool.files(name)) == 9
        intake(home, receiver).tick()
        assert len(Vault(home).names(PAIR)) == 1
        assert push(receiver, study) == [SUCCESS] * 9
        settle(receiver)
        assert receiver.spool.waiting(name) is None
        assert receiver.counts() == {"PACS": {"equal": 9}}
        assert quarantine.items(home) == []
    events = [(r["event"], r["fields"]) for r in home.audit.records()]
    assert ("received", {"counts": {"PACS": {"stored": 9, "equal": 3}}}) in events
    assert [f["origin"] for e, f in events if e == "ingest"] == ["received"]


def test_nothing_of_the_patient_lies_in_clear_or_in_a_name(home, study):
    words = {str(ds.get(k)) for ds in study for k in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID")}
    with listening(home) as receiver:
        push(receiver, study)
        settle(receiver)
        for path in home.root.rglob("*"):
            assert not any(w in str(path) for w in words)
            if path.is_file():
                content = path.read_bytes()
                assert not any(w.encode() in content for w in words), path
                if path.is_relative_to(receiver.spool.root):
                    assert path.stat().st_mode & 0o077 == 0 or path.name == "lock"
        assert receiver.spool.root.stat().st_mode & 0o777 == 0o700
        intake(home, receiver).tick()
    assert not list(home.run.glob("study-*"))
    assert not any(w in (home.root / "audit.jsonl").read_text() for w in words)


def test_only_who_is_named_may_send(home, study):
    with listening(home) as receiver:
        assert push(receiver, study[:1], calling="OTHER") is None
        assert push(receiver, study[:1], called="OTHER") is None
        assert push(receiver, study[:1]) == [SUCCESS]
        assert receiver.counts() == {
            "PACS": {"association rejected": 1, "stored": 1},
            "unknown": {"association rejected": 1},
        }
    with listening(home, addresses=["10.0.0.0/8"]) as receiver:
        assert push(receiver, study[:1]) is None
        assert receiver.counts() == {"unknown": {"connection refused": 1}}


def test_an_address_mapped_into_ipv6_is_the_same_address():
    settings = ReceiveSettings.model_validate(RULES | {"addresses": ["10.1.4.0/24", "fe80::/64"]})
    assert settings.allows("::ffff:10.1.4.7")
    assert settings.allows("fe80::1%eth0")
    assert not settings.allows("10.1.5.7")
    assert not settings.allows("::ffff:10.1.5.7")


def test_a_differing_instance_of_a_study_whose_originals_are_gone_never_stands_in_for_the_whole(home, study):
    with listening(home) as receiver:
        push(receiver, [*study, changed(study[2])])
        settle(receiver)
        intake(home, receiver).tick()
        (name,) = receiver.spool.studies()
        assert expire(receiver.spool, name, 0.0)
        pair = {p: p.read_bytes() for p in (home.vault / "pair").iterdir()}
        (item,) = quarantine.items(home)
        with pytest.raises(PolicyError, match="cannot be released"):
            quarantine.release(home, item.id)
        assert receiver.spool.files(name) == []
        assert {p: p.read_bytes() for p in (home.vault / "pair").iterdir()} == pair


def test_whoever_listens_to_the_library_hears_nothing_of_a_patient(home, study, caplog):
    for name in ("pynetdicom", *(n for n in logging.Logger.manager.loggerDict if n.startswith("pynetdicom."))):
        logging.getLogger(name).disabled = False
        logging.getLogger(name).setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG), listening(home) as receiver:
        assert push(receiver, study[:2]) == [SUCCESS] * 2
        settle(receiver)
    assert [record.name for record in caplog.records if record.name.startswith("pynetdicom")] == []


def test_a_pdu_without_an_end_is_not_gathered(home):
    with listening(home) as receiver, socket.create_connection(("127.0.0.1", receiver.port)) as rude:
        sent = 0
        with suppress(OSError):
            rude.sendall(b"\x01\x00\xff\xff\xff\xff")
            while sent < 64 << 20:
                rude.sendall(bytes(1 << 16))
                sent += 1 << 16
        assert sent < 32 << 20, "it took whatever came"


def test_echo(home):
    ae = AE(ae_title="PACS")
    ae.requested_contexts = [build_context("1.2.840.10008.1.1")]
    with listening(home) as receiver:
        association = ae.associate("127.0.0.1", receiver.port, ae_title="MEDLSDM")
        assert association.send_c_echo().Status == SUCCESS
        association.release()


def test_a_differing_instance_is_held_and_release_puts_it_in_place(home, study):
    with listening(home) as receiver:
        push(receiver, study)
        assert push(receiver, [changed(study[2])] * 2) == [SUCCESS] * 2
        settle(receiver)
        assert receiver.counts() == {"PACS": {"differing": 1, "equal": 1, "stored": 9}}
        (item,) = quarantine.items(home)
        assert item.reason == quarantine.REASONS["differing"]
        before = {p.name for p in receiver.spool.files(item.record)}
        found = quarantine.release(home, item.id)
        assert found == {"item": item.id, "pairs": 1, "held": {}}
        (other,) = quarantine.items(home)
        assert other.id != item.id
        after = {p.name for p in receiver.spool.files(item.record)}
        assert before - after == {other.paths[0].name}
        assert after - before == {item.paths[0].name}
        assert quarantine.purge(home, other.id) == {"item": other.id, "deleted": 1}
        assert quarantine.items(home) == []
    events = [r for r in home.audit.records() if r["event"].startswith("quarantine")]
    assert [(r["event"], bool(r["fields"]["who"])) for r in events] == [
        ("quarantine-release", True),
        ("quarantine-purge", True),
    ]


def test_labels_that_come_late_complete_a_series_that_is_held(home, study):
    images, labels = [ds for ds in study if ds.Modality == "MR"], [ds for ds in study if ds.Modality == "SEG"]
    with listening(home) as receiver:
        push(receiver, images)
        settle(receiver)
        intake(home, receiver).tick()
        (item,) = quarantine.items(home)
        assert item.reason == "the series has no label map"
        assert len(item.paths) == 8
        push(receiver, labels)
        settle(receiver)
        intake(home, receiver).tick()
        assert quarantine.items(home) == []
        assert len(Vault(home).names(PAIR)) == 1


def test_a_part_of_a_study_whose_originals_are_gone_is_never_taken_in_alone(home, study):
    late = copy.deepcopy(study[7])
    late.SOPInstanceUID = late.file_meta.MediaStorageSOPInstanceUID = "1.2.3.9"
    late.ImagePositionPatient = [
        2 * float(b) - float(a) for a, b in zip(*(ds.ImagePositionPatient for ds in study[6:8]), strict=True)
    ]
    with listening(home) as receiver:
        push(receiver, study)
        settle(receiver)
        intake(home, receiver).tick()
        (name,) = receiver.spool.studies()
        assert len(Vault(home).names(PAIR)) == 1
        assert not expire(receiver.spool, name, 1.0)
        assert expire(receiver.spool, name, 0.0)
        assert receiver.spool.studies() == []
        pair = {p: p.read_bytes() for p in (home.vault / "pair").iterdir()}
        assert push(receiver, [study[0], late]) == [SUCCESS] * 2
        settle(receiver)
        intake(home, receiver).tick()
        (item,) = quarantine.items(home)
        assert (item.reason, len(item.paths)) == (quarantine.REASONS["late"], 1)
        with pytest.raises(PolicyError):
            quarantine.release(home, item.id)
        assert {p: p.read_bytes() for p in (home.vault / "pair").iterdir()} == pair
        quarantine.purge(home, item.id)
        push(receiver, [*study, late])
        settle(receiver)
        intake(home, receiver).tick()
        assert quarantine.items(home) == []
        ((scan, _),) = Vault(home).pairs()
        assert scan.array.shape[2] == 9


def test_what_the_pipeline_holds_is_listed_shown_and_purged(home, study):
    report = copy.deepcopy(study[0])
    report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    with listening(home) as receiver:
        push(receiver, [*study, report])
        settle(receiver)
        intake(home, receiver).tick()
        (item,) = quarantine.items(home)
        assert "secondary captures" in item.reason
        shown = quarantine.show(home, item.id)
        assert shown["files"] == len(shown["paths"]) == 1
        assert "uids" not in shown
        assert quarantine.show(home, item.id, identify=True)["uids"][0]["SOPInstanceUID"] == "1.2.3.4"
        assert quarantine.release(home, item.id)["held"] == {item.reason: 1}
        quarantine.purge(home, item.id)
        assert quarantine.items(home) == []
        with pytest.raises(DataError):
            quarantine.find(home, item.id)
    assert [r["event"] for r in home.audit.records() if r["event"] == "quarantine-identified"]


def test_a_low_disk_and_a_spent_quota_are_answered_and_nothing_is_kept(home, study):
    with listening(home, min_free_bytes=1 << 60) as receiver:
        assert push(receiver, study[:2]) == [OUT_OF_RESOURCES] * 2
        assert receiver.counts() == {"PACS": {"refused: the disk is low": 2}}
    with listening(home) as receiver:
        push(receiver, study[:1])
        size = receiver.spool.files(receiver.spool.studies()[0])[0].stat().st_size
    with listening(home, max_association_bytes=size * 3 // 2) as receiver:
        assert push(receiver, study[1:4]) == [SUCCESS] + [OUT_OF_RESOURCES] * 2
    with listening(home, max_instance_bytes=size // 2) as receiver:
        assert push(receiver, study[4:5]) == [OUT_OF_RESOURCES]
        settle(receiver)
        assert list(receiver.spool.incoming.iterdir()) == []
        assert len(receiver.spool.files(receiver.spool.studies()[0])) == 2


def test_a_transfer_that_breaks_off_leaves_nothing(home, study):
    with listening(home) as receiver:
        ae = AE(ae_title="PACS")
        ae.requested_contexts = [build_context(study[0].SOPClassUID, study[0].file_meta.TransferSyntaxUID)]
        association = ae.associate("127.0.0.1", receiver.port, ae_title="MEDLSDM")
        association.send_c_store(study[0])
        door, raw = association.dul.socket, association.dul.socket.socket
        whole, sent = door.send, []

        def torn(content: bytes) -> None:
            sent.append(len(content))
            if len(sent) == 1:  # the command
                whole(content)
                return
            raw.sendall(content[: len(content) // 2])
            raw.shutdown(socket.SHUT_RDWR)

        door.send = torn
        assert "Status" not in association.send_c_store(study[1])
        settle(receiver)
        assert len(sent) > 1
        assert list(receiver.spool.incoming.iterdir()) == []
        assert len(receiver.spool.files(receiver.spool.studies()[0])) == 1


def test_too_many_associations_are_refused(home, study):
    with listening(home, max_associations=1) as receiver:
        ae = AE(ae_title="PACS")
        ae.requested_contexts = [build_context("1.2.840.10008.1.1")]
        first = ae.associate("127.0.0.1", receiver.port, ae_title="MEDLSDM")
        assert first.is_established
        assert push(receiver, study[:1]) is None
        first.release()
        settle(receiver)
        assert push(receiver, study[:1]) == [SUCCESS]


@pytest.mark.parametrize(
    "said",
    [
        b"\x01\x00\xff\xff\xff\xff" + bytes(1000),  # an association request of 4 GiB
        b"\x04\x00\xff\xff\xff\xff" + bytes(1000),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00" + struct.pack(">I", 100) + b"\xff" * 100,
        b"",
    ],
)
def test_what_is_not_dicom_ends_quickly_and_the_door_stays_open(home, study, said, capfd):
    with listening(home) as receiver:
        with socket.create_connection(("127.0.0.1", receiver.port)) as rude:
            rude.sendall(said)
            rude.shutdown(socket.SHUT_WR)
            rude.settimeout(120)
            with suppress(ConnectionError):
                while rude.recv(4096):
                    pass
        assert push(receiver, study[:1]) == [SUCCESS]
    assert capfd.readouterr().err == ""


def test_one_who_connects_and_says_nothing_stops_nobody(home, study):
    with listening(home) as receiver, socket.create_connection(("127.0.0.1", receiver.port)):
        assert push(receiver, study[:1]) == [SUCCESS]


def test_a_start_deletes_what_was_half_written(home, study):
    spool = Spool(home)
    arrival = spool.begin()
    arrival.write(b"half")
    arrival.writer._stream.close()
    assert spool.recover() == 1
    assert list(spool.incoming.iterdir()) == []


def test_a_study_that_stops_the_node_again_and_again_is_held(home, study):
    with listening(home) as receiver:
        push(receiver, study)
        settle(receiver)
        (name,) = receiver.spool.studies()
        record = receiver.spool.record(name)
        record.attempts = 3
        receiver.spool.put_record(name, record)
        intake(home, receiver).tick()
        (item,) = quarantine.items(home)
        assert "stopped 3 times" in item.reason
        assert quarantine.release(home, item.id)["pairs"] == 1
        assert quarantine.items(home) == []


def test_a_damaged_file_in_the_spool_is_held_with_its_study(home, study):
    with listening(home) as receiver:
        push(receiver, study)
        settle(receiver)
        (name,) = receiver.spool.studies()
        path = receiver.spool.files(name)[0]
        path.write_bytes(path.read_bytes()[:-3])
        time.sleep(0.05)  # what was written just now is not quiet yet
        intake(home, receiver).tick()
        (item,) = quarantine.items(home)
        assert "changed or damaged" in item.reason
        assert len(item.paths) == 9


def test_a_disk_that_refuses_everything_closes_no_door_and_loses_no_count(home, study, monkeypatch):
    said: list[str] = []
    with listening(home) as receiver:
        assert push(receiver, study) == [SUCCESS] * 9
        settle(receiver)
        watch = Intake(home, receiver.spool, (receiver,), receiver.settings, said.append)

        def full(*_: object, **__: object) -> None:
            raise ResourceError("x could not be written (No space left on device).")

        with monkeypatch.context() as patched:
            for module in ("medlsdm.chain", "medlsdm_node.vault"):
                patched.setattr(f"{module}.write_atomic", full)
            patched.setattr("medlsdm_node.intake.TICK_SECONDS", 0.01)
            thread = threading.Thread(target=watch.run)
            thread.start()
            time.sleep(0.5)
            assert thread.is_alive()
            watch.stopping = True
            thread.join()
        assert len([line for line in said if "No space left" in line]) == 1
        assert "received" not in {r["event"] for r in home.audit.records()}
        watch.later.clear()
        watch.tick()
        assert len(Vault(home).names(PAIR)) == 1
    counts = [r["fields"]["counts"] for r in home.audit.records() if r["event"] == "received"]
    assert counts == [{"PACS": {"stored": 9}}]


def test_while_somebody_ingests_the_study_waits(home, study):
    with listening(home) as receiver:
        push(receiver, study)
        settle(receiver)
        watch = intake(home, receiver)
        with home.locked("ingest"):
            for _ in range(5):
                watch.tick()
                watch.later.clear()
        assert quarantine.items(home) == []
        watch.later.clear()
        watch.tick()
        assert len(Vault(home).names(PAIR)) == 1


def test_many_senders_at_once(home, study):
    with listening(home) as receiver:
        found: list = []
        threads = [threading.Thread(target=lambda: found.append(push(receiver, study))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [[SUCCESS] * 9] * 4
        assert receiver.counts() == {"PACS": {"equal": 27, "stored": 9}}
        assert list(receiver.spool.incoming.iterdir()) == []


def test_the_port_is_taken(home):
    with listening(home) as receiver, pytest.raises(BusyError):
        Receiver(receiver.spool, receiver.settings.model_copy(update={"port": receiver.port})).start()


def test_settings_that_allow_nobody_or_do_not_read(home, tmp_path: Path):
    file = home.root / "receive.yaml"
    with pytest.raises(ConfigError, match="allows nobody"):
        load_receive(home)
    text = file.read_text()
    file.write_text(text.replace("calling: []", "calling: [PACS]").replace("addresses: []", "addresses: [127.0.0.1]"))
    assert load_receive(home).calling == ("PACS",)
    assert load_receive(home) == ReceiveSettings(calling=("PACS",), addresses=("127.0.0.1/32",))  # type: ignore[arg-type]
    for wrong in ("port: x", "colour: red", "addresses: [nowhere]", "calling: ["):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_receive(home)
