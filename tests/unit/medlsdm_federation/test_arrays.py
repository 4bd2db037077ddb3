from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from medlsdm.errors import IntegrityError
from medlsdm.federation.arrays import check_like, digest

arrays = st.dictionaries(
    st.text(min_size=1, max_size=6),
    npst.arrays(st.sampled_from([np.float32, np.int64, np.uint8]), npst.array_shapes(max_dims=3, max_side=3)),
    max_size=4,
)


def naive(given_arrays) -> str:
    text = b"".join(
        f"{name}|{value.dtype.str}|{value.shape}|".encode() + value.tobytes()
        for name, value in sorted(given_arrays.items())
    )
    return hashlib.sha256(text).hexdigest()


@given(arrays)
def test_the_digest_does_not_depend_on_order_or_layout(state):
    turned = {name: np.asfortranarray(state[name]) for name in reversed(list(state))}
    assert digest(turned) == digest(state) == naive(state)


@given(arrays.filter(bool), st.data())
def test_the_digest_sees_every_change(state, data):
    name = data.draw(st.sampled_from(sorted(state)))
    value = state[name]
    changed = value.copy()
    changed.reshape(-1)[0] = 0 if value.reshape(-1)[0] else 1
    others = [{name: changed}, {name: value.reshape(1, *value.shape)}, {name: value.astype(np.float64)}]
    for other in others:
        assert digest(state | other) != digest(state)
    assert digest({f"{k}." if k == name else k: v for k, v in state.items()}) != digest(state)


def test_the_digest_is_the_same_in_another_process():
    code = (
        "import numpy as np; from medlsdm.federation.arrays import digest;"
        "print(digest({'b': np.arange(6.).reshape(2, 3), 'a': np.zeros(2, np.int64)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest({"a": np.zeros(2, np.int64), "b": np.arange(6.0).reshape(2, 3)})


EXPECTED = {"w": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int64)}


def test_weights_of_the_same_form_pass():
    check_like({"w": np.ones((2, 3), np.float32), "n": np.array(5)}, EXPECTED)


@pytest.mark.parametrize(
    "changed",
    [
        {"more": np.zeros(1)},
        {"w": np.zeros((3, 2), np.float32)},
        {"w": np.zeros(6, np.float32)},
        {"w": np.full((2, 3), np.nan, np.float32)},
        {"w": np.array([[0, 0, 0], [0, 0, -np.inf]], np.float32)},
    ],
)
def test_other_weights_are_refused(changed):
    with pytest.raises(IntegrityError):
        check_like(EXPECTED | changed, EXPECTED)


def test_missing_weights_are_refused():
    with pytest.raises(IntegrityError):
        check_like({"w": EXPECTED["w"]}, EXPECTED)
