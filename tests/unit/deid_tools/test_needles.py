from __future__ import annotations

import random

import pytest

from deid_tools.needles import Needles, forms, printable_runs
from deid_tools.originals import Originals


def test_every_string_is_found_where_a_plain_search_finds_it():
    draw = random.Random(4)
    text = bytes(draw.choices(b"abc\0.1", k=3000))
    words = {bytes(draw.choices(b"abc\0.1", k=draw.randrange(3, 9))) for _ in range(400)}
    expected = {(i, w) for w in words for i in range(len(text)) if text.startswith(w, i)}
    assert expected
    assert set(Needles(words).find(text)) == expected
    assert list(Needles([]).find(text)) == []
    assert list(Needles(words).find(b"ab")) == []


@pytest.mark.parametrize("codec", ["ascii", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("before", [b"", b"\0", b"\0\0", b"\xff\x01\x02"])
def test_text_between_binary_values_is_read_as_a_run(codec, before):
    hidden = "Notuvala Dek".encode(codec)
    if codec != "ascii" and len(before) % 2:
        before += b"\xff"
    content = before + hidden + b"\xff\xff" * 9
    assert b"notuvala dek" in printable_runs(content)
    assert printable_runs(b"\x01\xff" * 200).strip() == b""
    assert printable_runs(b"") == printable_runs(b"a") == b""


@pytest.mark.parametrize("codec", ["latin-1", "utf-8", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("case", ["Geschwür", "GESCHWÜR", "geschwür"])
def test_a_word_with_an_umlaut_is_found_in_any_encoding(codec, case):
    assert any(form in case.encode(codec).lower() for form in forms("Geschwür"))


def originals(*words: str) -> Originals:
    from pydicom.dataset import Dataset

    ds = Dataset()
    ds.PatientName = "^".join(words)
    result = Originals(["not stated"])
    result.add(ds, frozenset())
    return result


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be", "iso2022_jp", "shift_jis"])
def test_a_name_in_ideographs_is_found(codec):
    assert originals("山田", "太郎").found_in(b"\x01\x02" + "山田".encode(codec) + b"\xff")
    assert not originals("山田", "太郎").found_in("田山".encode(codec))


def test_short_words_count_only_as_words():
    assert originals("Lee").found_in(b"seen by Lee today")
    assert not originals("Lee").found_in(b"sleep")
    assert originals("Dekeloza").found_in(b"xxDEKELOZAxx")
    assert originals("Dekeloza").found_in("xxDekelozaxx".encode("utf-16-be"))
    assert not originals("stated").found_in(b"not stated")


def test_collections_of_two_workers_add_up():
    both = originals("Dekeloza")
    both.merge(originals("Notuvala"))
    assert both.found_in(b"Dekeloza")
    assert both.found_in(b"Notuvala")
    assert repr(both) == "Originals(private)"
