"""Pulling from an archive on loopback that serves a study, pages, and misbehaves when told to."""

from __future__ import annotations

import json
import logging
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest
from pydantic import SecretStr

from medlsdm.errors import BusyError, ConfigError, DataError, NetworkError, ResourceError, UsageError
from medlsdm_node import archive as archives
from medlsdm_node import pull as pulling
from medlsdm_node import quarantine
from medlsdm_node.archive import Archive, Credentials, check_address, read_credentials
from medlsdm_node.home import NodeHome
from medlsdm_node.intake import Intake
from medlsdm_node.pull import PullResult, Selection, pull, read_studies
from medlsdm_node.receive_settings import ReceiveSettings
from medlsdm_node.spool import Spool
from medlsdm_node.vault import PAIR, Vault

from .conftest import content

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
PAGE = 4  # what the archive gives at most, whatever it is asked for
TOKEN = "a-token-of-the-archive"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pulling, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def uid(study) -> str:
    return str(study[0].StudyInstanceUID)


@pytest.fixture
def ready(home) -> NodeHome:
    (home.root / "receive.yaml").write_text("min_free_bytes: 0\n")
    return home


class Server(ThreadingHTTPServer):
    """Serve instances; ``answer`` may replace what would be said about a path."""

    daemon_threads = True

    def __init__(self, study: list[pydicom.Dataset]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.study = study
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.answer: Callable[[str], tuple[int, str, bytes] | None] = lambda path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/dicom-web"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        path, query = split.path.removeprefix("/dicom-web"), {k: v[0] for k, v in parse_qs(split.query).items()}
        self.server.asked.append(path + ("?" + split.query if split.query else ""))
        self.server.tokens.add(self.headers.get("authorization", ""))
        status, kind, content = self.server.answer(path) or self.right(path, query)
        self.send_response(status)
        self.send_header("content-type", kind)
        if kind == "redirect":
            self.send_header("location", content.decode())
        length = len(content) + (999 if kind.startswith("torn") else 0)
        self.send_header("content-length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = kind.startswith("torn")

    def right(self, path: str, query: dict[str, str]) -> tuple[int, str, bytes]:
        words = path.strip("/").split("/")
        offset = int(query.get("offset", 0))
        studies = list(dict.fromkeys(str(ds.StudyInstanceUID) for ds in self.server.study))
        if words == ["studies"]:
            return 200, "application/dicom+json", rows([{"0020000D": uid} for uid in studies][offset:])
        if len(words) == 3 and words[2] == "instances":
            found = [ds for ds in self.server.study if ds.StudyInstanceUID == words[1]][offset : offset + PAGE]
            named = [{"0020000E": str(ds.SeriesInstanceUID), "00080018": str(ds.SOPInstanceUID)} for ds in found]
            return (200, "application/dicom+json", rows(named)) if named else (204, "application/dicom+json", b"")
        (ds,) = [ds for ds in self.server.study if ds.SOPInstanceUID == words[-1]]
        return 200, 'multipart/related; type="application/dicom"; boundary=b', wrapped(content(ds))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def rows(found: list[dict[str, str]]) -> bytes:
    return json.dumps([{tag: {"vr": "UI", "Value": [uid]} for tag, uid in row.items()} for row in found]).encode()


def wrapped(*files: bytes) -> bytes:
    return b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + f + b"\r\n" for f in files) + b"--b--\r\n"


@contextmanager
def serving(study: list[pydicom.Dataset], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(study)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(home: NodeHome, server: Server, selection: Selection, said: list[str] | None = None) -> PullResult:
    archive = Archive(server.url, Credentials(token=SecretStr(TOKEN)))
    try:
        return pull(home, archive, selection, lambda *_: None, (said if said is not None else []).append)
    finally:
        archive.close()


def test_a_study_that_is_pulled_ends_in_the_vault_and_is_not_fetched_again(ready, study, uid):
    with serving(study) as server:
        found = run(ready, server, Selection(modality="MR", date="20240101-20241231"))
        assert (found.studies, found.instances, found.known, found.failed) == (1, 9, 0, 0)
        assert (found.outcomes, found.pairs, found.held) == ({"stored": 9}, 1, 0)
        assert "ModalitiesInStudy=MR" in server.asked[0]
        assert "StudyDate=20240101-20241231" in server.asked[0]
        assert server.tokens == {f"Bearer {TOKEN}"}
        server.asked.clear()
        again = run(ready, server, Selection((uid,)))
        assert (again.known, again.outcomes, again.bytes, again.pairs) == (9, {}, 0, 0)
        assert not [path for path in server.asked if "/series/" in path]
    assert len(Vault(ready).names(PAIR)) == 1
    assert quarantine.items(ready) == []
    pulled = [r["fields"] for r in ready.audit.records() if r["event"] == "pulled"]
    assert [(f["instances"], f["known"]) for f in pulled] == [(9, 0), (9, 9)]


def test_nothing_of_the_patient_lies_in_clear_or_is_said(ready, study, uid, caplog):
    words = {str(ds.get(k)) for ds in study for k in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID")}
    said: list[str] = []
    with serving(study) as server, caplog.at_level(logging.DEBUG):
        broken = str(study[3].SOPInstanceUID)
        server.answer = lambda path: (500, "text/plain", uid.encode()) if path.endswith(broken) else None
        assert run(ready, server, Selection((uid,)), said).failed == 1
        for path in (p for p in ready.root.rglob("*") if p.is_file()):
            assert not any(w in str(path) or w.encode() in path.read_bytes() for w in words), path
    assert said == ["An instance could not be fetched: The archive answered with status 500."]
    assert not any(w in record.getMessage() for w in [*words, TOKEN] for record in caplog.records)


def test_what_failed_is_fetched_the_next_time_and_only_then_is_the_study_taken_in(ready, study, uid):
    with serving(study) as server:
        server.answer = lambda path: (404, "text/plain", b"") if path.endswith(str(study[3].SOPInstanceUID)) else None
        first = run(ready, server, Selection((uid,)))
        assert (first.outcomes, first.failed, first.pairs) == ({"stored": 8}, 1, 0)
        server.answer = lambda path: None
        second = run(ready, server, Selection((uid,)))
        assert (second.known, second.outcomes, second.failed, second.pairs) == (8, {"stored": 1}, 0, 1)


def test_an_archive_that_fails_again_and_again_ends_it_and_what_came_stays(ready, study, uid):
    with serving(study) as server:
        count = iter(range(1000))
        server.answer = lambda path: (500, "", b"") if "/series/" in path and next(count) >= 2 else None
        with pytest.raises(NetworkError, match="status 500"):
            run(ready, server, Selection((uid,)))
    spool = Spool(ready)
    assert len(spool.files(spool.hash(uid))) == 2
    assert not spool.pulling(spool.hash(uid))
    assert [r["fields"]["fetched"] for r in ready.audit.records() if r["event"] == "pulled"] == [{"stored": 2}]


def multipart(body: bytes) -> tuple[int, str, bytes]:
    return 200, 'multipart/related; type="application/dicom"; boundary=b', body


@pytest.mark.parametrize("wrong", ["torn", "no end", "two", "none", "html", "no boundary"])
def test_an_answer_that_is_not_one_whole_instance_is_not_kept(ready, study, uid, wrong):
    file = content(study[0])
    answer = {
        "torn": (200, "torn", wrapped(file)[:2000]),
        "no end": multipart(wrapped(file)[:-6]),
        "two": multipart(wrapped(file, file)),
        "none": multipart(b"--b--\r\n"),
        "html": (200, "text/html", b"<html>" + uid.encode()),
        "no boundary": (200, "multipart/related", wrapped(file)),
    }[wrong]
    with serving(study) as server:
        server.answer = lambda path: answer if "/series/" in path else None
        with pytest.raises((NetworkError, DataError)) as raised:
            run(ready, server, Selection((uid,)))
        assert uid not in str(raised.value)
    assert list((ready.root / "spool" / "pulling").iterdir()) == []
    assert Spool(ready).studies() == []


def test_an_instance_that_comes_unwrapped_is_taken(ready, study, uid):
    files = {str(ds.SOPInstanceUID): content(ds) for ds in study}

    def unwrapped(path: str) -> tuple[int, str, bytes] | None:
        return (200, "application/dicom", files[path.rpartition("/")[2]]) if "/series/" in path else None

    with serving(study) as server:
        server.answer = unwrapped
        assert run(ready, server, Selection((uid,))).outcomes == {"stored": 9}


def test_another_instance_than_the_one_asked_for_is_refused_and_counted(ready, study, uid):
    other = multipart(wrapped(content(study[0])))
    with serving(study) as server:
        server.answer = lambda path: other if path.endswith(str(study[1].SOPInstanceUID)) else None
        found = run(ready, server, Selection((uid,)))
        assert found.refused == {"it is another instance": 1}
        assert "refused: 1 x it is another instance" in found.in_words()


NONSENSE = (
    b"no json",
    b"{}",
    b"7",
    b"[7]",
    b'[{"0020000D": 1}]',
    b'[{"0020000D": {"Value": ["../x"]}}]',
    b"[" * 99_999,
    b"[" + b"1" * 5000 + b"]",
)


@pytest.mark.parametrize("page", NONSENSE)
def test_a_search_that_is_answered_with_nonsense_ends_in_one_line(ready, study, page):
    with serving(study) as server:
        server.answer = lambda path: (200, "application/dicom+json", page)
        with pytest.raises(DataError):
            run(ready, server, Selection(modality="MR"))


@pytest.mark.parametrize("said", ["../../../admin", "1.2/../3", "1.2?x", "1..2", "1" * 65, ""])
def test_what_is_no_uid_becomes_no_address(ready, study, uid, said):
    page = rows([{"0020000E": "1.2.5", "00080018": said}])
    with serving(study) as server:
        server.answer = lambda path: (200, "application/json", page) if path.endswith("/instances") else None
        with pytest.raises(DataError, match="no UID"):
            run(ready, server, Selection((uid,)))
        assert not [path for path in server.asked if "/series/" in path]


def test_an_endless_answer_is_cut(ready, study, monkeypatch):
    monkeypatch.setattr(archives, "MAX_SEARCH_BYTES", 10_000)
    with serving(study) as server:
        server.answer = lambda path: (200, "application/dicom+json", b"[" + b" " * 200_000 + b"]")
        with pytest.raises(DataError, match="too long"):
            run(ready, server, Selection(modality="MR"))


@contextmanager
def endless(first: bytes, piece: bytes) -> Iterator[tuple[str, list[int]]]:
    """Answer every search with one row, and every instance with bytes that never end; yield address and bytes sent."""
    row = rows([{"0020000E": "1.2.5", "00080018": "1.2.6"}])
    found = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(row) + row
    sent = [0]

    class Endless(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = self.request.recv(65536)
            self.request.sendall(found if b"/instances?" in asked else first)
            with suppress(OSError):
                while b"/instances?" not in asked and sent[0] < 200 << 20:
                    self.request.sendall(piece)
                    sent[0] += len(piece)

    class Many(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Many(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/dicom-web", sent
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 503 Busy\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/dicom\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/dicom\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["redirect", "busy", "instance", "trailer", "interim"],
)
def test_an_answer_without_an_end_is_left_soon_and_fills_no_memory(home, monkeypatch, first, piece):
    monkeypatch.setattr(archives, "SILENCE_SECONDS", 1.0)
    (home.root / "receive.yaml").write_text("min_free_bytes: 0\nmax_instance_bytes: 1000000\n")
    with endless(first, piece) as (url, sent):
        archive = Archive(url, Credentials())
        since = time.monotonic()
        try:
            found = pull(home, archive, Selection(("1.2.3",)), lambda *_: None, lambda *_: None)
        finally:
            archive.close()
        assert found.failed + sum(found.refused.values()) == 1
        assert time.monotonic() - since < 30
        assert len(piece) < 100 or sent[0] < 50 << 20
    assert list((home.root / "spool/pulling").iterdir()) == []


def test_a_busy_archive_is_asked_again_and_one_that_stays_busy_is_said(ready, study, uid, monkeypatch):
    monkeypatch.setattr(archives, "PAUSE_SECONDS", 0.01)
    with serving(study) as server:
        answers = iter([503, 429, 200])
        server.answer = lambda path: None if next(answers, 200) == 200 else (503, "text/plain", b"DOE^JANE")
        assert run(ready, server, Selection((uid,))).outcomes == {"stored": 9}
        server.answer = lambda path: (503, "text/plain", b"DOE^JANE")
        with pytest.raises(NetworkError, match="status 503"):
            run(ready, server, Selection((uid,)))


def test_an_archive_that_ignores_the_offset_is_read_once(ready, study, uid):
    with serving(study) as server:
        page = rows([{"0020000E": str(ds.SeriesInstanceUID), "00080018": str(ds.SOPInstanceUID)} for ds in study])
        server.answer = lambda path: (200, "application/json", page) if path.endswith("/instances") else None
        assert run(ready, server, Selection((uid,))).outcomes == {"stored": 9}


def test_a_redirect_is_not_followed_and_credentials_go_nowhere_else(ready, study):
    with serving(study) as server, serving(study) as elsewhere:
        server.answer = lambda path: (302, "redirect", elsewhere.url.encode())
        with pytest.raises(NetworkError, match="elsewhere"):
            run(ready, server, Selection(modality="MR"))
        assert elsewhere.asked == []


def test_credentials_that_are_not_accepted_are_said(ready, study):
    with serving(study) as server:
        server.answer = lambda path: (401, "text/plain", b"")
        with pytest.raises(NetworkError, match="does not accept us"):
            run(ready, server, Selection(modality="MR"))


def test_a_low_disk_stops_it_at_once(home, study, uid):
    (home.root / "receive.yaml").write_text(f"min_free_bytes: {1 << 60}\n")
    with serving(study) as server, pytest.raises(ResourceError, match="the disk is low"):
        run(home, server, Selection((uid,)))
    assert len([path for path in server.asked if "/series/" in path]) == 1


def test_while_receive_runs_the_study_is_left_to_it_and_not_taken_by_halves(ready, study, uid):
    said: list[str] = []
    settings = ReceiveSettings(min_free_bytes=0, quiet_seconds=0.001)
    spool = Spool(ready)
    receiver = Intake(ready, spool, (), settings, said.append)
    with serving(study) as server:

        def meanwhile(path: str) -> None:
            receiver.tick()

        server.answer = meanwhile  # type: ignore[assignment]
        with ready.locked("receive"):
            found = run(ready, server, Selection((uid,)), said)
        assert (found.pairs, found.waiting) == (0, 1)
    assert said == ["The receiver runs: it takes in what was fetched."]
    time.sleep(0.05)
    receiver.tick()
    assert said[-1] == "Took in a study: 1 scans, 0 files or series held."


def test_two_pulls_at_once_are_refused(ready, study, uid):
    with serving(study) as server, ready.locked("pull"), pytest.raises(BusyError):
        run(ready, server, Selection((uid,)))


def test_a_killed_pull_blocks_no_study_and_what_it_left_is_deleted(ready, study, uid):
    spool = Spool(ready, "pulling")
    with ready.locked("pull"), spool.pull(spool.hash(uid)):
        assert spool.pulling(spool.hash(uid))
        assert not spool.pulling(spool.hash("1.2"))
    (ready.run / "pull.study").write_text(spool.hash(uid))
    assert not spool.pulling(spool.hash(uid))
    arrival = spool.begin()
    arrival.write(b"half")
    arrival.writer._stream.close()
    (ready.run / "study-x").mkdir()
    with serving(study) as server:
        assert run(ready, server, Selection((uid,))).outcomes == {"stored": 9}
    assert list(spool.incoming.iterdir()) == []
    assert not (ready.run / "study-x").exists()


def test_a_study_that_the_archive_does_not_have_is_said(ready, study):
    with serving(study) as server, pytest.raises(DataError, match="nothing of a study"):
        run(ready, server, Selection(("1.2.3",)))


@pytest.mark.parametrize(
    "wrong",
    [
        Selection(),
        Selection(("x",)),
        Selection(("1.2",), modality="CT"),
        Selection(modality="ct&x=1"),
        Selection(date="2024"),
        Selection(date="20240201-20240101"),
    ],
)
def test_what_selects_nothing_or_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError):
        wrong.check()


def test_days_may_be_open_at_one_end(tmp_path):
    for days in ("20240101", "20240101-", "-20240101", "20240101-20240101"):
        Selection(date=days).check()
    file = tmp_path / "studies"
    file.write_text("1.2.3\n1.2.4\n")
    assert read_studies(file) == ("1.2.3", "1.2.4")
    with pytest.raises(UsageError):
        read_studies(tmp_path / "none")


UNSAFE = (
    "pacs",
    "ftp://pacs/x",
    "http://pacs/dicom-web",
    "http://10.1.2.3",
    "https://user:secret@pacs/",
    "https://pacs/?x=1",
    "https://",
    "https://h:x/",
)


@pytest.mark.parametrize("url", UNSAFE)
def test_an_address_that_is_not_safe_is_refused(url):
    with pytest.raises(UsageError) as raised:
        check_address(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["https://pacs.hospital/dicom-web", "http://127.0.0.1:8042/dicom-web", "http://localhost:1", "http://[::1]:1"],
)
def test_an_address_that_is_safe_is_taken(url):
    assert check_address(url + "/") == url


def test_credentials_come_from_a_private_file_or_the_environment(tmp_path: Path):
    file = tmp_path / "credentials"
    file.touch(mode=0o600)
    file.write_text("token: abc\n")
    found = read_credentials(file, {"MEDLSDM_PULL_TOKEN": "other"})
    assert found.token is not None
    assert (found.token.get_secret_value(), "abc" in repr(found)) == ("abc", False)
    found = read_credentials(None, {"MEDLSDM_PULL_USER": "u", "MEDLSDM_PULL_PASSWORD": "secret"})
    assert found.password is not None
    assert (found.user, found.password.get_secret_value(), found.token) == ("u", "secret", None)
    assert read_credentials(None, {}) == Credentials()
    file.write_text("secret")
    with pytest.raises(ConfigError) as raised:
        read_credentials(file, {})
    assert "secret" not in str(raised.value)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="Others"):
        read_credentials(file, {})
    with pytest.raises(ConfigError, match="missing"):
        Archive("https://pacs/", Credentials(), tmp_path / "no-ca")
