"""The multipart reader against the standard library's writer, against pieces of any size, and against nonsense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm.errors import DataError
from medlsdm_node.multipart import MAX_HEAD_BYTES, MultipartReader, boundary_of

DICOM = b"Content-Type: application/dicom\r\n"


def body(parts: list[bytes], boundary: bytes = b"b", heads: bytes = DICOM) -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + heads + b"\r\n" + part + b"\r\n" for part in parts) + (
        b"--" + boundary + b"--\r\n"
    )


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def read(content: bytes, boundary: bytes = b"b", size: int = 1 << 16, max_parts: int = 100) -> list[bytes]:
    reader = MultipartReader(pieces(content, size), boundary, max_parts)
    return [b"".join(part.content) for part in reader.parts()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5), st.integers(1, 50), st.binary(max_size=20))
def test_what_was_written_is_read_whatever_the_pieces(parts, size, before):
    parts = [part.replace(b"--b", b"") for part in parts]
    before = before.replace(b"--b", b"") + b"\r\n" if before else b""
    assert read(before + body(parts), size=size) == parts


def test_the_standard_librarys_writer_is_read():
    message = MIMEMultipart("related", boundary="=_x:1")
    contents = [b"one\r\nline", b"--=_x:2", b""]
    for content in contents:
        part = MIMEApplication(content, "dicom", _encoder=lambda _: None)
        part["Content-Transfer-Encoding"] = "binary"
        message.attach(part)
    written = message.as_bytes(policy=message.policy.clone(linesep="\r\n", cte_type="8bit"))
    reader = MultipartReader(iter([written.partition(b"\r\n\r\n")[2]]), b"=_x:1", 9)
    found = [(part.is_dicom, b"".join(part.content)) for part in reader.parts()]
    assert found == [(True, content) for content in contents]


def test_what_the_caller_leaves_of_a_part_is_passed_over():
    reader = MultipartReader(pieces(body([b"a" * 1000, b"second"]), 7), b"b", 9)
    seen = []
    for number, part in enumerate(reader.parts()):
        seen.append(next(iter(part.content)) if number == 0 else b"".join(part.content))
    assert seen[1] == b"second"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "ends before"),
        (b"no boundary at all", "ends before"),
        (body([b"x"])[:-4], "ends before"),
        (body([b"x"])[:20], "ends before"),
        (b"y" * (MAX_HEAD_BYTES + 9) + body([b"x"]), "does not begin"),
        (b"--bx\r\n\r\nx\r\n--b--", "begins like its boundary"),
        (body([b"x\r\n--bc\r\ny"]), "begins like its boundary"),
        (body([b"x"], heads=b"a: " + b"x" * MAX_HEAD_BYTES + b"\r\n"), "too long"),
        (b"--b" + b" " * 9999 + b"\r\n", "too long"),
        (body([b"x"], heads=b"no colon\r\n"), "do not read"),
        (body([b"x"], heads=b"a: 1\r\n folded\r\n"), "do not read"),
        (body([b"x"], heads=b"a: \xff\r\n"), "do not read"),
        (body([b"x"], heads=b"a: 1\r\nA: 2\r\n"), "do not read"),
        (body([b"x"], heads=b"Content-Length: 2\r\n"), "length"),
        (body([b"x"], heads=b"Content-Length: -1\r\n"), "length"),
        (body([b"x"] * 101), "too many parts"),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 1 << 16])
def test_a_body_that_is_not_right_is_refused(content, why, size):
    with pytest.raises(DataError, match=why):
        read(content, size=size)


def test_a_right_length_and_blanks_after_a_delimiter_are_taken():
    assert read(body([b"xy"], heads=b"Content-Length: 2\r\n")) == [b"xy"]
    assert read(b"--b \t\r\n\r\nx\r\n--b--") == [b"x"]
    assert read(b"--b--") == []


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (DICOM, True),
        (b"content-TYPE: Application/DICOM; transfer-syntax=1.2.840.10008.1.2.1\r\n", True),
        (b"Content-Type: multipart/related; boundary=c\r\n", False),
        (b"Content-Type: application/dicom+json\r\n", False),
        (DICOM + b"Content-Transfer-Encoding: base64\r\n", False),
        (b"", False),
    ],
)
def test_only_dicom_as_it_is_counts_as_dicom(head, expected):
    (found,) = [part.is_dicom for part in MultipartReader(iter([body([b"x"], heads=head)]), b"b", 9).parts()]
    assert found is expected


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/dicom",
        "multipart/related",
        'multipart/related; type="application/dicom"; boundary=',
        "multipart/related; type=application/dicom; boundary=" + "x" * 201,
        'multipart/related; type="application/dicom+json"; boundary=b',
        "multipart/form-data; boundary=b",
        'multipart/related; type="application/dicom"; boundary="a\x00b"',
    ],
)
def test_a_content_type_without_what_it_takes_is_refused(kind):
    with pytest.raises(DataError):
        boundary_of(kind)


def test_the_boundary_is_found_quoted_or_not():
    assert boundary_of('Multipart/Related; type="application/dicom"; boundary="a b:c"') == b"a b:c"
    assert boundary_of("multipart/related;boundary=abc;type=application/dicom;start=x") == b"abc"


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(max_codepoint=255), max_size=80))
def test_no_content_type_brings_it_down(text):
    with suppress(DataError):
        assert boundary_of("multipart/related; boundary=" + text.replace("\r", "").replace("\n", ""))


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_mutated_body_is_read_or_refused_and_never_more_than_came(data):
    whole = body([b"one" * 9, b"two\r\n--\r\n"], heads=DICOM + b"Content-Length: %d\r\n" % 27)
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.sampled_from(
            [b"", b"\r\n", b"--b", b"--", b"\0", b"\r\n--b\r\n", b"\xff" * 9, b":"]))  # fmt: skip
    try:
        found = read(bytes(content), size=data.draw(st.integers(1, 40)))
    except DataError:
        return
    assert sum(map(len, found)) <= len(content)
