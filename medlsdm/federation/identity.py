"""Who is who: invitations, certificate fingerprints, signed requests.

A site has two keys, both made on its own machine: an Ed25519 identity that signs requests and receipts,
and the EC P-384 key with which Flower's SuperNode authenticates.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
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
NONCE_HEADER, BODY_HEADER = "x-medlsdm-nonce", "x-medlsdm-body"
ACTIVITY_HEADER = "x-medlsdm-activity"  # what a node does, beside its signed request
CLOCK_HEADER = "x-medlsdm-clock"  # the coordinator's time, in its answers
MOST_NONCES = 200_000
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
    pledge: str = Field(default="", pattern=r"^([0-9a-f]{128})?$", description="see sign_pledge")


class RosterEntry(BaseModel):
    """Name one hospital that takes part, in its own words: others verify the pledge, not the coordinator's list."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str = Field(pattern=SITE_NAME)
    identity: str = Field(pattern=r"^[0-9a-f]{64}$")
    node_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the node key's OpenSSH text")
    pledge: str = Field(pattern=r"^[0-9a-f]{128}$")


class EnrolReply(BaseModel):
    """Say whether the site may connect now (``admitted``) or waits for the coordinator (``pending``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str
    status: str
    certificate: str = Field(default="", description="the site's client certificate, PEM, once it is admitted")


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a PEM certificate's DER form, in hex."""
    return hashlib.sha256(x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)).hexdigest()


def shown(digest: str) -> str:
    """Return a fingerprint in groups of four, for people to compare."""
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half in hex."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


class OddRequestError(EnrolmentError):
    """Say that the headers of a request are of no form that a site of ours sends."""


class NonceCache:
    """Remember which signed requests were used, so that each is good once. Safe for threads, of bounded size."""

    def __init__(self, most: int = MOST_NONCES) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._until: dict[tuple[str, str], float] = {}  # in the order of their ends

    def use(self, site: str, nonce: str, now: float) -> bool:
        """Return whether the nonce is new, and remember it for as long as its request could be valid."""
        with self._lock:
            for key in list(self._until):
                if self._until[key] > now:
                    break
                del self._until[key]
            if (site, nonce) in self._until or len(self._until) >= self.most:
                return False
            self._until[site, nonce] = now + 2 * CLOCK_SKEW_S
            return True


def _message(site: str, moment: str, nonce: str, method: str, path: str, body: str) -> bytes:
    return json.dumps(["medlsdm-request-2", site, moment, nonce, method.upper(), path, body]).encode()


def sign_request(
    key: Ed25519PrivateKey, site: str, method: str, path: str, body: bytes = b"", *, now: float | None = None
) -> dict[str, str]:
    """Return the headers that prove who asks, for one request at this moment. ``now`` corrects a clock that is off."""
    moment = str(int(time.time() if now is None else now))
    nonce, digest_ = secrets.token_hex(16), hashlib.sha256(body).hexdigest()
    signature = key.sign(_message(site, moment, nonce, method, path, digest_))
    return {
        SITE_HEADER: site,
        TIME_HEADER: moment,
        NONCE_HEADER: nonce,
        BODY_HEADER: digest_,
        SIGNATURE_HEADER: signature.hex(),
    }


_FORMS = {
    SITE_HEADER: re.compile(SITE_NAME),
    TIME_HEADER: re.compile(r"[0-9]{1,12}"),
    NONCE_HEADER: re.compile(r"[0-9a-f]{32}"),
    BODY_HEADER: re.compile(r"[0-9a-f]{64}"),
    SIGNATURE_HEADER: re.compile(r"[0-9a-f]{128}"),
}


def check_form(headers: Mapping[str, str]) -> None:
    """Raise OddRequestError for headers of another form than a site sends, EnrolmentError where they are missing."""
    if any(name in headers and not form.fullmatch(headers[name]) for name, form in _FORMS.items()):
        raise OddRequestError("The headers of the request are odd.", "Install the same release.")
    if not all(name in headers for name in _FORMS):
        raise EnrolmentError("The request is not signed by an enrolled site.", "Enrol the site first.")


def verify_request(
    identity: str, headers: Mapping[str, str], method: str, path: str, *, body: bytes | None = None,
    now: float | None = None, seen: NonceCache | None = None,
) -> str:  # fmt: skip
    """Check the headers against a site's public key (hex), before the body is read.

    Args:
        identity: The site's Ed25519 key, hex.
        headers: Of the request.
        method: Of the request.
        path: Of the request.
        body: Checked too, where it is at hand.
        now: The moment, else that of this machine's clock.
        seen: The requests that were used; this one is added.

    Returns:
        The SHA-256 that the body must have, for ``check_body``.

    Raises:
        OddRequestError: The headers are of another form.
        EnrolmentError: The signature is wrong, older or newer than five minutes, or was used.
    """
    check_form(headers)
    fields = {name: headers.get(name, "") for name in _FORMS}
    now = time.time() if now is None else now
    ahead = int(fields[TIME_HEADER]) - now
    site, moment, nonce, digest = (fields[n] for n in (SITE_HEADER, TIME_HEADER, NONCE_HEADER, BODY_HEADER))
    message = _message(site, moment, nonce, method, path, digest)
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity))
        key.verify(bytes.fromhex(fields[SIGNATURE_HEADER]), message)
    except (ValueError, InvalidSignature) as error:
        raise EnrolmentError("The request is not signed by an enrolled site.", "Enrol the site first.") from error
    if abs(ahead) > CLOCK_SKEW_S:
        side = "ahead of" if ahead > 0 else "behind"
        raise EnrolmentError(
            f"The site's clock is {abs(ahead):.0f} s {side} the coordinator's.", "Set the clocks of both machines."
        )
    if seen is not None and not seen.use(fields[SITE_HEADER], fields[NONCE_HEADER], now):
        raise EnrolmentError("The request was used before.", "Send a new one.")
    if body is not None:
        check_body(fields[BODY_HEADER], body)
    return fields[BODY_HEADER]


def check_body(expected: str, body: bytes) -> None:
    """Raise EnrolmentError unless the body has the SHA-256 that was signed."""
    if hashlib.sha256(body).hexdigest() != expected:
        raise EnrolmentError("The request's body is not the one that was signed.", "Send it again.")


def node_digest(node_key: str) -> str:
    """Return the SHA-256 of a node key, without the comment that may follow it."""
    return hashlib.sha256(" ".join(node_key.split()[:2]).encode()).hexdigest()


def sign_pledge(key: Ed25519PrivateKey, ca: str, site: str, node_key: str) -> str:
    """Return a site's own word, hex, that it takes part in the federation of this CA (fingerprint) with this key."""
    return key.sign(_pledge(ca, site, public_hex(key), node_digest(node_key))).hex()


def verify_pledge(entry: RosterEntry, ca: str) -> bool:
    """Tell whether a roster's entry was signed by the identity that it names, for the federation of this CA."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(entry.identity))
        key.verify(bytes.fromhex(entry.pledge), _pledge(ca, entry.site, entry.identity, entry.node_digest))
    except (ValueError, InvalidSignature):
        return False
    return True


def _pledge(ca: str, site: str, identity: str, node: str) -> bytes:
    return json.dumps(["medlsdm-roster-1", ca, site, identity, node]).encode()
