from __future__ import annotations

import gzip
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm.errors import DataError
from medlsdm_node.demo import leaks
from medlsdm_node.demo.leaks import ENCODINGS, Needles, search

few = st.text("ab\u00e9", min_size=6, max_size=9)
tokens = st.lists(few, min_size=1, max_size=4)
quick = settings(max_examples=60, deadline=None)


def naive(content: bytes, wanted) -> bool:
    return any(t.encode(e) in content for t in wanted for e in ENCODINGS)


@quick
@given(tokens=tokens, content=st.text("ab\u00e9", max_size=60), encoding=st.sampled_from(ENCODINGS), odd=st.booleans())
def test_finds_what_a_naive_search_finds(tokens, content, encoding, odd):
    data = b"\0" * odd + content.encode(encoding)
    assert Needles(tokens).found_in(data) == naive(data, tokens)


@quick
@given(tokens=tokens, content=st.binary(max_size=80), place=st.integers(0, 80), encoding=st.sampled_from(ENCODINGS))
def test_finds_every_plant(tokens, content, place, encoding):
    data = content[:place] + tokens[-1].encode(encoding) + content[place:]
    assert Needles(tokens).found_in(data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_finds_across_the_borders_of_pieces(tmp_path, monkeypatch, chunk, packed):
    monkeypatch.setattr(leaks, "CHUNK", chunk)
    for number in range(9):
        content = b"x" * number + "Doe^Jane^1961".encode("utf-16-le") + b"y" * (9 - number)
        (tmp_path / f"{number}").write_bytes(gzip.compress(content) if packed else content)
    (tmp_path / "none").write_bytes(b"Doe^Jane^1962" * 3)
    assert [os.path.basename(p) for p in search([tmp_path], ["Doe^Jane^1961"]).found] == [str(n) for n in range(9)]


@pytest.mark.parametrize("name", ["a.nii.gz", "no-suffix"])
def test_finds_what_is_packed(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"name: Doe^Jane" * 3))
    assert search([tmp_path], ["Doe^Jane"]).found == (str(tmp_path / name),)


def test_a_damaged_packed_file_is_searched_as_far_as_it_goes(tmp_path):
    whole = gzip.compress(b"Doe^Jane" + os.urandom(5000))
    (tmp_path / "cut.gz").write_bytes(whole[:3000])
    (tmp_path / "false.gz").write_bytes(b"\x1f\x8b no gzip, but Doe^Jane")
    (tmp_path / "empty.gz").write_bytes(b"")
    assert len(search([tmp_path], ["Doe^Jane"]).found) == 2


def test_finds_names_of_files_and_folders(tmp_path):
    (tmp_path / "of Doe^Jane").mkdir()
    (tmp_path / "of Doe^Jane/scan").write_bytes(b"")
    (tmp_path / "Doe^Jane.dcm").write_bytes(b"")
    (tmp_path / os.fsdecode(b"\xff Doe^Jane")).write_bytes(b"")
    assert len(search([tmp_path], ["Doe^Jane"]).found) == 3


def test_says_how_much_was_searched(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b.gz").write_bytes(packed := gzip.compress(b"y" * 1000))
    found = search([tmp_path], ["Doe^Jane", "Doe^Jane", "other-one"])
    assert (found.tokens, found.files, found.found) == (2, 2, ())
    assert found.bytes_searched == 100 + len(packed) + 1000


def test_a_single_file_is_searched(tmp_path):
    path = tmp_path / "one"
    path.write_bytes(b"Doe^Jane")
    assert search([path], ["Doe^Jane"]).found == (str(path),)


def test_what_is_not_there_is_not_passed_over(tmp_path):
    with pytest.raises(DataError):
        search([tmp_path / "none"], ["Doe^Jane"])


@pytest.mark.parametrize("token", ["", "12345"])
def test_a_token_that_would_be_found_by_chance_is_refused(token):
    with pytest.raises(ValueError, match="too short"):
        Needles([token])


def test_no_token_is_never_found():
    assert not Needles([]).found_in(b"x" * 100)
