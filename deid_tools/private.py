"""The few private elements that a recipe names by their maker: numbers as they are, UIDs under the site's key."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deid_tools.admit import Refusal
from deid_tools.keys import SiteKeys
from deid_tools.numbers import private_may_stay, within_length
from deid_tools.recipes import NUMBERS
from deid_tools.uids import new_uid

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def take_private(
    source: Dataset, target: Dataset, safe: frozenset[tuple[int, str, int]], keys: SiteKeys
) -> frozenset[str]:
    """Copy the named private elements of ``source``, and return their values as text.

    An element whose value representation in the file is not a number's or a UID's does not pass, nor one of another
    type or with more values than its maker's dictionary says.

    Raises:
        Refusal: A number is not one.
    """
    texts: set[str] = set()
    for group, creator, low in sorted(safe):
        try:
            block = source.private_block(group, creator)
        except KeyError:
            continue
        if low not in block:
            continue
        element = block[low]
        if element.VR not in (*NUMBERS, "UI") or element.value in (None, ""):
            continue
        values = list(element.value) if element.VM > 1 else [element.value]
        if element.VR == "UI":
            values = [new_uid(keys, str(v)) for v in values]
        else:
            _check_numbers(values)
            if not private_may_stay(element, creator):
                continue
            texts.update(str(v) for v in values)
            texts.add("\\".join(str(v) for v in values))
        target.private_block(group, creator, create=True).add_new(low, element.VR, within_length(element.VR, values))
        texts.add(creator)
    return frozenset(texts)


def _check_numbers(values: list) -> None:
    try:
        good = all(math.isfinite(float(v)) and abs(float(v)) < 1e12 for v in values)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise Refusal("a private element that should hold a number does not")
