"""The node's own door on loopback: for its SuperNode alone, and every fault behind it is 503."""

from __future__ import annotations

import base64
import datetime
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from flwr.proto import fleet_pb2
from flwr.proto.message_pb2 import Message, Metadata

from medlsdm.federation.identity import NonceCache, public_hex, verify_request
from medlsdm_node.coordinator import Coordinator, ServerAddress
from medlsdm_node.forwarder import Forwarder
from medlsdm_server.authority import create_certificates, issue_site_certificate
from medlsdm_server.home import ServerHome, ServerSettings

from .conftest import new_home


class Upstream(ThreadingHTTPServer):
    """Stand where the gateway is: real mutual TLS, answers as told, requests kept."""

    daemon_threads = True

    def __init__(self, server: ServerHome) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.server_cert, server.server_key)
        context.load_verify_locations(server.ca_cert)
        context.verify_mode = ssl.CERT_REQUIRED
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.seen, self.answer, self.slow = [], (200, b""), 0.0


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        time.sleep(self.server.slow)
        status, content = self.server.answer
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("x-medlsdm-clock", f"{time.time() + self.server.ahead:.3f}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


Upstream.ahead = 0.0


@pytest.fixture
def upstream(tmp_path):
    server = ServerHome(tmp_path / "server")
    server.create(ServerSettings(hosts=("127.0.0.1",)))
    create_certificates(server, server.settings())
    with Upstream(server) as made:
        made.home = server
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def forwarder(home, upstream):
    home.ca_cert.write_bytes(upstream.home.ca_cert.read_bytes())
    certificate = issue_site_certificate(upstream.home, "site-a", home.node_public_key())
    home.tls_file.write_bytes(certificate.encode() + home.node_private_pem())
    made = Forwarder(home, Coordinator(home, ServerAddress(host="127.0.0.1", port=upstream.server_port)))
    made.start()
    yield made
    made.stop()


def flower(home, *, age=0.0):
    key = load_ssh_private_key(home.node_key.read_bytes(), None)
    moment = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        "flwr-timestamp": moment, "content-type": "application/protobuf",
        "flwr-signature": base64.b64encode(key.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        "flwr-public-key": base64.b64encode(public).decode(),
    }  # fmt: skip


def post(forwarder, call, headers, body=b"x", timeout=30):
    context = ssl.create_default_context(cafile=str(forwarder.certificate))
    url = f"https://127.0.0.1:{forwarder.port}/v1/fleet/{call}"
    return httpx.post(url, headers=headers, content=body, verify=context, trust_env=False, timeout=timeout)


def test_a_call_arrives_signed_by_the_site_with_its_body(forwarder, home, upstream):
    assert post(forwarder, "get-run", flower(home), b"body").status_code == 200
    path, headers, body = upstream.seen[0]
    assert (path, body) == ("/v1/fleet/get-run", b"body")
    verify_request(public_hex(home.identity), headers, "POST", path, body=body, seen=NonceCache())
    assert json.loads(headers["x-medlsdm-activity"]) == {"activity": "waiting"}


def test_nobody_else_on_this_machine_is_forwarded(forwarder, home, upstream, tmp_path):
    good, other = flower(home), flower(new_home(tmp_path / "other", "site-b"))
    wrong = [{}, other, flower(home, age=500), good | {"flwr-signature": other["flwr-signature"]},
             good | {"flwr-public-key": "%%"}, good | {"flwr-timestamp": "soon"}]  # fmt: skip
    assert [post(forwarder, "get-run", headers).status_code for headers in wrong] == [401] * len(wrong)
    assert upstream.seen == []


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_fault_of_the_server_is_tried_again(forwarder, home, upstream, status):
    upstream.answer = (status, b"what Flower said")
    answer = post(forwarder, "pull-messages", flower(home))
    assert (answer.status_code, answer.text) == (503, "Service Unavailable")


def test_nobody_there_is_tried_again(forwarder, home):
    forwarder.coordinator.address = ServerAddress(host="127.0.0.1", port=1)
    assert post(forwarder, "pull-messages", flower(home)).status_code == 503


def test_a_refusal_is_kept_for_the_node_and_the_supernode_waits(forwarder, home, upstream):
    said = {"error": "enrolment", "message": "The coordinator lists this site as revoked.", "hint": "Ask."}
    upstream.answer = (403, json.dumps(said).encode())
    assert post(forwarder, "pull-messages", flower(home)).status_code == 503
    assert forwarder.refusal == "The coordinator lists this site as revoked. Ask."
    upstream.answer = (403, b'{"code": 2001}')  # Flower's own
    assert post(forwarder, "get-run", flower(home)).status_code == 403


def test_a_clock_that_is_off_is_corrected_after_one_refusal(forwarder, home, upstream):
    upstream.ahead = 640.0
    said = {"error": "enrolment", "message": "The site's clock is 640 s behind the coordinator's.", "hint": ""}
    upstream.answer = (403, json.dumps(said).encode())
    post(forwarder, "get-run", flower(home))
    first, second = (int(headers["x-medlsdm-time"]) for _, headers, _ in upstream.seen)
    assert 630 < second - first < 650
    flowers = datetime.datetime.fromisoformat(upstream.seen[1][1]["flwr-timestamp"])
    assert abs(flowers.timestamp() - time.time() - 640) < 10
    upstream.ahead = 0.0


def test_the_same_piece_sent_again_while_it_is_under_way_goes_once(forwarder, home, upstream):
    upstream.slow = 2.0
    with pytest.raises(httpx.ReadTimeout):
        post(forwarder, "push-object", flower(home), b"piece", timeout=0.7)
    assert post(forwarder, "push-object", flower(home), b"piece").status_code == 200
    assert len(upstream.seen) == 1


def test_work_that_is_handed_over_is_seen(forwarder, home, upstream):
    work = fleet_pb2.PullMessagesResponse(messages_list=[Message(metadata=Metadata(src_node_id=1))])
    upstream.answer = (200, work.SerializeToString())
    post(forwarder, "pull-messages", flower(home))
    assert forwarder.busy
    post(forwarder, "send-node-heartbeat", flower(home))
    assert json.loads(upstream.seen[-1][1]["x-medlsdm-activity"]) == {"activity": "receiving"}
    upstream.answer = (200, fleet_pb2.PullMessagesResponse().SerializeToString())
    post(forwarder, "pull-messages", flower(home))
    assert not forwarder.busy
