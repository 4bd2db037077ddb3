"""The node's side of the coordinator's door: trust, enrolment, certificate, clock, and fetching models."""

from __future__ import annotations

import json
import logging
import os
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from medlsdm.checks import write_atomic
from medlsdm.errors import EnrolmentError, IntegrityError, NetworkError, ResourceError, UsageError
from medlsdm.federation.identity import (
    CLOCK_HEADER,
    EnrolReply,
    EnrolRequest,
    Invitation,
    fingerprint,
    public_hex,
    sign_pledge,
    sign_request,
)
from medlsdm.federation.plan import CHECKPOINT_ID
from medlsdm_node.home import NodeHome

log = logging.getLogger(__name__)

DEFAULT_PORT = 8443
CLOCK_TOLERANCE_S = 2.0
SECONDS, TRIES, PIECE_BYTES = 60, 5, 1 << 20
_ADDRESS = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
MODEL_FILES = ("autoencoder.safetensors", "denoiser.safetensors", "card.md", "card.json")


class ServerAddress(BaseModel):
    """Remember which coordinator this node has joined; its CA lies beside, pinned."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    host: str = Field(min_length=1, max_length=253)
    port: int = Field(ge=1, le=65535)

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Read ``HOST`` or ``HOST:PORT``; an IPv6 address stands in brackets."""
        found = _ADDRESS.fullmatch(text.strip())
        port = int(found[2] or DEFAULT_PORT) if found else 0
        if found is None or not 0 < port < 65536:
            raise UsageError(f"{text!r} is not HOST or HOST:PORT.", f"For example: --server HOST:{DEFAULT_PORT}.")
        return cls(host=found[1], port=port)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Coordinator:
    """Speak to the coordinator over TLS, trusting only the CA that was pinned when the site joined."""

    def __init__(self, home: NodeHome, address: ServerAddress) -> None:
        self.home, self.address = home, address
        self.clock_offset = 0.0  # seconds that the coordinator's clock is ahead of ours

    @classmethod
    def joined(cls, home: NodeHome) -> Coordinator:
        """Return the coordinator that this node has joined.

        Raises:
            EnrolmentError: It has joined none.
        """
        if not home.server_file.exists() or not home.ca_cert.exists():
            raise EnrolmentError("This node has not joined a coordinator.", "Run 'medlsdm-node join --server HOST'.")
        return cls(home, ServerAddress.model_validate_json(home.server_file.read_bytes()))

    def pin(self, expected: str | None, confirm: Callable[[str], bool]) -> None:
        """Fetch the CA and keep it, if its fingerprint is the invitation's or a person confirms it.

        Raises:
            NetworkError: Nobody answers there.
            EnrolmentError: The fingerprint is not the one expected.
        """
        if self.home.ca_cert.exists() and self.home.server_file.exists():
            pinned = ServerAddress.model_validate_json(self.home.server_file.read_bytes())
            if pinned != self.address:
                raise EnrolmentError(
                    f"This node has joined {pinned} already.", "Use that server, or a new node folder (--home)."
                )
            return
        answer = self._send("GET", "/v1/ca", verify=False)
        try:
            found = fingerprint(answer.content)
        except ValueError as error:
            raise NetworkError(f"{self.address} is not a medlsdm coordinator.", "Check host and port.") from error
        if expected is not None and found != expected:
            raise EnrolmentError(
                f"The server at {self.address} is not the one that the invitation names.",
                "Check the address; if it is right, someone may stand in between: call the coordinator.",
            )
        if expected is None and not confirm(found):
            raise EnrolmentError("The server's fingerprint was not confirmed.", "Nothing was sent.")
        write_atomic(self.home.ca_cert, answer.content)
        write_atomic(self.home.server_file, self.address.model_dump_json().encode())

    def unpin(self) -> None:
        """Forget the server after an enrolment that it refused."""
        self.home.ca_cert.unlink(missing_ok=True)
        self.home.server_file.unlink(missing_ok=True)

    def enrol(self, invitation: Invitation | None) -> str:
        """Ask to take part; returns ``admitted`` or ``pending``. Asking again is harmless."""
        identity, site, node_key = self.home.identity, self.home.settings.site, self.home.node_public_key()
        request = EnrolRequest(
            site=site,
            token=invitation.token if invitation else "",
            node_key=node_key,
            identity=public_hex(identity),
            pledge=sign_pledge(identity, fingerprint(self.home.ca_cert.read_bytes()), site, node_key),
        )
        answer = self._send("POST", "/v1/enrol", body=request.model_dump_json().encode(), signed=True, certified=False)
        return self._standing(answer)

    def status(self) -> str:
        """Return ``admitted`` or ``pending``, as the coordinator sees this site; a fresh certificate comes along."""
        return self._standing(self._send("GET", "/v1/site", signed=True, certified=False))

    def _standing(self, answer: httpx.Response) -> str:
        reply = EnrolReply.model_validate_json(answer.content)
        if reply.certificate:
            key = self.home.node_private_pem()
            write_atomic(self.home.tls_file, reply.certificate.encode() + key, mode=0o600)
        return reply.status

    def context(self, *, certified: bool = True) -> ssl.SSLContext:
        """Return a TLS context that trusts the pinned CA alone and, if asked, shows this site's certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=str(self.home.ca_cert))
        if certified and self.home.tls_file.exists():
            try:
                context.load_cert_chain(self.home.tls_file)
            except ssl.SSLError as error:
                raise IntegrityError(f"{self.home.tls_file.name} is damaged.", "Delete it and join again.") from error
        return context

    def learn_clock(self, moment: str | None) -> bool:
        """Take the coordinator's time from its answer; return whether it differs from what was known by seconds."""
        try:
            offset = float(moment or "") - time.time()
        except ValueError:
            return False
        known, self.clock_offset = self.clock_offset, offset if abs(offset) > CLOCK_TOLERANCE_S else 0.0
        return abs(self.clock_offset - known) > CLOCK_TOLERANCE_S

    def models(self) -> list[dict[str, Any]]:
        """Return the coordinator's checkpoints, oldest first."""
        return self._send("GET", "/v1/models", signed=True).json()

    def fetch_model(self, model: str) -> Path:
        """Download a checkpoint that is not here yet, check every digest, and return its folder.

        Raises:
            IntegrityError: The name, which comes from the coordinator, is none of a checkpoint.
        """
        from medlsdm.checkpoints import load_checkpoint

        if not re.fullmatch(CHECKPOINT_ID, model):
            raise IntegrityError("The name of a model is not one that a round gives.", "Nothing was fetched.")
        folder = self.home.models / model
        if (folder / "card.json").exists():
            return folder
        partial = self.home.models / f".{model}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        for name in MODEL_FILES:
            self._fetch(f"/v1/models/{model}/{name}", partial / name, missing_ok=name.startswith("denoiser"))
        try:
            load_checkpoint(partial)
        except IntegrityError:
            for name in MODEL_FILES:  # what was put together from pieces may not fit together
                (partial / name).unlink(missing_ok=True)
            raise
        partial.rename(folder)
        return folder

    def _fetch(self, path: str, file: Path, *, missing_ok: bool) -> None:
        """Download one file piece by piece; a transfer that breaks goes on where it broke."""
        for attempt in range(TRIES):
            have = file.stat().st_size if file.exists() else 0
            try:
                with self._client(certified=True) as client, client.stream(
                    "GET", path, headers=self._signed("GET", path, b"") | {"range": f"bytes={have}-"}
                ) as answer:  # fmt: skip
                    if answer.status_code == 416 or (answer.status_code == 400 and missing_ok):
                        return  # all of it is here, or there is none
                    if answer.status_code not in (200, 206):
                        answer.read()
                        _raise(answer, self.address)
                    _keep(answer, file, "ab" if answer.status_code == 206 else "wb")
                return
            except (httpx.TransportError, NetworkError) as error:
                log.warning("fetching a model broke off (%s); going on", type(error).__name__)
                if attempt == TRIES - 1:
                    raise self._unreachable(error) from error
                time.sleep(2**attempt)

    def _send(
        self, method: str, path: str, *, body: bytes = b"", signed: bool = False, verify: bool = True,
        certified: bool = True,
    ) -> httpx.Response:  # fmt: skip
        answer = None
        for _ in range(2):  # the second time with the coordinator's clock
            headers = self._signed(method, path, body) if signed else {}
            try:
                with self._client(certified=certified, verify=verify) as client:
                    answer = client.request(method, path, content=body, headers=headers)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise self._unreachable(error) from error
            if not (self.learn_clock(answer.headers.get(CLOCK_HEADER)) and answer.status_code == 403):
                break
        assert answer is not None
        if answer.status_code != 200:
            _raise(answer, self.address)
        return answer

    def _client(self, *, certified: bool, verify: bool = True) -> httpx.Client:
        context = self.context(certified=certified) if verify else False
        return httpx.Client(verify=context, base_url=f"https://{self.address}", timeout=SECONDS, trust_env=False)

    def _signed(self, method: str, path: str, body: bytes) -> dict[str, str]:
        now = time.time() + self.clock_offset
        return sign_request(self.home.identity, self.home.settings.site, method, path, body, now=now)

    def _unreachable(self, error: Exception) -> EnrolmentError | NetworkError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            if "expired" in str(error):
                return EnrolmentError(
                    f"The certificate of the server at {self.address} has expired.",
                    "Ask the coordinator to run 'medlsdm-server certificate renew' (or set this machine's clock).",
                )
            return EnrolmentError(
                f"The server at {self.address} shows a certificate that was not issued by its pinned CA.",
                "Someone may stand in between: call the coordinator.",
            )
        return NetworkError(
            f"No coordinator answers at {self.address}.", "Check host, port and firewall, and that it runs."
        )


def _keep(answer: httpx.Response, file: Path, mode: str) -> None:
    try:
        with file.open(mode) as stream:
            for piece in answer.iter_bytes(PIECE_BYTES):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ResourceError(f"{file.name} could not be written ({error.strerror}).", "Check free space.") from error


def _one_line(text: str) -> str:
    """Return what the other side said without anything that could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())


def _raise(answer: httpx.Response, address: ServerAddress) -> None:
    try:
        said = json.loads(answer.content)
        message, hint = (_one_line(str(said[key])) for key in ("message", "hint"))
    except (ValueError, KeyError, TypeError) as error:
        raise NetworkError(
            f"{address} answered with HTTP status {answer.status_code}.", "Is it a medlsdm coordinator?"
        ) from error
    if answer.status_code == 403:
        raise EnrolmentError(message, hint)
    raise IntegrityError(message, hint)
