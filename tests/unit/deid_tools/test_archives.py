"""Zip archives in the source: taken as folders are, or refused with a reason, and nothing written outside."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from deid_tools import archives
from deid_tools.admit import Refusal
from deid_tools.archives import is_archive, unpack
from deid_tools.pipeline import deidentify


def packed(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def opened(path: Path, tmp_path: Path) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
    held: list[tuple[Path, str]] = []
    return unpack(path, tmp_path / "out", lambda name, reason: held.append((name, reason))), held


def refused(path: Path, tmp_path: Path) -> str:
    before = set(tmp_path.rglob("*"))
    with pytest.raises(Refusal) as caught:
        opened(path, tmp_path)
    assert set(tmp_path.rglob("*")) == before
    return caught.value.reason


def test_files_come_under_names_of_our_own(tmp_path):
    path = packed(tmp_path / "x", {"DOE^JANE/1.dcm": b"one", "DOE^JANE/LABELS.NII.GZ": b"two", "empty/": b""})
    files, held = opened(path, tmp_path)
    assert {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in files} == {
        "000000": b"one",
        "000001.nii.gz": b"two",
    }
    assert list(files.values()) == [path / "DOE^JANE/1.dcm", path / "DOE^JANE/LABELS.NII.GZ"]
    assert held == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "C:\\x", "\\\\host\\x"])
def test_a_name_that_points_outside_refuses_the_archive(tmp_path, name):
    assert "outside" in refused(packed(tmp_path / "x.zip", {"a": b"1", name: b"2"}), tmp_path)


def test_an_archive_inside_and_a_link_are_held_one_by_one(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x", b"y")
    path = packed(tmp_path / "x.zip", {"a": b"1", "b.dcm": inner.getvalue()})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    files, held = opened(path, tmp_path)
    assert list(files.values()) == [path / "a"]
    assert {name.name: reason.split(";")[0] for name, reason in held} == {
        "b.dcm": "an archive inside an archive is not opened",
        "link": "symbolic links are not followed",
    }
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_encrypted_archive_is_refused(tmp_path):
    path = packed(tmp_path / "x.zip", {"a": b"1"}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + offset] |= 1
    path.write_bytes(content)
    assert "encrypted" in refused(path, tmp_path)


def test_rare_methods_are_refused(tmp_path):
    assert "rare method" in refused(packed(tmp_path / "x.zip", {"a": b"1" * 99}, zipfile.ZIP_LZMA), tmp_path)


def test_a_bomb_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FREE_BYTES", 1 << 20)
    assert "200 times" in refused(packed(tmp_path / "x.zip", {"a": bytes(8 << 20)}), tmp_path)
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 1 << 20)
    assert "64 GiB" in refused(packed(tmp_path / "y.zip", {"a": bytes(1 << 20), "b": b"1"}), tmp_path)
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 10)
    assert "4 GiB" in refused(packed(tmp_path / "z.zip", {"a": bytes(11)}), tmp_path)
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    assert "entries" in refused(packed(tmp_path / "w.zip", dict.fromkeys("abcd", b"")), tmp_path)


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path):
    path = packed(tmp_path / "x.zip", {"a": bytes(4 << 20)})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = content.find(signature) + offset
        content[at : at + 4] = struct.pack("<I", 100)
    path.write_bytes(content)
    assert "damaged" in refused(path, tmp_path) or "more than it says" in refused(path, tmp_path)


def test_a_list_of_entries_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 1000)
    path = packed(tmp_path / "x.zip", {f"{n:04d}": b"" for n in range(100)})
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert "entries" in refused(path, tmp_path)


def test_a_disk_that_is_too_small_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MIN_FREE_BYTES", sys.maxsize)
    assert "disk" in refused(packed(tmp_path / "x.zip", {"a": b"1"}), tmp_path)


def test_damage_anywhere_is_refused_or_changes_nothing(tmp_path):
    good = packed(tmp_path / "good.zip", {"a": b"first " * 50, "b": b"second " * 50}).read_bytes()
    (tmp_path / "good.zip").unlink()
    whole = [b"first " * 50, b"second " * 50]
    for at in range(len(good)):
        for content in (good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :], good[:at]):
            path = tmp_path / "x.zip"
            path.write_bytes(content)
            if not is_archive(path):
                continue
            try:
                files, held = opened(path, tmp_path)
            except Refusal:
                assert not (tmp_path / "out").exists()
                continue
            assert held or [p.read_bytes() for p in files] == whole
            shutil.rmtree(tmp_path / "out")


def test_an_empty_archive_is_refused(tmp_path):
    assert "empty" in refused(packed(tmp_path / "x.zip", {}), tmp_path)
    assert "empty" in refused(packed(tmp_path / "x.zip", {"a/": b""}), tmp_path)


def test_what_only_looks_like_an_archive(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04" + bytes(300))
    assert "damaged" in refused(tmp_path / "x", tmp_path)
    (tmp_path / "y").write_bytes(b"PKzip")
    assert not is_archive(tmp_path / "y")
    assert not is_archive(tmp_path / "none")


def test_a_study_in_an_archive_is_de_identified_as_a_folder_is(tmp_path, study, keys, schema):
    plain = deidentify(study.source, tmp_path / "plain", keys, schema=schema)
    source = tmp_path / "packed"
    source.mkdir()
    shutil.make_archive(str(source / "Northgate"), "zip", study.source)
    (source / "Northgate.zip").rename(source / "study with any name")
    (source / "bad.zip").write_bytes(b"PK\x03\x04" + bytes(300))
    report = deidentify(source, tmp_path / "out", keys, schema=schema)
    assert report.series == plain.series
    assert report.reasons() == plain.reasons() | {"the archive is damaged or cut short": 1}
    for path in (tmp_path / "plain").rglob("*.dcm"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "plain")).read_bytes(), path.name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "plain").iterdir()
    )
    assert [h.path for h in report.held if "damaged" in h.reason] == [source / "bad.zip"]
