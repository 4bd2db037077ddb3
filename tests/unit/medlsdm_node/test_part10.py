"""Who an instance is, against pydicom on whole files, and on nonsense."""

from __future__ import annotations

import io

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm_node.part10 import Identity, identify, is_uid, meta_end

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
EXPLICIT, IMPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"


def written(syntax: str = EXPLICIT, **changed: str) -> bytes:
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4", "1.2.3"
    ds.PatientName, ds.InstanceNumber = "Planted^Name", 1
    for keyword, value in changed.items():
        setattr(ds, keyword, value)
    with io.BytesIO() as stream:
        ds.save_as(stream, enforce_file_format=True)
        return stream.getvalue()


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, "1.2.840.10008.1.2.2"])
def test_an_instance_says_who_it_is_as_pydicom_reads_it(syntax):
    content = written(syntax)
    assert identify(content) == Identity(syntax, "1.2.3.4", "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4", "1.2.3")
    whole = pydicom.dcmread(io.BytesIO(content))
    assert content[meta_end(content) :].startswith(b"\x08\x00" if syntax != "1.2.840.10008.1.2.2" else b"\x00\x08")
    assert whole.SOPInstanceUID == "1.2.3.4"


def test_a_deflated_data_set_is_not_unpacked():
    content = written()
    at = content.index(EXPLICIT.encode())
    meta = content[:at] + DEFLATED.encode() + content[at + len(EXPLICIT) :]  # the lengths are wrong by three: no UID
    assert identify(meta).sop == ""
    assert identify(written(DEFLATED)) == Identity(DEFLATED)


def test_what_is_no_file_says_nothing():
    content = written()
    for wrong in (b"", content[:140], content[:200], b"x" * 1000, content.replace(b"DICM", b"DICN")):
        assert identify(wrong) == Identity()


@pytest.mark.parametrize(
    ("text", "right"),
    [("1.2.3", True), ("0", True), ("1." + "2" * 62, True), ("1." + "2" * 63, False), ("1..2", False), ("", False)]
    + [(wrong, False) for wrong in ("1.2.", ".1", "1.2/3", "1.2\n", "../1", "1.2 ", "\uff11.2")],
)
def test_a_uid_is_digits_and_dots(text, right):
    assert is_uid(text) is right


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_beginning_of_a_file_brings_it_down(data):
    content = bytearray(written())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(128, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    found = identify(content[: data.draw(st.integers(0, len(content)))])
    assert all(
        uid == "" or is_uid(uid) for uid in (found.syntax, found.media_sop, found.sop_class, found.sop, found.study)
    )
