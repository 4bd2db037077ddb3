from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlsdm.noise import NoiseField
from medlsdm.windows import cuts, spans, total_weights, windows

small = st.tuples(*[st.integers(1, 21)] * 3)
counts = st.tuples(*[st.integers(1, 5)] * 3)
halos, aligns = st.integers(0, 9), st.sampled_from([1, 2, 4])


@given(small, counts, halos, aligns)
def test_every_voxel_is_kept_by_exactly_one_window(shape, parts, halo, align):
    kept = np.zeros(shape, int)
    for window in windows(shape, parts, halo, align):
        kept[window.keep] += 1
    assert (kept == 1).all()


@given(small, counts, halos, aligns)
def test_what_is_read_reaches_a_halo_beyond_what_is_kept_or_ends_with_the_grid(shape, parts, halo, align):
    for window in windows(shape, parts, halo, align):
        assert np.empty(shape)[window.read].shape == window.shape
        for span, size in zip(window.spans, shape, strict=True):
            assert span.start == 0 or span.first - span.start >= halo
            assert span.stop == size or span.stop - span.last >= halo
            assert 0 <= span.start <= span.first < span.last <= span.stop <= size


@given(small, counts, halos, aligns)
def test_windows_start_and_end_on_the_networks_own_grid(shape, parts, halo, align):
    for window in windows(shape, parts, halo, align):
        for span, size in zip(window.spans, shape, strict=True):
            assert span.start % align == span.first % align == 0
            assert all(end % align == 0 or end == size for end in (span.last, span.stop))


@given(small, counts, halos, aligns)
def test_what_was_read_and_put_back_is_the_whole(shape, parts, halo, align):
    whole = np.random.default_rng(0).normal(size=shape)
    out = np.zeros(shape)
    for window in windows(shape, parts, halo, align):
        out[window.keep] = whole[window.read][window.inside]
    assert np.array_equal(out, whole)


@given(small, counts, halos, aligns)
def test_blending_weights_sum_to_one_after_division_and_are_never_tiny(shape, parts, halo, align):
    cut = windows(shape, parts, halo, align)
    total = total_weights(cut, shape)
    assert total.min() > 0.1
    shares = np.zeros(shape)
    for window in cut:
        shares[window.read] += window.weights() / total[window.read]
    assert np.allclose(shares, 1, atol=1e-5)


def test_two_windows_pass_over_to_each_other_smoothly():
    left, right = spans(40, 2, 8)
    first, second = (window.weights()[:, 0, 0] for window in windows((40, 1, 1), (2, 1, 1), 8))
    assert (left.stop, right.start) == (28, 12)
    overlap = first[12:28] + second[:16]
    assert np.allclose(overlap, 1)
    assert (np.diff(first[12:28]) < 0).all()
    assert np.abs(np.diff(first)).max() < 0.11
    assert (first[:12] == 1).all()


@given(small, halos, aligns)
def test_the_ways_to_cut_begin_with_the_whole_and_count_their_voxels_right(shape, halo, align):
    found = list(cuts(shape, halo, align))
    assert (found[0].parts, found[0].largest) == ((1, 1, 1), np.prod(shape))
    assert len({cut.parts for cut in found}) == len(found)
    for cut in found[:: max(1, len(found) // 7)]:
        sizes = [np.prod(window.shape) for window in windows(shape, cut.parts, halo, align)]
        assert (max(sizes), sum(sizes)) == (cut.largest, cut.total)


def boxes(draw_ends):
    return tuple(slice(min(a, b), max(a, b) + 1) for a, b in draw_ends)


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)) for n in (9, 7, 5)]), max_size=5))
def test_noise_of_a_box_is_that_box_of_the_whole_in_any_order(ends):
    whole = NoiseField(3, (9, 7, 5)).read((slice(0, 9), slice(0, 7), slice(0, 5)))
    field = NoiseField(3, (9, 7, 5))
    for box in map(boxes, ends):
        assert np.array_equal(field.read(box), whole[(slice(None), *box)])


def test_noise_is_standard_normal_and_differs_by_seed():
    box = (slice(0, 24), slice(0, 24), slice(0, 24))
    one, two = (NoiseField(seed, (24, 24, 24)).read(box) for seed in (0, 1))
    assert one.shape == (1, 24, 24, 24)
    assert one.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(one[0, :-1].ravel(), one[0, 1:].ravel())[0, 1]) < 0.03
