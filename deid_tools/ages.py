"""Patient ages: those of 90 and more are one, and ages may be told in bands of five years."""

from __future__ import annotations

import re

from deid_tools.dates import read_day

TOP = 90
BAND_YEARS = 5
_AGE = re.compile(r"(\d{3})([DWMY])")
_YEARS = {"D": 1 / 365.2425, "W": 7 / 365.2425, "M": 1 / 12, "Y": 1.0}


def clean_age(text: str, birth: str = "", study: str = "", *, bands: bool = False) -> str:
    """Return an age string as it may stay, or an empty string.

    Args:
        text: PatientAge, such as ``093Y``, ``018M``, ``006W`` or ``004D`` (PS3.5, VR AS).
        birth: PatientBirthDate; where both dates are whole, an age that is more than a year off goes.
        study: StudyDate.
        bands: Tell the first year of a band of five only.

    Returns:
        ``090Y`` for all who are 90 or older, by the age or by the dates.

    Source: PS3.15 E.3.6; 45 CFR 164.514(b)(2)(i)(C) for the age of 90.
    """
    found = _AGE.fullmatch(text.strip(" \0"))
    if not found:
        return ""
    years = int(found[1]) * _YEARS[found[2]]
    born, seen = read_day(birth.strip(" \0")), read_day(study.strip(" \0"))
    if born and seen:
        by_dates = (seen - born).days / 365.2425
        if not -0.1 <= by_dates <= 130 or abs(by_dates - years) > 1.1 + _YEARS[found[2]]:
            return ""
        years = max(years, by_dates) if by_dates >= TOP else years
    if years >= TOP:
        return f"{TOP:03d}Y"
    if bands:
        return f"{int(years) // BAND_YEARS * BAND_YEARS:03d}Y"
    return found[0]
