"""Who is who: invitations, certificate fingerprints, signed requests.

A site has two keys, both made on its own machine: an Ed25519 identity that signs requests and receipts,
and the EC P-384 key with which Flower's SuperNode authenticates.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Mapping

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.errors import EnrolmentError

CLOCK_SKEW_S = 300
SITE_HEADER, TIME_HEADER, SIGNATURE_HEADER = "x-medlsdm-site", "x-medlsdm-time", "x-medlsdm-signature"
INVITATION_PREFIX = "medlsdm-invitation-1:"
SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,31}$"


class Invitation(BaseModel):
    """Carry a one-time token and the fingerprint of the coordinator's CA; a secret, kept in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str = Field(pattern=SITE_NAME)
    token: str = Field(min_length=20, repr=False)
    ca: str = Field(pattern=r"^[0-9a-f]{64}$")
    expires: int

    @classmethod
    def new(cls, site: str, ca: str, valid_hours: float) -> Invitation:
        """Draw a fresh token."""
        return cls(site=site, token=secrets.token_urlsafe(32), ca=ca, expires=int(time.time() + valid_hours * 3600))

    @property
    def token_digest(self) -> str:
        """Return what the coordinator keeps instead of the token."""
        return hashlib.sha256(self.token.encode()).hexdigest()

    def encode(self) -> str:
        """Return one line of text to hand to the hospital."""
        return INVITATION_PREFIX + base64.urlsafe_b64encode(self.model_dump_json().encode()).decode()

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """Read such a line.

        Raises:
            EnrolmentError: It is not an invitation, or was cut short.
        """
        try:
            body = text.strip()
            if not body.startswith(INVITATION_PREFIX):
                raise ValueError("prefix")
            return cls.model_validate_json(base64.urlsafe_b64decode(body.removeprefix(INVITATION_PREFIX)))
        except (ValueError, ValidationError) as error:
            raise EnrolmentError(
                "This is not a medlsdm invitation, or it was cut short.", "Ask the coordinator for the whole line."
            ) from error


class EnrolRequest(BaseModel):
    """Ask to take part. ``token`` is empty when the site has no invitation and waits to be admitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str = Field(pattern=SITE_NAME)
    token: str = Field(default="", repr=False, max_length=200)
    node_key: str = Field(max_length=1000, description="EC P-384 public key, OpenSSH form")
    identity: str = Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519 public key, hex")


class EnrolReply(BaseModel):
    """Say whether the site may connect now (``admitted``) or waits for the coordinator (``pending``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str
    status: str


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a PEM certificate's DER form, in hex."""
    return hashlib.sha256(x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)).hexdigest()


def shown(digest: str) -> str:
    """Return a fingerprint in groups of four, for people to compare."""
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half in hex."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _message(site: str, moment: str, method: str, path: str, body: bytes) -> bytes:
    fields = ["medlsdm-request-1", site, moment, method.upper(), path, hashlib.sha256(body).hexdigest()]
    return json.dumps(fields).encode()


def sign_request(key: Ed25519PrivateKey, site: str, method: str, path: str, body: bytes = b"") -> dict[str, str]:
    """Return the headers that prove who asks, for one request at this moment."""
    moment = str(int(time.time()))
    signature = key.sign(_message(site, moment, method, path, body))
    return {SITE_HEADER: site, TIME_HEADER: moment, SIGNATURE_HEADER: signature.hex()}


def verify_request(
    identity: str, headers: Mapping[str, str], method: str, path: str, body: bytes = b"", *, now: float | None = None
) -> None:
    """Check the headers against a site's public key (hex).

    Raises:
        EnrolmentError: The signature is wrong, or older or newer than five minutes.
    """
    try:
        moment = headers[TIME_HEADER]
        if abs((time.time() if now is None else now) - int(moment)) > CLOCK_SKEW_S:
            raise EnrolmentError("The request is not of this moment.", "Set the clocks of both machines.")
        message = _message(headers[SITE_HEADER], moment, method, path, body)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity)).verify(
            bytes.fromhex(headers[SIGNATURE_HEADER]), message
        )
    except (KeyError, ValueError, InvalidSignature) as error:
        raise EnrolmentError("The request is not signed by an enrolled site.", "Enrol the site first.") from error
