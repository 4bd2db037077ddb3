"""A PACS that is read over DICOMweb: searched by QIDO-RS (dicomweb-client), fetched by WADO-RS as a stream.

TLS unless the archive is on loopback, its certificate verified, no redirect followed, no proxy or .netrc of the
environment used, every answer bounded. What the archive says, and the UIDs of a request, reach no log and no error.
Source: DICOM PS3.18, sections 8.3.4, 10.4 and 10.6.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml
from dicomweb_client import DICOMwebClient
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from deid_tools.crew import time_limit
from medlsdm.errors import ConfigError, DataError, NetworkError, UsageError
from medlsdm_node.multipart import MultipartReader, boundary_of, parse_type
from medlsdm_node.part10 import is_uid
from medlsdm_node.web_server import READ_BYTES, Pace

CONNECT_SECONDS, READ_SECONDS = 15.0, 120.0
SILENCE_SECONDS = 180.0  # without a byte of content, whatever else comes: interim answers, headers, trailers
SEARCH_ATTEMPTS, PAUSE_SECONDS = 3, 0.5
BUSY = (429, 502, 503, 504)
PAGE = 200
MAX_SEARCH_BYTES = 64 << 20  # one page of an answer in JSON
MAX_ROWS = 1_000_000
STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
TOKEN_VARIABLE, USER_VARIABLE, PASSWORD_VARIABLE = (
    "MEDLSDM_PULL_TOKEN",
    "MEDLSDM_PULL_USER",
    "MEDLSDM_PULL_PASSWORD",
)


class Credentials(BaseModel):
    """Hold what we show to the archive: a bearer token, a user and password, or a certificate; perhaps nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    token: SecretStr | None = None
    user: str = ""
    password: SecretStr | None = None
    certificate: Path | None = None
    key: Path | None = None


def read_credentials(file: Path | None, environment: Mapping[str, str]) -> Credentials:
    """Read credentials from a YAML file, else from the environment; nothing where neither has them.

    Raises:
        ConfigError: The file does not read, or others may read it.
    """
    if file is None:
        password = environment.get(PASSWORD_VARIABLE)
        token = environment.get(TOKEN_VARIABLE)
        return Credentials(
            token=SecretStr(token) if token else None,
            user=environment.get(USER_VARIABLE, ""),
            password=SecretStr(password) if password else None,
        )
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError("Others may read the file with the credentials.", "Run: chmod 600 on it.")
        return Credentials.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError):
        hint = "Write lines such as 'token: ...', or 'user: ...' and 'password: ...'."
        raise ConfigError("The file with the credentials cannot be read.", hint) from None  # its text is the secret


def check_address(url: str) -> str:
    """Return the address of an archive without a slash at its end.

    Raises:
        UsageError: It is not https (http on loopback), or holds credentials, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("https", "http") or parts.query or parts.fragment:
        raise UsageError("--from takes the address of a DICOMweb service.", "For example https://pacs/dicom-web.")
    if parts.username is not None or parts.password is not None:
        raise UsageError("An address is no place for credentials.", "Give --credentials FILE, or the environment.")
    if parts.scheme == "http" and not _is_loopback(host):
        raise UsageError("Without TLS the archive must be on this machine.", "Use https.")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Archive:
    """Open an archive.

    Args:
        url: The service's address, such as ``https://pacs/dicom-web``.
        credentials: What we show to it.
        ca: The CA that its certificate must come from; without one, those that everybody trusts.

    Raises:
        UsageError: The address is none.
        ConfigError: A file cannot be used.
    """

    def __init__(self, url: str, credentials: Credentials, ca: Path | None = None) -> None:
        self.url = check_address(url)
        _silence()
        for file in (ca, credentials.certificate, credentials.key):
            if file is not None and not file.is_file():
                raise ConfigError("A certificate or key for the archive is missing.", "Check --ca and --credentials.")
        self._session = _session(credentials, ca)
        try:
            self._client = DICOMwebClient(self.url, session=self._session, timeout=(CONNECT_SECONDS, READ_SECONDS))
        except ValueError:
            raise UsageError("--from takes the address of a DICOMweb service.", "Give a host by its name.") from None
        self._client.set_http_retry_params(retry=False)  # the session does, and says nothing of it

    @property
    def host(self) -> str:
        """Return host and port, for the audit log."""
        return urlsplit(self.url).netloc

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def studies(self, filters: dict[str, str]) -> Iterator[str]:
        """Yield the Study Instance UIDs that match."""
        search: Callable[..., list[Any]] = self._client.search_for_studies
        for (study,) in self._rows((STUDY,), search, search_filters=filters):
            yield study

    def instances(self, study: str) -> Iterator[tuple[str, str]]:
        """Yield series and SOP Instance UID of every instance of a study."""
        search: Callable[..., list[Any]] = self._client.search_for_instances
        for row in self._rows((SERIES, INSTANCE), search, study_instance_uid=study):
            yield row[0], row[1]

    def _rows(
        self, tags: tuple[str, ...], search: Callable[..., list[Any]], **wanted: Any
    ) -> Iterator[tuple[str, ...]]:
        """Yield the UIDs of each row, page by page, until a page brings nothing new."""
        seen: set[tuple[str, ...]] = set()
        offset = 0
        while offset < MAX_ROWS:
            page = _searched(lambda at=offset: search(limit=PAGE, offset=at, **wanted))
            if not isinstance(page, list):
                raise DataError("The archive's answer is not a list.", "Check --from.")
            found = dict.fromkeys(_uids(row, tags) for row in page)
            new = [row for row in found if row not in seen]
            if not new:
                return
            yield from new
            seen.update(new)
            offset += len(page)
        raise DataError("The archive's answer has no end.", "Ask for less, with --date for example.")

    @contextmanager
    def fetch(self, study: str, series: str, instance: str) -> Iterator[Iterator[bytes]]:
        """Open one instance; its DICOM file comes in pieces, in the transfer syntax in which the archive has it.

        Raises:
            NetworkError: The archive cannot be reached, refuses, or breaks off.
            DataError: What it sends is not one instance.
        """
        url = f"{self.url}/studies/{study}/series/{series}/instances/{instance}"
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        with (
            _told(),
            self._session.get(
                url, headers={"accept": accept}, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)
            ) as answer,
        ):
            answer.raise_for_status()
            kind = answer.headers.get("content-type", "")
            if parse_type(kind)[0] == "application/dicom":  # some archives send it unwrapped
                yield answer.iter_content(READ_BYTES)
                return
            parts = MultipartReader(answer.iter_content(READ_BYTES), boundary_of(kind), 1).parts()
            part = next(parts, None)
            if part is None:
                raise DataError("The archive sent nothing for an instance.")
            yield part.content
            for _ in parts:  # there is no second one, or the reader says so
                continue


def _uids(row: Any, tags: tuple[str, ...]) -> tuple[str, ...]:
    try:
        found = tuple(str(row[tag]["Value"][0]) for tag in tags)
    except (KeyError, TypeError, IndexError):
        found = ("",)
    if not all(is_uid(uid) for uid in found):
        raise DataError("The archive's answer names something that is no UID.", "Ask who runs the archive.")
    return found


def _searched(search: Callable[[], Any]) -> Any:
    """Search, again after a moment where the archive is busy: urllib3 would read that answer, which may have no end."""
    for attempt in range(SEARCH_ATTEMPTS):
        try:
            with _told():
                return search()
        except _BusyArchive:
            if attempt + 1 == SEARCH_ATTEMPTS:
                raise
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


class _BusyArchive(NetworkError):
    """Say that the archive asks to come again."""


class _Silent(Exception):
    """End a request that brings no content. No OSError: urllib3 would take it for a broken line, and ask again."""


def _content_came() -> None:
    """Begin to count the silence anew, where it is counted."""
    if threading.current_thread() is threading.main_thread() and signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, SILENCE_SECONDS)


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the libraries raise, which quotes addresses and answers, into errors of our own."""
    try:
        with time_limit(SILENCE_SECONDS, _Silent()):
            yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise NetworkError("The archive does not accept us.", "Check the credentials.") from None
        kind = _BusyArchive if status in BUSY else NetworkError
        raise kind(f"The archive answered with status {status}.", "Check --from, or try again.") from None
    except requests.exceptions.SSLError:
        raise NetworkError("The archive's certificate is not trusted.", "Give its CA by --ca FILE.") from None
    except requests.TooManyRedirects:
        raise NetworkError("The archive sends us elsewhere.", "Give the right address by --from.") from None
    except (requests.exceptions.JSONDecodeError, RecursionError):
        raise DataError("The archive's answer is not JSON.", "Check --from.") from None
    except (requests.RequestException, TimeoutError, _Silent):
        raise NetworkError("The archive cannot be reached, or broke off.", "Try again: what is here stays.") from None
    except ValueError:  # such as a number of five thousand digits in JSON
        raise DataError("The archive's answer cannot be read.", "Ask who runs the archive.") from None


class _Watched:
    """Stand for the body of an answer: bounded in size where it is JSON, and in time."""

    def __init__(self, raw: Any, limit: int | None) -> None:
        self._raw, self._limit = raw, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, amount: int = READ_BYTES, decode_content: bool | None = None) -> Iterator[bytes]:
        """Yield the body, as urllib3 does; what is left of it is not wanted once the reader stops."""
        pace, since = Pace(READ_SECONDS), time.monotonic()
        try:
            for piece in self._raw.stream(amount, decode_content=decode_content):
                pace.note(time.monotonic() - since, len(piece))
                pace.patience()
                if self._limit is not None and pace.bytes > self._limit:
                    raise DataError("The archive's answer is too long.", "Ask for less, with --date for example.")
                _content_came()
                yield piece
                since = time.monotonic()
        except BaseException:
            self._raw.close()
            raise


def _session(credentials: Credentials, ca: Path | None) -> requests.Session:
    session = requests.Session()
    session.trust_env, session.max_redirects = False, 0
    session.verify = str(ca) if ca else True
    session.headers["accept-encoding"] = "identity"
    if credentials.token:
        session.headers["authorization"] = f"Bearer {credentials.token.get_secret_value()}"
    elif credentials.user:
        password = credentials.password.get_secret_value() if credentials.password else ""
        session.auth = (credentials.user, password)
    if credentials.certificate:
        key = credentials.key or credentials.certificate
        session.cert = (str(credentials.certificate), str(key))
    retry = Retry(3, redirect=False, status=0, backoff_factor=0.5, respect_retry_after_header=False)
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))

    def watch(answer: requests.Response, *_: Any, **__: Any) -> None:
        if answer.is_redirect:  # requests would read its content, which has no limit, before it refuses
            answer.close()
            raise requests.TooManyRedirects
        wants_json = "json" in str(answer.request.headers.get("accept", ""))
        answer.raw = _Watched(answer.raw, MAX_SEARCH_BYTES if wants_json else None)

    session.hooks["response"].append(watch)
    return session


def _silence() -> None:
    """Keep the libraries from logging addresses and headers, whatever the program's logging is."""
    for name in ("dicomweb_client", "urllib3", "requests"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
