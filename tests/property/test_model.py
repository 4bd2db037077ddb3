from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medlsdm.config import load_preset
from medlsdm.training.intensity import SUV_WINDOW
from medlsdm.training.patients import CT_WINDOW, denormalise, mirror_to, normalise, round_up
from medlsdm.types import Modality

triples = st.tuples(*[st.integers(1, 9)] * 3)


@given(hnp.arrays(np.float64, triples.filter(lambda s: np.prod(s) > 1), elements=st.floats(*CT_WINDOW)))
def test_hounsfield_units_come_back(hu):
    if hu.min() == hu.max():
        return
    np.testing.assert_allclose(denormalise(normalise(hu, Modality.CT), Modality.CT), hu, atol=1e-3)


@given(hnp.arrays(np.int64, triples, elements=st.integers(-5, 5)), st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3))
def test_mirroring_keeps_the_volume_and_adds_only_its_own_values(array, multiples):
    shape = round_up(array.shape, multiples)
    grown = mirror_to(array, shape)
    assert grown.shape == shape
    assert all(n % m == 0 for n, m in zip(shape, multiples, strict=True))
    assert np.array_equal(grown[tuple(slice(n) for n in array.shape)], array)
    assert set(grown.ravel()) == set(array.ravel())


@given(hnp.arrays(np.float64, triples.filter(lambda s: np.prod(s) > 1), elements=st.floats(*SUV_WINDOW)))
def test_suv_comes_back(suv):
    if suv.min() == suv.max():
        return
    np.testing.assert_allclose(denormalise(normalise(suv, Modality.PT), Modality.PT), suv, atol=1e-4)


@given(
    hnp.arrays(np.uint8, (4, 5, 6)).filter(lambda a: a.min() != a.max()),
    st.integers(1, 6666),
    st.integers(-(2**15), 2**15),
)
def test_eight_bit_mr_may_be_stored_at_any_scale(raw, scale, offset):
    stored = raw.astype(np.float64) * scale + offset
    np.testing.assert_allclose(normalise(stored, Modality.MR), normalise(raw, Modality.MR), atol=1e-5)


@given(st.tuples(*[st.floats(0.2, 8.0)] * 3))
def test_strides_follow_the_spacing_and_leave_a_valid_preset(spacing):
    plain = load_preset("tiny")
    fitted = plain.for_spacing(spacing)
    latents = np.array(spacing) * fitted.autoencoder.strides
    sizes = np.log2(latents / (4 * min(spacing)))
    assert (np.array(fitted.autoencoder.strides)[np.array(spacing) == min(spacing)] == 4).all()
    free = np.array(fitted.autoencoder.strides) > 1
    assert (np.abs(sizes[free]) <= 0.5 + 1e-9).all()
    assert (sizes[~free] >= -0.5 - 1e-9).all()
    for before, after in ((plain.window, fitted.window), (plain.stage1.crop, fitted.stage1.crop)):
        assert (np.array(before) // 4 == np.array(after) // np.array(fitted.autoencoder.strides)).all()


@settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3), st.integers(0, 2**32 - 1))
def test_mr_scale_and_offset_do_not_matter(scale, offset, seed):
    raw = np.random.default_rng(seed).random((5, 6, 7))
    shifted = (raw + offset) * scale
    np.testing.assert_allclose(normalise(shifted, Modality.MR), normalise(raw, Modality.MR), atol=1e-4)
