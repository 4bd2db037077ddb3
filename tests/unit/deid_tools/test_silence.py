from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pydicom
import pytest

from deid_tools.pipeline import deidentify
from deid_tools.silence import silence


def spoil(path: Path) -> None:
    """Put a value of a wrong form where the program must read: the library warns of it and quotes it."""
    content = path.read_bytes()
    ds = pydicom.dcmread(path)
    uid = str(ds.FrameOfReferenceUID).encode()
    changed = content.replace(uid, b"Dekeloza^Anna".ljust(len(uid), b"x"))
    assert changed != content
    path.write_bytes(changed)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_value_of_a_damaged_file_is_printed_warned_of_or_logged(study, tmp_path, keys, capfd, caplog, workers):
    images = sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)
    spoil(images[3])
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        str(pydicom.dcmread(images[3]).FrameOfReferenceUID)
        assert any("Dekeloza" in str(w.message) for w in warned)  # the library does say it
        caplog.clear()
        warned.clear()
        deidentify(study.source, tmp_path / "out", keys, workers=workers)
        assert [str(w.message) for w in warned] == []
    said = capfd.readouterr()
    assert "Dekeloza" not in said.out + said.err + caplog.text
    assert (said.out, said.err) == ("", "")


def test_what_was_set_before_is_set_again():
    logger = logging.getLogger("pydicom")
    before = logger.level
    with silence():
        assert not logger.isEnabledFor(logging.CRITICAL)
        warnings.warn("nothing", UserWarning, stacklevel=1)
    assert logger.level == before
    with pytest.warns(UserWarning, match="something"):
        warnings.warn("something", UserWarning, stacklevel=1)
