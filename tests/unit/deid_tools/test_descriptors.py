"""Descriptions: only listed words and short measures stay, and never a word of the patient's names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from deid_tools.descriptors import allowed, clean_text, known_words, own_words


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("CHEST CT with contrast, Dr. Mueller", "CHEST CT contrast"),
        ("Thorax^1.5mm_lung (Adult)", "Thorax 1.5mm lung"),
        ("t1_mprage_sag_3D", "t1 mprage sag 3D"),
        ("DWI b1000 12345678", "DWI b1000"),
        ("MRN 4711 seen 2019-03-04", ""),
        ("spine\\Mueller head", "spine"),
        ("", ""),
    ],
)
def test_only_listed_words_stay(text, cleaned):
    assert clean_text(text, frozenset()) == cleaned


def test_a_word_of_a_name_goes_even_if_it_is_listed():
    ds = Dataset()
    ds.PatientName, ds.InstitutionName = "HEAD^Anna", "Chest Clinic"
    assert clean_text("head and chest and neck", own_words(ds)) == "neck"


@given(st.text(max_size=300))
def test_whatever_comes_in_only_allowed_words_come_out(text):
    cleaned = clean_text(text, frozenset())
    assert len(cleaned) <= 64
    assert all(allowed(word) for word in cleaned.split())


def test_the_list_holds_no_long_numbers():
    assert len(known_words()) > 200
    assert not any(word.isdigit() for word in known_words())
