"""The door in front of the gateway: few strangers, short patience, and sites known by their certificate."""

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from medlsdm_server import door
from medlsdm_server.authority import issue_site_certificate

SERVER = """
import asyncio, ssl, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from medlsdm_server import door
from medlsdm_server.door import Listener
door.HEAD_SECONDS, door.SILENCE_SECONDS = 1.5, 1.5
door.STRANGER_IDLE_SECONDS = 2

async def answer(request):
    body = await request.body() if request.url.path == "/body" else b""
    return PlainTextResponse(f"{request.scope['state']['certified'] or '-'} {len(body)}")

async def ignore(request):
    return PlainTextResponse("no", 403, {"connection": "close"})

listener = Listener()
listener.open(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
posts = [Route("/body", answer, methods=["POST"]), Route("/no", ignore, methods=["POST"])]
app = Starlette(routes=[Route("/", answer), *posts])
protocol = door.door(listener, lambda der: "site-a")
tls = dict(zip(("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"), sys.argv[1:], strict=True))
config = uvicorn.Config(app, loop="asyncio", http=protocol, ws="none", lifespan="off", log_config=None,
    ssl_cert_reqs=ssl.CERT_OPTIONAL, **tls)
uvicorn.Server(config).run(sockets=[listener])
"""


@pytest.fixture
def served(home):
    """Serve a small application behind the door, with short patience; return the port and the process."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(home.server_cert), str(home.server_key), str(home.ca_cert)],
        stdout=subprocess.PIPE,
    ) as process:
        port = int(process.stdout.readline())
        yield port, process
        process.kill()


def connect(home, port, *, certificate=False):
    context = ssl.create_default_context(cafile=str(home.ca_cert))
    if certificate:
        context.load_cert_chain(home.root / "site.pem")
    raw = socket.create_connection(("127.0.0.1", port), 10)
    try:
        return context.wrap_socket(raw, server_hostname="127.0.0.1")
    except OSError:
        raw.close()
        raise


def ask(line, path="/"):
    line.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    answer = b""
    while not re.search(rb"\r\n\r\n\S+ \d+$", answer):
        piece = line.recv(65536)
        assert piece, answer
        answer += piece
    return answer


def ended_after(line):
    """Return after how many seconds the other side ends the connection."""
    started = time.monotonic()
    line.settimeout(20)
    with contextlib.suppress(OSError):
        while line.recv(65536):
            pass
    return time.monotonic() - started


def test_a_stranger_is_answered_as_nobody(home, served):
    with connect(home, served[0]) as line:
        assert ask(line).endswith(b"- 0")


def test_half_a_head_ends_soon_however_it_drips(home, served):
    with connect(home, served[0]) as line:
        line.sendall(b"GET / HTTP/1.1\r\nx-a: ")
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 10:
                line.sendall(b"b")
                time.sleep(0.2)
        assert time.monotonic() - started < 6
    with connect(home, served[0]) as line:
        ask(line)
        line.sendall(b"GET / HT")  # the second head on the same connection
        assert ended_after(line) < 5


def test_a_connection_without_a_handshake_ends_soon(served):
    with socket.create_connection(("127.0.0.1", served[0]), 10) as line:
        assert ended_after(line) < 6


def test_a_body_that_does_not_come_ends_soon(home, served):
    with connect(home, served[0]) as line:
        line.sendall(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
        assert ended_after(line) < 6


def test_idle_strangers_are_let_go(home, served):
    with connect(home, served[0]) as line:
        ask(line)
        assert 1 < ended_after(line) < 8


def test_many_half_requests_from_one_address_stay_few_and_keep_nobody_out(home, served):
    with contextlib.ExitStack() as held:
        for _ in range(3 * door.MOST_OF_ADDRESS):
            with contextlib.suppress(OSError):
                held.enter_context(connect(home, served[0])).sendall(b"GET / HTTP/1.1\r\nx-a: ")
        with connect(home, served[0]) as line:
            assert b"200 OK" in ask(line)
        assert len(established(served)) <= door.MOST_OF_ADDRESS + 1


def established(served):
    """Return our end of each open connection to the server."""
    with open(f"/proc/{served[1].pid}/net/tcp") as stream:  # every connection of the machine; ours by its port
        mine = f":{served[0]:04X}"
        return [r for r in stream if re.match(rf"\s*\d+: \S+{mine} \S+ 01 ", r)]


def test_a_refused_body_is_not_kept_in_memory(home, served):
    port, process = served

    def resident():
        with open(f"/proc/{process.pid}/status") as stream:
            return int(re.search(r"VmRSS:\s+(\d+)", stream.read())[1]) / 1024

    with connect(home, port) as line:
        ask(line)
    with contextlib.ExitStack() as held:
        before = resident()
        for _ in range(20):
            line = held.enter_context(connect(home, port))
            with contextlib.suppress(OSError):
                line.sendall(b"POST /no HTTP/1.1\r\nhost: x\r\ncontent-length: 60000000\r\n\r\n")
                for _ in range(20):
                    line.sendall(b"x" * (1 << 20))
        assert resident() - before < 50


def test_a_site_is_known_by_its_certificate_and_counted_with_no_stranger(home, served):
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (home.root / "site.pem").write_bytes(issue_site_certificate(home, "site-a", public).encode() + private)
    with contextlib.ExitStack() as held:
        for _ in range(door.MOST_OF_ADDRESS + 8):
            assert ask(held.enter_context(connect(home, served[0], certificate=True))).endswith(b"site-a 0")
        assert len(established(served)) == door.MOST_OF_ADDRESS + 8
