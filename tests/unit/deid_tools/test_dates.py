"""Dates of one patient move together; what cannot be read goes."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deid_tools.ages import clean_age
from deid_tools.dates import LONGEST_SHIFT_DAYS, day_shift, read_day, shift
from deid_tools.keys import SiteKeys

KEYS = SiteKeys.derive(bytes(range(32)), "test")


@pytest.mark.parametrize(
    ("vr", "value", "moved"),
    [
        ("DA", "20190301", "20190219"),
        ("DA", "2019.03.01", "20190219"),
        ("DA", "20190101\\20200301", "20181222\\20200220"),
        ("DA", "20190101-20190301", "20181222-20190219"),
        ("DA", "20190101-", "20181222-"),
        ("DA", "-20190301", "-20190219"),
        ("DA", "2019", "2019"),
        ("DA", "201903", "201903"),
        ("DA", "garbage", ""),
        ("DA", "20191301", ""),
        ("DA", "20190230", ""),
        ("DA", "20190101\\garbage", ""),
        ("DA", "20190101-garbage", ""),
        ("DA", "-", ""),
        ("DA", "1-2-3", ""),
        ("DA", "00010101", ""),
        ("DT", "20190301101112.123456+0100", "20190219101112.123456+0100"),
        ("DT", "2019030110", "2019021910"),
        ("DT", "201903", "201903"),
        ("DT", "20190301-0500", "20190219-0500"),
        ("DT", "20190101-20190301", "20181222-20190219"),
        ("DT", "20190101101010-0500-20190301101010+0530", "20181222101010-0500-20190219101010+0530"),
        ("DT", "20190301251112", ""),
        ("DT", "20190301 10:11", ""),
        ("TM", "235959.999999", "235959.999999"),
        ("TM", "10:11:12", "101112"),
        ("TM", "1000-1200", "1000-1200"),
        ("TM", "235960", "235960"),
        ("TM", "250000", ""),
        ("TM", "noon", ""),
        ("DT", "20190301-" * 10_000, ""),
        ("SH", "+0100", "+0100"),
        ("SH", "-0330", "-0330"),
        ("SH", "CET", ""),
        ("SH", "+1500", ""),
    ],
)
def test_every_form_of_a_date_moves_by_whole_days_or_goes(vr, value, moved):
    assert shift(vr, value, -10) == moved


@given(st.dates(date(1900, 1, 1), date(2099, 12, 31)), st.dates(date(1900, 1, 1), date(2099, 12, 31)), st.text())
def test_intervals_between_a_patients_dates_stay(first, second, patient):
    days = day_shift(KEYS, "", patient)
    moved = [read_day(shift("DA", d.strftime("%Y%m%d").rjust(8, "0"), days)) for d in (first, second)]
    assert -LONGEST_SHIFT_DAYS <= days <= -1
    assert moved[0] == first + timedelta(days=days)
    assert moved[0] - moved[1] == first - second


@given(st.text(max_size=40))
def test_no_text_makes_the_reader_of_dates_fail(text):
    for vr in ("DA", "DT", "TM", "SH"):
        result = shift(vr, text, -400)
        assert result == "" or not set(result) - set("0123456789.+-\\")


def test_the_shift_follows_patient_key_and_project():
    shifts = {day_shift(KEYS, "", f"P{n}") for n in range(200)}
    assert len(shifts) > 150
    assert day_shift(KEYS, "A", " x ") == day_shift(KEYS, "a", "X")
    assert day_shift(SiteKeys.derive(bytes(range(32)), "other"), "", "P1") != day_shift(KEYS, "", "P1")


@pytest.mark.parametrize(
    ("age", "birth", "study", "bands", "kept"),
    [
        ("093Y", "", "", False, "090Y"),
        ("090Y", "", "", True, "090Y"),
        ("089Y", "", "", False, "089Y"),
        ("089Y", "", "", True, "085Y"),
        ("047Y", "19700101", "20170601", False, "047Y"),
        ("047Y", "19500101", "20170601", False, ""),
        ("089Y", "19270101", "20170601", False, "090Y"),
        ("018M", "", "", False, "018M"),
        ("018M", "", "", True, "000Y"),
        ("006W", "20170401", "20170601", False, "006W"),
        ("47", "", "", False, ""),
        ("garbage", "", "", False, ""),
        ("047Y", "garbage", "20170601", False, "047Y"),
    ],
)
def test_ages_are_top_coded_and_agree_with_the_dates(age, birth, study, bands, kept):
    assert clean_age(age, birth, study, bands=bands) == kept
