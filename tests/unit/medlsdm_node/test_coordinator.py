from __future__ import annotations

import http.server
import json
import ssl
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlsdm.errors import EnrolmentError, IntegrityError, NetworkError, UsageError
from medlsdm.federation.identity import fingerprint
from medlsdm_node.coordinator import Coordinator, ServerAddress


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("example.org", "example.org", 8443),
        (" example.org:1 ", "example.org", 1),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]", "[::1]", 8443),
        ("[fe80::1]:444", "[fe80::1]", 444),
        ("coordinator_1", "coordinator_1", 8443),
    ],
)
def test_an_address_is_a_host_and_a_port(text, host, port):
    address = ServerAddress.parse(text)
    assert (address.host, address.port) == (host, port)
    assert str(address) == f"{host}:{port}"
    assert ServerAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":8443", "host:", "host:0", "host:65536", "host:x", "host:\u00b2", "host:-1", "https://host",
        "host/path", "a b", "user@host", "host?x", "host#x", "::1", "[::1", "a:b:1", "host:80\n:1",
        "x" * 254, "h\u00f6st", "host:000001",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UsageError) as caught:
        ServerAddress.parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text):
    try:
        address = ServerAddress.parse(text)
    except UsageError:
        return
    assert ServerAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "model", ["", "..", "../x", "/etc", "a.stage1-0001/..", "../../a.stage1-0001", "a.stage1-0001\n", ".a.stage1-0001"]
)
def test_a_model_is_never_kept_outside_its_folder(home, model):
    before = sorted(home.root.parent.rglob("*"))
    with pytest.raises(IntegrityError, match="name"):
        Coordinator(home, ServerAddress(host="localhost", port=1)).fetch_model(model)
    assert sorted(home.root.parent.rglob("*")) == before


def test_a_node_that_joined_nobody_says_so(home):
    with pytest.raises(EnrolmentError, match="join"):
        Coordinator.joined(home)


@contextmanager
def answering(tmp_path, status: int, body: bytes):
    """Be a coordinator that answers everything alike, with a certificate of its own CA."""
    from medlsdm_server.authority import create_certificates
    from medlsdm_server.home import ServerHome, ServerSettings

    authority = ServerHome(tmp_path / "authority")
    authority.create(ServerSettings(hosts=("localhost",)))
    create_certificates(authority, authority.settings())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            content = authority.ca_cert.read_bytes() if self.path == "/v1/ca" and status == 200 else body
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server_cert, authority.server_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield ServerAddress(host="127.0.0.1", port=server.server_address[1]), authority
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_ca_of_the_invitation_is_kept_and_trusted(home, tmp_path):
    with answering(tmp_path, 200, b'{"site": "site-a", "status": "admitted"}') as (address, authority):
        coordinator = Coordinator(home, address)
        coordinator.pin(fingerprint(authority.ca_cert.read_bytes()), lambda _: False)
        assert home.ca_cert.read_bytes() == authority.ca_cert.read_bytes()
        assert coordinator.status() == "admitted"
        assert Coordinator.joined(home).address == address
        with pytest.raises(EnrolmentError, match="joined"):
            Coordinator(home, ServerAddress(host="elsewhere", port=1)).pin(None, lambda _: True)


def test_another_ca_is_not_kept(home, tmp_path):
    with answering(tmp_path, 200, b"") as (address, _):
        for expected, confirm in (("0" * 64, lambda _: True), (None, lambda _: False)):
            with pytest.raises(EnrolmentError):
                Coordinator(home, address).pin(expected, confirm)
    assert not home.ca_cert.exists()
    assert not home.server_file.exists()


def test_a_server_with_a_certificate_of_another_ca_is_refused(home, tmp_path):
    with answering(tmp_path, 200, b"{}") as (address, _):
        from medlsdm_server.authority import create_certificates
        from medlsdm_server.home import ServerHome, ServerSettings

        other = ServerHome(tmp_path / "other")
        other.create(ServerSettings(hosts=("localhost",)))
        create_certificates(other, other.settings())
        home.ca_cert.write_bytes(other.ca_cert.read_bytes())
        with pytest.raises(EnrolmentError, match="certificate"):
            Coordinator(home, address).status()


@pytest.mark.parametrize(
    ("status", "body", "error", "word"),
    [
        (403, b'{"message": "No.", "hint": "Ask."}', EnrolmentError, "No. Ask."),
        (400, b'{"message": "No.", "hint": "Ask."}', IntegrityError, "No. Ask."),
        (403, b'{"message": "a\\n\\u001b[31mb", "hint": ""}', EnrolmentError, r"a \[31mb"),
        (500, b"Internal Server Error", NetworkError, "500"),
        (404, b"", NetworkError, "404"),
        (403, b"[]", NetworkError, "403"),
        (403, json.dumps({"message": "x"}).encode(), NetworkError, "403"),
    ],
)
def test_what_the_server_refuses_becomes_one_line(home, tmp_path, status, body, error, word):
    with answering(tmp_path, status, body) as (address, authority):
        home.ca_cert.write_bytes(authority.ca_cert.read_bytes())
        with pytest.raises(error, match=word) as caught:
            Coordinator(home, address).status()
    assert str(caught.value).isprintable()
