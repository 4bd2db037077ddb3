"""The DICOMweb door, with dicomweb-client, httpx and bare sockets as senders on loopback."""

from __future__ import annotations

import json
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from dicomweb_client.session_utils import create_session_from_auth

from medlsdm.errors import BusyError, ConfigError, IntegrityError
from medlsdm_node import quarantine
from medlsdm_node.home import NodeHome
from medlsdm_node.intake import Intake
from medlsdm_node.receive_settings import ReceiveSettings, WebSettings, load_receive
from medlsdm_node.spool import KIND, Spool
from medlsdm_node.stow import WebDoor
from medlsdm_node.vault import PAIR, Vault
from medlsdm_node.web_server import MIN_BYTES_PER_SECOND, Pace
from tests.certificates import self_signed

from .conftest import changed, content

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
TOKEN = "0123456789abcdef0123"
ASKS = {"authorization": f"Bearer {TOKEN}", "content-type": 'multipart/related; type="application/dicom"; boundary=b'}
CONFLICT, LOW, CANNOT, SYNTAX, FAILURE = 409, 0xA700, 0xC000, 0xC122, 0x0110


class Bearer(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["authorization"] = ASKS["authorization"]
        return request


@pytest.fixture
def rules(tmp_path: Path) -> dict:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN + "\n")
    return {"addresses": ["127.0.0.0/8"], "port": 0, "token_file": str(token)}


@contextmanager
def listening(home: NodeHome, web: dict, **rules: object) -> Iterator[WebDoor]:
    settings = ReceiveSettings.model_validate({"min_free_bytes": 0, "quiet_seconds": 0.01, "web": web} | rules)
    assert settings.web is not None
    door = WebDoor(Spool(home), settings, settings.web)
    door.start()
    try:
        yield door
    finally:
        door.stop()


def address(door: WebDoor) -> str:
    assert door.server is not None
    return f"http://127.0.0.1:{door.server.port}"


def body(*parts: bytes, kind: bytes = b"application/dicom") -> bytes:
    return b"".join(b"--b\r\nContent-Type: " + kind + b"\r\n\r\n" + p + b"\r\n" for p in parts) + b"--b--\r\n"


def post(door: WebDoor, said: bytes | Iterator[bytes], path: str = "/studies", **headers: str) -> httpx.Response:
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(address(door) + path, content=said, headers=ASKS | changed, timeout=60, trust_env=False)


def items(answer: httpx.Response, tag: str) -> list[tuple[str, int | None]]:
    """Return SOP Instance UID and failure reason of each item of a sequence of the answer."""
    found = answer.json().get(tag, {}).get("Value", [])
    return [(i["00081155"].get("Value", [""])[0], i.get("00081197", {}).get("Value", [None])[0]) for i in found]


def stored(answer: httpx.Response) -> list[str]:
    return [uid for uid, _ in items(answer, "00081199")]


def failed(answer: httpx.Response) -> list[tuple[str, int | None]]:
    return items(answer, "00081198")


def test_what_dicomweb_client_stores_ends_in_the_vault_and_equal_copies_change_nothing(home, study, rules):
    with listening(home, rules) as door:
        client = DICOMwebClient(address(door), session=create_session_from_auth(Bearer()), chunk_size=3000)
        for _ in range(2):
            answer = client.store_instances(study)
            assert [i.ReferencedSOPInstanceUID for i in answer.ReferencedSOPSequence] == [
                ds.SOPInstanceUID for ds in study
            ]
            assert "FailedSOPSequence" not in answer
        (name,) = door.spool.studies()
        assert len(door.spool.files(name)) == 9
        assert not door.busy_with(name)
        Intake(home, door.spool, (door,), door.settings, lambda _: None).tick()
        assert len(Vault(home).names(PAIR)) == 1
        assert quarantine.items(home) == []
    assert [r["fields"]["counts"] for r in home.audit.records() if r["event"] == "received"] == [
        {"DICOMweb": {"equal": 9, "stored": 9}}
    ]


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # pynetdicom's sender leaves it
def test_an_instance_is_the_same_over_the_web_as_over_c_store(home, study, rules):
    """Over C-STORE the file meta is pynetdicom's and not the sender's: the data set is what counts."""
    from pynetdicom import AE

    from medlsdm_node.receive import Receiver

    with listening(home, rules, calling=["PACS"], addresses=["127.0.0.1"], port=0) as door:
        assert stored(post(door, body(content(study[0])))) == [study[0].SOPInstanceUID]
        receiver = Receiver(door.spool, door.settings)
        receiver.start()
        try:
            ae = AE(ae_title="PACS")
            ae.add_requested_context(study[0].SOPClassUID, study[0].file_meta.TransferSyntaxUID)
            association = ae.associate("127.0.0.1", receiver.port, ae_title="MEDLSDM")
            assert association.send_c_store(study[0]).Status == 0
            association.release()
            assert receiver.counts() == {"PACS": {"equal": 1}}
        finally:
            receiver.stop()


def test_nothing_of_the_patient_lies_in_clear_or_in_a_name(home, study, rules):
    words = {str(ds.get(k)) for ds in study for k in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID")}
    with listening(home, rules) as door:
        post(door, body(*map(content, study)))
        for path in home.root.rglob("*"):
            assert not any(w in str(path) for w in words)
            if path.is_file():
                assert not any(w.encode() in path.read_bytes() for w in words), path


def test_a_differing_instance_is_taken_and_held(home, study, rules):
    with listening(home, rules) as door:
        assert post(door, body(content(study[0]))).status_code == 200
        answer = post(door, body(content(changed(study[0]))))
        assert (answer.status_code, stored(answer)) == (200, [study[0].SOPInstanceUID])
        assert door.counts() == {"DICOMweb": {"differing": 1, "stored": 1}}
        (item,) = quarantine.items(home)
        assert item.reason == quarantine.REASONS["differing"]


def test_who_shows_no_token_or_comes_from_elsewhere_is_refused(home, study, rules):
    said = body(content(study[0]))
    with listening(home, rules) as door:
        for wrong in ("Bearer " + TOKEN[:-1], "Bearer", "Basic " + TOKEN, "", "Bearer " + TOKEN + "x"):
            answer = post(door, said, authorization=wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.get(address(door) + "/other", trust_env=False).status_code == 401
        assert door.counts() == {"unknown": {"request refused (401)": 6}}
        assert door.spool.studies() == []
    with listening(home, rules | {"addresses": ["10.0.0.0/8"]}) as door:
        with pytest.raises(httpx.TransportError):
            post(door, said)
        assert door.counts() == {"unknown": {"connection refused": 1}}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"path": "/"}, 404),
        ({"path": "/studies/x"}, 404),
        ({"path": "/studies/../../etc"}, 404),
        ({"path": "/studies/1.2/series"}, 404),
        ({"content_type": "application/dicom"}, 415),
        ({"content_type": "multipart/related; type=application/dicom"}, 415),
        ({"content_type": 'multipart/related; type="application/dicom+json"; boundary=b'}, 415),
        ({"content_encoding": "gzip"}, 415),
        ({"accept": "application/dicom+xml"}, 406),
        ({"content_length": str(1 << 50)}, 413),
        ({"content_length": "-5"}, 400),
        ({"transfer_encoding": "gzip"}, 501),
        ({"x": "y" * 200_000}, 431),
    ],
)
def test_a_request_for_something_else_is_refused_at_its_head(home, rules, change, status):
    with listening(home, rules) as door:
        headers = ASKS | {k.replace("_", "-"): v for k, v in change.items() if k != "path"}
        head = f"POST {change.get('path', '/studies')} HTTP/1.1\r\nhost: h\r\n"
        said = head + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        assert speak(door, said.encode()).startswith(f"HTTP/1.1 {status} ".encode())
        who = "unknown" if status in (400, 431, 501) else "DICOMweb"  # of those we never came to know who it is
        assert door.counts() == {who: {f"request refused ({status})": 1}}


def test_patience_grows_with_what_came_and_ends():
    pace = Pace(10.0)
    pace.note(9.0, 0)
    assert pace.patience() == pytest.approx(1.0)
    pace.note(0.0, 5 * MIN_BYTES_PER_SECOND)
    assert pace.patience() == pytest.approx(6.0)
    pace.note(6.0, 0)
    with pytest.raises(TimeoutError):
        pace.patience()


def test_a_request_of_two_lengths_is_refused(home, study, rules):
    with listening(home, rules) as door:
        said = body(content(study[0]))
        lines = "".join(f"{name}: {value}\r\n" for name, value in ASKS.items())
        head = f"POST /studies HTTP/1.1\r\nhost: h\r\n{lines}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
        whole = head.encode() + b"%x\r\n" % len(said) + said + b"\r\n0\r\n\r\n"
        assert speak(door, whole).startswith(b"HTTP/1.1 400 ")
        assert door.spool.studies() == []


def test_only_post_is_answered(home, rules):
    with listening(home, rules) as door:
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            answer = httpx.request(method, address(door) + "/studies", headers=ASKS, trust_env=False)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def speak(door: WebDoor, said: bytes, *, end: bool = True) -> bytes:
    """Say something on a bare connection and return what is answered."""
    assert door.server is not None
    with socket.create_connection(("127.0.0.1", door.server.port), timeout=60) as rude:
        with suppress(ConnectionError):
            rude.sendall(said)
            if end:
                rude.shutdown(socket.SHUT_WR)
        heard = bytearray()
        with suppress(ConnectionError):
            while piece := rude.recv(4096):
                heard += piece
        return bytes(heard)


def test_each_instance_is_answered_for_itself(home, study, rules):
    syntax = content(study[1]).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
    with listening(home, rules) as door:
        wrong = [b"", b"no dicom" * 100, content(study[2])[:200], syntax, other_bytes(study[3])]
        answer = post(door, body(content(study[0]), *wrong))
        assert answer.status_code == 202
        assert answer.headers["content-type"] == "application/dicom+json"
        assert stored(answer) == [study[0].SOPInstanceUID]
        reasons = [reason for _, reason in failed(answer)]
        assert reasons == [CANNOT, CANNOT, CANNOT, SYNTAX, CANNOT]
        answer = post(door, body(content(study[0]), kind=b"application/dicom+json"))
        assert (answer.status_code, failed(answer)) == (CONFLICT, [(study[0].SOPInstanceUID, CANNOT)])
        assert list(door.spool.incoming.iterdir()) == []
        assert len(door.spool.files(door.spool.studies()[0])) == 1


def other_bytes(ds: pydicom.Dataset) -> bytes:
    """Return a file whose meta names another instance than its data set, at the same length."""
    uid = str(ds.SOPInstanceUID).encode()
    written = content(ds)
    return written.replace(uid, uid[:-1] + (b"1" if uid[-1:] != b"1" else b"2"), 1)


def test_an_instance_of_another_study_than_the_one_named_is_refused(home, study, rules):
    with listening(home, rules) as door:
        answer = post(door, body(content(study[0])), path="/studies/1.2.3")
        assert (answer.status_code, failed(answer)) == (CONFLICT, [(study[0].SOPInstanceUID, FAILURE)])
        answer = post(door, body(content(study[0])), path=f"/studies/{study[0].StudyInstanceUID}")
        assert (answer.status_code, stored(answer)) == (200, [study[0].SOPInstanceUID])


def test_a_low_disk_and_limits_are_answered_and_nothing_is_kept(home, study, rules):
    said = content(study[0])
    with listening(home, rules, min_free_bytes=1 << 60) as door:
        answer = post(door, body(said))
        assert (answer.status_code, failed(answer)) == (CONFLICT, [(study[0].SOPInstanceUID, LOW)])
        assert door.counts() == {"DICOMweb": {"refused: the disk is low": 1}}
    with listening(home, rules, max_instance_bytes=len(said) - 1) as door:
        assert failed(post(door, body(said))) == [(study[0].SOPInstanceUID, LOW)]
    with listening(home, rules | {"max_request_bytes": len(said) // 2}) as door:
        assert post(door, body(said)).status_code == 413
        assert post(door, iter([body(said)])).status_code == 413  # of no announced length
    with listening(home, rules | {"max_parts": 2}) as door:
        assert post(door, body(b"1", b"2", b"3")).status_code == 400
        assert list(door.spool.incoming.iterdir()) == []
        assert door.spool.studies() == []


def test_uploads_beyond_the_limit_are_told_to_come_again(home, study, rules):
    with listening(home, rules | {"max_uploads": 1}) as door:
        go = threading.Event()

        def slow() -> Iterator[bytes]:
            said = body(content(study[0]))
            yield said[:500]
            go.wait(60)
            yield said[500:]

        found: list[httpx.Response] = []
        first = threading.Thread(target=lambda: found.append(post(door, slow())))
        first.start()
        end = time.monotonic() + 60
        while not list(door.spool.incoming.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.01)
        answer = post(door, body(content(study[1])))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        go.set()
        first.join()
        assert found[0].status_code == 200
        assert post(door, body(content(study[1]))).status_code == 200


def test_an_upload_that_breaks_off_leaves_nothing(home, study, rules):
    said = body(content(study[0]), content(study[1]))
    head = "".join(f"{k}: {v}\r\n" for k, v in (ASKS | {"host": "h", "content-length": str(len(said))}).items())
    with listening(home, rules) as door:
        whole = len(content(study[0])) + 100
        answer = speak(door, f"POST /studies HTTP/1.1\r\n{head}\r\n".encode() + said[: whole + 600])
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert list(door.spool.incoming.iterdir()) == []
        (name,) = door.spool.studies()
        assert len(door.spool.files(name)) == 1  # what was whole is kept, and known when it comes again
        answer = post(door, body(content(study[0]), content(study[1])))
        assert len(stored(answer)) == 2
        assert door.counts()["DICOMweb"] == {"equal": 1, "request refused (400)": 1, "stored": 2}


def test_a_record_that_does_not_read_stops_its_study_and_says_nothing_of_it(home, study, rules):
    with listening(home, rules) as door:
        name = door.spool.hash(str(study[0].StudyInstanceUID))
        door.spool.vault.put(KIND, name, b"nonsense")
        answer = post(door, body(content(study[0])))
        assert (answer.status_code, answer.json()) == (500, {"error": IntegrityError.public_text})
        assert list(door.spool.incoming.iterdir()) == []
        assert not door.busy_with(name)


def test_a_sender_who_waits_to_be_asked_is_asked_only_if_it_may_send(home, study, rules):
    def head(token: str, length: int) -> bytes:
        lines = ASKS | {"authorization": f"Bearer {token}", "expect": "100-continue", "content-length": str(length)}
        return b"POST /studies HTTP/1.1\r\nhost: h\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode()

    said = body(content(study[0]))
    with listening(home, rules) as door:
        assert speak(door, head("wrong", 9) + b"\r\n", end=False).startswith(b"HTTP/1.1 401 ")
        assert door.server is not None
        with socket.create_connection(("127.0.0.1", door.server.port), timeout=60) as sender:
            sender.sendall(head(TOKEN, len(said)) + b"\r\n")
            assert sender.recv(4096).startswith(b"HTTP/1.1 100 ")
            sender.sendall(said)
            assert sender.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0" * 30_000,
        b"GET / HTTP/0.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 300,
        b"POST /studies HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\nhost: h\r\n\r\n",
        b"POST /studies HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
    ],
)
def test_what_is_not_http_ends_quickly_and_the_door_stays_open(home, study, rules, said, capfd):
    with listening(home, rules) as door:
        speak(door, said)
        assert post(door, body(content(study[0]))).status_code == 200
    assert capfd.readouterr().err == ""


def test_one_who_stalls_or_trickles_is_let_go_and_stops_nobody(home, study, rules):
    with listening(home, rules, idle_seconds=0.5) as door:
        assert door.server is not None
        since = time.monotonic()
        assert speak(door, b"POST /studies HT", end=False) == b""
        with socket.create_connection(("127.0.0.1", door.server.port), timeout=60) as trickle, suppress(OSError):
            for character in b"POST /studies HTTP/1.1\r\nx: " + b"y" * 600:
                trickle.sendall(bytes([character]))
                time.sleep(0.05)
                assert time.monotonic() - since < 15
        assert post(door, body(content(study[0]))).status_code == 200


def test_stopping_breaks_off_what_is_under_way(home, study, rules):
    with listening(home, rules) as door:
        assert door.server is not None
        with socket.create_connection(("127.0.0.1", door.server.port), timeout=60) as sender:
            lines = "".join(f"{k}: {v}\r\n" for k, v in (ASKS | {"content-length": "999999"}).items())
            sender.sendall(f"POST /studies HTTP/1.1\r\nhost: h\r\n{lines}\r\n".encode() + body(content(study[0]))[:-9])
            end = time.monotonic() + 60
            while not list(door.spool.incoming.iterdir()):
                assert time.monotonic() < end
                time.sleep(0.01)
            door.stop()
        assert list(door.spool.incoming.iterdir()) == []
        assert door.spool.studies() == []


def test_many_senders_at_once(home, study, rules):
    with listening(home, rules) as door:
        found: list[int] = []
        said = body(*map(content, study))
        threads = [threading.Thread(target=lambda: found.append(post(door, said).status_code)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [200] * 4
        assert door.counts() == {"DICOMweb": {"equal": 27, "stored": 9}}
        assert list(door.spool.incoming.iterdir()) == []


def test_the_port_is_taken(home, rules):
    with listening(home, rules) as door:
        assert door.server is not None
        web = door.web.model_copy(update={"port": door.server.port})
        with pytest.raises(BusyError):
            WebDoor(door.spool, door.settings, web).start()


def test_a_door_that_would_be_open_to_anybody_does_not_open(home, rules, tmp_path):
    def web(**changes: object) -> WebSettings:
        return WebSettings.model_validate(rules | changes)

    for wrong, why in (
        (web(addresses=[]), "allows nobody"),
        (web(token_file=None), "who they are"),
        (web(host="10.1.2.3"), "TLS"),
    ):
        with pytest.raises(ConfigError, match=why):
            WebDoor(Spool(home), ReceiveSettings(), wrong).start()
    token = Path(rules["token_file"])
    for text, mode, why in (("short", 0o600, "no token"), ("a b" * 9, 0o600, "no token"), (TOKEN, 0o640, "Others")):
        token.write_text(text)
        token.chmod(mode)
        with pytest.raises(ConfigError, match=why):
            web().token()
    with pytest.raises(ConfigError, match="cannot be read"):
        web(token_file=tmp_path / "none").token()


def test_the_web_section_alone_is_enough_to_receive(home, rules):
    file = home.root / "receive.yaml"
    with pytest.raises(ConfigError, match="allows nobody"):
        load_receive(home)
    file.write_text(file.read_text().replace("web: null", "web: " + json.dumps(rules)))
    settings = load_receive(home)
    assert settings.web == WebSettings.model_validate(rules)
    assert settings.calling == ()
    file.write_text(file.read_text().replace("calling: []", "calling: [PACS]"))
    with pytest.raises(ConfigError, match="allows nobody"):
        load_receive(home)
    file.write_text("web: {colour: red}")
    with pytest.raises(ConfigError, match=r"web\.colour"):
        load_receive(home)


def test_a_certificate_of_the_senders_ca_instead_of_a_token(home, study, rules, tmp_path):
    ours, theirs, stranger = (self_signed(tmp_path / name, name) for name in ("ours", "theirs", "stranger"))
    tls = {"certificate": str(ours[0]), "key": str(ours[1]), "client_ca": str(theirs[0])}
    said = body(content(study[0]))
    with listening(home, rules | {"tls": tls, "token_file": None}) as door:
        assert door.server is not None
        url = f"https://127.0.0.1:{door.server.port}/studies"
        for shown, status in ((theirs, 200), (stranger, 0), (None, 0)):
            trust = ssl.create_default_context(cafile=str(ours[0]))
            if shown:
                trust.load_cert_chain(*shown)
            headers = {"content-type": ASKS["content-type"]}
            try:
                answer = httpx.post(url, content=said, headers=headers, verify=trust, timeout=60, trust_env=False)
                assert answer.status_code == status
            except httpx.TransportError:
                assert status == 0
        assert httpx_plain_is_refused(door)
        assert counted(door, 4) == {"DICOMweb": {"stored": 1}, "unknown": {"connection failed": 3}}
    with listening(home, rules | {"tls": tls}) as door:  # both are named, and both are needed
        assert door.server is not None
        trust = ssl.create_default_context(cafile=str(ours[0]))
        trust.load_cert_chain(*theirs)
        url = f"https://127.0.0.1:{door.server.port}/studies"
        headers = {"content-type": ASKS["content-type"]}
        assert httpx.post(url, content=said, headers=headers, verify=trust, trust_env=False).status_code == 401
        assert httpx.post(url, content=said, headers=ASKS, verify=trust, trust_env=False).status_code == 200


def counted(door: WebDoor, of: int) -> dict[str, Counter[str]]:
    """Return what was counted, once it is so much: a connection that fails is counted by a thread of its own."""
    found: dict[str, Counter[str]] = {}
    end = time.monotonic() + 10
    while sum(counts.total() for counts in found.values()) < of and time.monotonic() < end:
        for caller, counts in door.counts().items():
            found.setdefault(caller, Counter()).update(counts)
        time.sleep(0.01)
    return found


def httpx_plain_is_refused(door: WebDoor) -> bool:
    with pytest.raises(httpx.TransportError):
        post(door, b"")
    return True


def test_mutated_uploads_are_answered_and_leave_nothing_half_written(home, study, rules, capfd):
    """Byte flips, cuts, repeats and wrong lengths, in the multipart frame and in the DICOM file."""
    whole, chance = body(content(study[0]), content(study[1])), random.Random(7)
    seen: Counter[int] = Counter()
    with listening(home, rules, idle_seconds=5) as door:
        for _ in range(200):
            said = bytearray(whole)
            for _ in range(chance.randint(1, 6)):
                at, size = chance.randrange(len(said)), chance.choice((1, 1, 4, 40))
                if chance.random() < 0.5:
                    at %= 700  # the frame, file meta and the first elements
                said[at : at + size] = chance.choice(
                    (b"", chance.randbytes(size), b"\xff" * size, b"\0" * size, b"\r\n--b", bytes(said[at : at + 300]))
                )
            answer = post(door, bytes(said))
            seen[answer.status_code] += 1
            assert list(door.spool.incoming.iterdir()) == []
        assert set(seen) <= {200, 202, 400, 409}
        assert min(seen[400], seen[200] + seen[202]) > 5
        assert post(door, whole).status_code == 200
    assert capfd.readouterr().err == ""


def test_files_that_receive_yaml_names_are_found_from_the_nodes_folder(home, rules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    certificate, key = self_signed(home.root / "certs", "ours")
    token = home.root / "certs/token"
    token.write_text("t" * 40)
    token.chmod(0o600)
    tls = {name: str(path.relative_to(home.root)) for name, path in (
        ("certificate", certificate), ("key", key), ("client_ca", certificate))}  # fmt: skip
    web = rules | {"tls": tls, "token_file": "certs/token"}
    file = home.root / "receive.yaml"
    file.write_text(json.dumps({"calling": ["PACS"], "addresses": ["127.0.0.1"], "tls": tls, "web": web}))
    found = load_receive(home)
    assert found.tls is not None
    assert found.web is not None
    assert found.web.tls is not None
    assert (found.tls.certificate, found.web.tls.client_ca) == (certificate, certificate)
    found.tls.context()
    found.web.tls.context("web.tls")
    assert found.web.token() == b"t" * 40
    file.write_text(json.dumps({"web": web | {"token_file": str(token)}}))
    absolute = load_receive(home).web
    assert absolute is not None
    assert absolute.token_file == token


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_a_tls_file_that_cannot_be_used_is_named_by_its_setting(home, rules, tmp_path, name):
    certificate, key = self_signed(tmp_path / "certs", "ours")
    good = {"certificate": str(certificate), "key": str(key), "client_ca": str(certificate)}
    bad = tmp_path / "bad.pem"
    for wrong in (None, "not PEM"):
        if wrong:
            bad.write_text(wrong)
            bad.chmod(0o600)
        settings = WebSettings.model_validate(rules | {"port": 0, "tls": good | {name: str(bad)}})
        assert settings.tls is not None
        with pytest.raises(ConfigError, match=rf" tls\.({name}|certificate and tls\.key) ") as caught:
            settings.tls.context()
        assert str(bad) not in str(caught.value)
        with pytest.raises(ConfigError, match=rf"web\.tls\.{name if wrong is None else ''}"):
            WebDoor(Spool(home), ReceiveSettings(), settings).start()
    with pytest.raises(ConfigError, match=r"web\.token_file"):
        WebSettings.model_validate(rules | {"token_file": str(tmp_path / "none")}).token()
