from __future__ import annotations

import os
import shutil
import stat

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medlsdm.errors import DataError, IntegrityError, NotSyntheticError
from medlsdm.types import Geometry, SemanticMap
from medlsdm_node.vault import MAP, PAIR, SYNTHETIC, Vault

from .conftest import new_home

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sealed(vault, kind, name):
    return vault.home.vault / kind / f"{name}.sealed"


def test_a_pair_comes_back_as_it_was(vault, pair):
    vault.put_pair("P-0123.S-1", *pair)
    ((scan, labels),) = list(vault.pairs())
    np.testing.assert_array_equal(scan.array, pair[0].array)
    np.testing.assert_array_equal(labels.array, pair[1].array)
    np.testing.assert_array_equal(scan.geometry.affine, pair[0].geometry.affine)
    assert (scan.modality, scan.subject) == (pair[0].modality, "P-0123")
    assert labels.schema.digest == pair[1].schema.digest
    assert vault.subjects() == {"P-0123"}


def test_a_synthetic_volume_comes_back_as_it_was(vault, pair, synthetic):
    vault.put_synthetic("a1", synthetic, pair[1])
    volume, labels = vault.synthetic("a1")
    np.testing.assert_array_equal(volume.array, synthetic.array)
    assert volume.provenance == synthetic.provenance
    assert labels.digest == pair[1].digest


@quick
@given(content=st.binary(max_size=300), name=st.from_regex(r"[A-Za-z0-9._-]{1,120}", fullmatch=True))
def test_any_bytes_come_back_under_their_name(vault, content, name):
    vault.put(PAIR, name, content)
    assert vault.get(PAIR, name) == content
    assert name in vault.names(PAIR)
    vault.delete(PAIR, name)
    with pytest.raises(DataError, match="holds no pair"):
        vault.get(PAIR, name)


def test_a_renamed_record_is_refused(vault):
    vault.put(PAIR, "one", b"content")
    shutil.copy(sealed(vault, PAIR, "one"), sealed(vault, PAIR, "two"))
    with pytest.raises(IntegrityError):
        vault.get(PAIR, "two")


def test_a_scan_cannot_be_moved_to_the_synthetic_volumes(vault, pair):
    vault.put_pair("one", *pair)
    sealed(vault, SYNTHETIC, "one").parent.mkdir()
    shutil.copy(sealed(vault, PAIR, "one"), sealed(vault, SYNTHETIC, "one"))
    with pytest.raises(IntegrityError):
        vault.get(SYNTHETIC, "one")


def test_a_record_of_another_site_is_refused(vault, tmp_path):
    vault.put(PAIR, "one", b"content")
    other = Vault(new_home(tmp_path / "other", "site-b"))
    other.put(PAIR, "one", b"own")
    shutil.copy(sealed(vault, PAIR, "one"), sealed(other, PAIR, "one"))
    with pytest.raises(IntegrityError):
        other.get(PAIR, "one")


def test_a_record_is_bound_to_the_site_even_under_equal_keys(vault, tmp_path):
    vault.put(PAIR, "one", b"content")
    other = new_home(tmp_path / "other", "site-b")
    shutil.copy(vault.home.keys / "master.key", other.keys / "master.key")
    (other.vault / PAIR).mkdir()
    shutil.copy(sealed(vault, PAIR, "one"), other.vault / PAIR / "one.sealed")
    with pytest.raises(IntegrityError):
        Vault(other).get(PAIR, "one")


@quick
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.booleans())
def test_one_changed_byte_or_a_cut_is_refused(vault, place, flip, cut):
    vault.put(PAIR, "one", b"some content of a record")
    path = sealed(vault, PAIR, "one")
    content = bytearray(path.read_bytes())
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] ^= flip
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        vault.get(PAIR, "one")


def test_a_scan_is_not_taken_as_synthetic(vault, pair):
    with pytest.raises(NotSyntheticError):
        vault.put_synthetic("x", pair[0], pair[1])
    assert vault.names(SYNTHETIC) == vault.names(MAP) == []


def test_no_plain_voxel_or_label_is_on_disk(vault, pair, synthetic):
    vault.put_pair("P-0123.S-1", *pair)
    vault.put_synthetic("a1", synthetic, pair[1])
    written = b"".join(p.read_bytes() for p in vault.home.root.rglob("*") if p.is_file())
    for array in (pair[0].array, pair[1].array, synthetic.array, pair[1].array.ravel(order="F")):
        plain = np.ascontiguousarray(array).tobytes()
        assert not any(plain[n : n + 8] in written for n in range(0, len(plain) - 8, 8))
    assert b"__metadata__" not in written
    assert pair[0].array.tobytes()[:8] in vault.get(PAIR, "P-0123.S-1"), "the search would see it"


def test_equal_records_look_different(vault):
    vault.put(PAIR, "one", b"content")
    first = sealed(vault, PAIR, "one").read_bytes()
    vault.put(PAIR, "one", b"content")
    assert sealed(vault, PAIR, "one").read_bytes() != first


def test_records_are_for_the_owner_only(vault, pair):
    before = os.umask(0)
    try:
        vault.put_pair("one", *pair)
    finally:
        os.umask(before)
    assert stat.S_IMODE(sealed(vault, PAIR, "one").stat().st_mode) == 0o600
    assert stat.S_IMODE(vault.home.root.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "../out", "a/b", "a\n", "ü", "x" * 121, "a b"])
def test_refuses_names_that_are_no_names(vault, name):
    with pytest.raises(DataError, match="name"):
        vault.put(PAIR, name, b"")
    assert vault.names(PAIR) == []


def test_refuses_labels_on_another_grid(vault, pair):
    moved = Geometry(pair[0].geometry.affine + np.eye(4) * [[1.0], [0.0], [0.0], [0.0]], pair[0].geometry.shape)
    with pytest.raises(DataError, match="another grid"):
        vault.put_pair("one", pair[0], SemanticMap(pair[1].array, moved, pair[1].schema))
    assert vault.names(PAIR) == []


def test_refuses_a_pair_of_another_schema(vault, pair, tmp_path):
    from medlsdm.types import LabelClass, LabelSchema

    other = LabelSchema("other", tuple(LabelClass(n, f"thing {n}") for n in range(11)))
    vault.put_pair("one", pair[0], SemanticMap(pair[1].array, pair[1].geometry, other))
    with pytest.raises(IntegrityError, match="schema"):
        list(vault.pairs())
