"""Keyed and fresh UIDs."""

import re

from deid_tools.keys import SiteKeys
from deid_tools.uids import fresh_uid, new_uid

KEYS = SiteKeys.derive(b"m" * 32, "test")


def test_no_new_uid_reads_like_a_date():
    date = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")
    keyed = [new_uid(KEYS, f"1.2.3.{n}") for n in range(3000)]
    assert len(set(keyed)) == len(keyed)
    for uid in (*keyed, *(fresh_uid() for _ in range(3000))):
        assert not date.search(uid)
        assert len(uid) <= 44
