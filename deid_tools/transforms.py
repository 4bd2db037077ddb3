"""What the functions of a recipe do to one patient's values. None returns nothing: what goes is an empty string."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from deid_tools.ages import clean_age
from deid_tools.dates import day_shift, shift
from deid_tools.descriptors import clean_text, own_words
from deid_tools.keys import SiteKeys
from deid_tools.uids import new_uid, pseudonym

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_KINDS = {"shift": "a date or time that cannot be read", "age": "an age that cannot be right"}


class Transforms:
    """Hold one header's patient: pseudonym, shift of days, names; and count what had to go.

    Args:
        keys: The site's keys.
        ds: The original header.
        words: Whether descriptions will be cleaned, for which the names are gathered.

    Attributes:
        scope: All that the result for one value depends on besides the value.
    """

    def __init__(self, keys: SiteKeys, ds: Dataset, *, words: bool = False) -> None:
        issuer, patient_id = str(ds.get("IssuerOfPatientID", "") or ""), str(ds.PatientID)
        self.keys = keys
        self.pseudonym = pseudonym(keys, issuer, patient_id)
        self.days = day_shift(keys, issuer, patient_id)
        self.removed: Counter[str] = Counter()
        self._own = own_words(ds) if words else frozenset()
        self._birth = as_text(ds.get("PatientBirthDate", ""))
        self._study = as_text(ds.get("StudyDate", ""))
        self.scope = (self.pseudonym, self.days, self._own, self._birth, self._study)

    def __repr__(self) -> str:
        return "Transforms(private)"

    def apply(self, rule: str, vr: str, value: object, *, count: bool = False) -> str:
        """Return what a value becomes under a rule such as ``func:shift``; several are parted by backslashes.

        Args:
            rule: As the recipe names it; the recipe was checked, so it is known.
            vr: The value representation.
            value: The original, as pydicom gives it.
            count: Count a value that goes because it cannot be read.
        """
        text = as_text(value)
        name = rule.partition(":")[2]
        if name == "pseudonym":
            return self.pseudonym
        if name == "keyed_uid":
            return "\\".join(new_uid(self.keys, uid) for uid in text.split("\\") if uid)
        if name == "shift":
            result = shift(vr, text, self.days) if text else ""
        elif name in ("age", "age_band"):
            result = clean_age(text, self._birth, self._study, bands=name == "age_band")
        else:
            assert name == "clean_text", "a recipe was not checked"
            result = clean_text(text, self._own)
        if count and text and not result and (kind := _KINDS.get(name.removesuffix("_band"))):
            self.removed[f"{kind} was removed"] += 1
        return result


def as_text(value: object) -> str:
    """Return a value as text, several parted by backslashes, without outer blanks."""
    from pydicom.multival import MultiValue

    if value is None:
        return ""
    values: Iterable[object] = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    return "\\".join(str(v).strip(" \0") for v in values)
