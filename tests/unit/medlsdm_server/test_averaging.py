"""Strategies against naive means, medians and Adam; bounds on updates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from medlsdm.errors import IntegrityError
from medlsdm_server.averaging import Aggregator, mean_of, too_far
from medlsdm_server.replies import Reply
from medlsdm_server.strategy import Strategy

from . import conducting

assert conducting.Grid, "it tells Flower's messages which task they belong to"
LIKE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32), "n": np.array([5], np.int64)}


def replies(tmp_path, count, seed=0, weights=(4.0, 8.0, 16.0, 1.0, 2.0)):
    rng, made = np.random.default_rng(seed), []
    for n in range(count):
        arrays = {
            k: rng.normal(size=v.shape).astype(v.dtype) if v.dtype.kind == "f" else v + n for k, v in LIKE.items()
        }
        file = tmp_path / f"{n}.safetensors"
        save_file(arrays, file)
        norm = float(np.sqrt(sum(np.square(a).sum() for k, a in arrays.items() if k != "n")))
        made.append((arrays, Reply(f"site-{n}", weights[n % 5], 0.5, 1.0, norm, file)))
    return [m[0] for m in made], [m[1] for m in made]


def test_the_mean_is_weighted_and_whole_numbers_stay_whole(tmp_path):
    arrays, given_ = replies(tmp_path, 5)
    got, weights = mean_of(given_, LIKE), [r.weight for r in given_]
    for name in ("w", "b"):
        assert np.allclose(got[name], np.average([a[name] for a in arrays], axis=0, weights=weights), atol=1e-6)
    assert got["n"].dtype == np.int64
    assert got["n"][0] == round(float(np.average([5, 6, 7, 8, 9], weights=weights)))


def test_a_mean_that_is_not_finite_is_refused(tmp_path):
    _, given_ = replies(tmp_path, 2)
    save_file({k: v if k == "n" else np.full_like(v, np.inf) for k, v in LIKE.items()}, given_[0].file)
    with pytest.raises(IntegrityError, match="finite"):
        mean_of(given_, LIKE)


def aggregate(tmp_path, given_, number=1, **strategy):
    return Aggregator(Strategy(**strategy), tmp_path / "moments").aggregate(number, given_, LIKE)


def test_fedprox_averages_as_fedavg_does(tmp_path):
    _, given_ = replies(tmp_path, 4)
    one, two = (aggregate(tmp_path, given_, name=name) for name in ("fedavg", "fedprox"))
    assert all(np.array_equal(one[k], two[k]) for k in LIKE)


def test_the_median_is_taken_number_by_number(tmp_path):
    arrays, given_ = replies(tmp_path, 5)
    got = aggregate(tmp_path, given_, name="fedmedian")
    assert np.allclose(got["w"], np.median([a["w"] for a in arrays], axis=0))


def test_the_trimmed_mean_leaves_out_both_ends(tmp_path):
    arrays, given_ = replies(tmp_path, 5)
    got = aggregate(tmp_path, given_, name="trimmed-mean", beta=0.2)
    want = np.sort([a["w"] for a in arrays], axis=0)[1:-1].mean(axis=0)
    assert np.allclose(got["w"], want, atol=1e-6)


def test_krum_takes_the_reply_that_is_nearest_to_the_others(tmp_path):
    _, given_ = replies(tmp_path, 5)
    near = {k: v + np.float32(0.01) if v.dtype.kind == "f" else v for k, v in LIKE.items()}
    for r in given_[:4]:
        save_file(
            {k: v + np.float32(0.001 * int(r.site[-1])) if v.dtype.kind == "f" else v for k, v in near.items()}, r.file
        )
    got = aggregate(tmp_path, given_, name="krum", malicious=1)
    assert np.abs(got["w"] - 0.01).max() < 0.005, "not the far one"


def test_adam_keeps_its_moments_from_round_to_round_and_over_a_restart(tmp_path):
    s = Strategy(name="fedadam", eta=0.1)
    current, m, v = {k: x.astype(np.float64) for k, x in LIKE.items() if k != "n"}, {}, {}
    for number in range(1, 4):
        arrays, given_ = replies(tmp_path, 3, seed=number)
        like = {k: x.astype(np.float32) for k, x in current.items()} | {"n": LIKE["n"]}
        got = Aggregator(s, tmp_path / "moments").aggregate(number, given_, like)  # a fresh object each round
        for k in current:
            mean = np.average([a[k] for a in arrays], axis=0, weights=[r.weight for r in given_])
            delta = mean - current[k]
            m[k] = s.beta_1 * m.get(k, 0) + (1 - s.beta_1) * delta
            v[k] = s.beta_2 * v.get(k, 0) + (1 - s.beta_2) * delta**2
            rate = s.eta * np.sqrt(1 - s.beta_2 ** (number + 1)) / (1 - s.beta_1 ** (number + 1))
            current[k] = current[k] + rate * m[k] / (np.sqrt(v[k]) + s.tau)
            assert np.allclose(got[k], current[k], atol=1e-4)


def norms(tmp_path, *lengths):
    return [Reply(f"site-{n}", 4.0, None, 1.0, x, tmp_path) for n, x in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "earlier", "refused"),
    [
        ((1.0, 1.1, 0.9), (), set()),
        ((1.0, 1.1, 1e6), (), {2}),
        ((1.0, 1e6), (), {1}),  # of two, the longer does not set its own measure
        ((1.0, 1e-9), (1.0, 1.2), set()),  # one that hardly moves does not condemn the other, given a history
        ((1.0, 0.0), (), set()),
        ((50.0, 1.0, 1.1), (1.0,), {0}),
        ((50.0, 60.0, 55.0), (1.0,), set()),  # all of them: a new stretch of training
        ((), (), set()),
    ],
)
def test_the_usual_length_of_an_update(tmp_path, lengths, earlier, refused):
    wrong = too_far(norms(tmp_path, *lengths), 10.0, earlier)
    assert {int(r.site[-1]) for r in wrong} == refused
    assert too_far(norms(tmp_path, *lengths), None, earlier) == []


@given(st.lists(st.floats(0.1, 1.0), min_size=1, max_size=9), st.floats(1.001, 1e9))
def test_honest_updates_within_the_bound_are_never_refused(lengths, factor):
    from pathlib import Path

    given_ = norms(Path(), *lengths, 10.0 * max(lengths) * 10 * factor)
    wrong = {r.site for r in too_far(given_, 10.0, ())}
    assert not wrong & {r.site for r in given_[:-1]}
    assert len(lengths) < 2 or given_[-1].site in wrong
