"""The node's side of the coordinator's door: trust, enrolment, and fetching models."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from medlsdm.checks import write_atomic
from medlsdm.errors import EnrolmentError, IntegrityError, NetworkError, UsageError
from medlsdm.federation.identity import EnrolRequest, Invitation, fingerprint, public_hex, sign_request
from medlsdm.federation.plan import CHECKPOINT_ID
from medlsdm_node.home import NodeHome

DEFAULT_PORT = 8443
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
        request = EnrolRequest(
            site=self.home.settings.site,
            token=invitation.token if invitation else "",
            node_key=self.home.node_public_key(),
            identity=public_hex(self.home.identity),
        )
        answer = self._send("POST", "/v1/enrol", body=request.model_dump_json().encode(), signed=True)
        return str(answer.json()["status"])

    def status(self) -> str:
        """Return ``admitted`` or ``pending``, as the coordinator sees this site."""
        return str(self._send("GET", "/v1/site", signed=True).json()["status"])

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
            answer = self._send(
                "GET", f"/v1/models/{model}/{name}", signed=True, missing_ok=name.startswith("denoiser")
            )
            if answer.status_code == 200:
                write_atomic(partial / name, answer.content)
        load_checkpoint(partial)
        partial.rename(folder)
        return folder

    def _send(
        self, method: str, path: str, *, body: bytes = b"", signed: bool = False, verify: bool = True,
        missing_ok: bool = False,
    ) -> httpx.Response:  # fmt: skip
        context = ssl.create_default_context(cafile=str(self.home.ca_cert)) if verify else False
        headers = sign_request(self.home.identity, self.home.settings.site, method, path, body) if signed else {}
        try:
            with httpx.Client(verify=context, timeout=60, trust_env=False) as client:
                answer = client.request(method, f"https://{self.address}{path}", content=body, headers=headers)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise EnrolmentError(
                    f"The server at {self.address} shows a certificate that was not issued by its pinned CA.",
                    "Someone may stand in between: call the coordinator.",
                ) from error
            raise NetworkError(
                f"No coordinator answers at {self.address}.", "Check host, port and firewall, and that it runs."
            ) from error
        if answer.status_code == 200 or missing_ok:
            return answer
        _raise(answer, self.address)
        return answer


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
