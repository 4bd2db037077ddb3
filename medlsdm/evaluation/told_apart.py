"""Can a linear classifier tell synthetic patches from real ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional

from medlsdm.errors import DataError
from medlsdm.training.patients import mirror_to

Volume = NDArray[np.float32]
Rows = NDArray[np.float64]

PATCH = (16, 20, 16)
FOLDS = 5
RIDGE = 0.01
BOOTSTRAPS = 200


@dataclass(frozen=True, slots=True)
class ToldApart:
    """Hold the area under the curve, per patch, and its 95 % interval over volumes: 0.5 cannot be told apart."""

    auc: float
    low: float
    high: float
    patches: int


@cache
def _filters() -> tuple[Tensor, Tensor, Tensor]:
    """Return three layers of fixed random 3 x 3 x 3 kernels of unit norm; all but each first one sum to zero."""
    generator = torch.Generator().manual_seed(20_251)
    layers: list[Tensor] = []
    for inputs, outputs in ((1, 24), (24, 24), (24, 24)):
        kernels = torch.randn(outputs, inputs, 3, 3, 3, generator=generator)
        kernels[1:] -= kernels[1:].mean((1, 2, 3, 4), keepdim=True)
        layers.append(kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1))
    one, two, three = layers
    return one, two, three


def patches(volume: Volume) -> list[Volume]:
    """Cut a volume into evenly placed patches of ``PATCH`` voxels that hardly overlap; mirrored where it is smaller."""
    volume = mirror_to(volume, PATCH)
    starts = [
        np.linspace(0, have - want, max(1, have // want)).round().astype(int)
        for have, want in zip(volume.shape, PATCH, strict=True)
    ]
    x, y, z = PATCH
    return [volume[i : i + x, j : j + y, k : k + z] for i in starts[0] for j in starts[1] for k in starts[2]]


def patch_features(volume: Volume) -> Rows:
    """Return features [patches, 216]: mean, spread and kurtosis of fixed random convolutions' responses."""
    one, two, three = _filters()
    with torch.inference_mode():
        h = torch.from_numpy(np.stack(patches(volume)))[:, None]
        responses = [functional.conv3d(h, one)]
        responses.append(functional.conv3d(functional.leaky_relu(responses[-1], 0.2), two))
        coarse = functional.avg_pool3d(functional.leaky_relu(responses[-1], 0.2), 2)
        responses.append(functional.conv3d(coarse, three))
        columns = []
        for response in responses:
            flat = response.flatten(2).double()
            centred = flat - flat.mean(2, keepdim=True)
            variance = centred.square().mean(2)
            kurtosis = centred.pow(4).mean(2) / (variance.square() + 1e-12)
            columns += [flat.mean(2), (variance + 1e-12).sqrt().log(), kurtosis.clamp_max(30).log1p()]
    return torch.cat(columns, 1).numpy()


def area_under_curve(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """Return the probability that a positive scores above a negative, ties counting half."""
    ranks = stats.rankdata(np.concatenate([positives, negatives]))[: len(positives)].sum()
    return float((ranks - len(positives) * (len(positives) + 1) / 2) / (len(positives) * len(negatives)))


def ridge_scores(train: Rows, targets: NDArray[np.float64], test: Rows) -> NDArray[np.float64]:
    """Return the scores of a ridge classifier: features standardised on ``train``, penalty ``RIDGE`` a row."""
    mean, spread = train.mean(0), train.std(0) + 1e-9
    x, y = (train - mean) / spread, targets - targets.mean()
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    return (test - mean) / spread @ weights


def told_apart(real: Sequence[Volume], synthetic: Sequence[Volume]) -> ToldApart:
    """Return how well a ridge classifier tells patches of both sets apart, each judged when left out.

    Volumes in -1..1; both sets are cut to equal numbers. Volumes at equal places share a fold, so
    synthetic volumes made from the real ones' label maps belong at their places.

    Raises:
        DataError: Fewer volumes than folds.
    """
    count = min(len(real), len(synthetic))
    if count < FOLDS:
        raise DataError(f"{count} volumes a set are too few to tell apart.", f"Give at least {FOLDS} of each.")
    rows = [[patch_features(v) for v in group[:count]] for group in (real, synthetic)]
    fold = np.random.default_rng(0).permutation(count) % FOLDS
    scores: list[list[NDArray[np.float64]]] = [[np.empty(0)] * count for _ in rows]
    for left_out in range(FOLDS):
        kept = [np.concatenate([r for r, f in zip(group, fold, strict=True) if f != left_out]) for group in rows]
        targets = np.repeat([0.0, 1.0], [len(kept[0]), len(kept[1])])
        for group, found in zip(rows, scores, strict=True):
            for index in np.flatnonzero(fold == left_out):
                found[index] = ridge_scores(np.concatenate(kept), targets, group[index])
    auc = area_under_curve(np.concatenate(scores[1]), np.concatenate(scores[0]))
    low, high = _interval(scores[0], scores[1])
    return ToldApart(auc, low, high, sum(len(s) for s in scores[0] + scores[1]))


def _interval(real: list[NDArray[np.float64]], synthetic: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the 95 % interval of the AUC when volumes are drawn again with replacement."""
    rng, found = np.random.default_rng(0), []
    for _ in range(BOOTSTRAPS):
        drawn = [[group[i] for i in rng.integers(len(group), size=len(group))] for group in (real, synthetic)]
        found.append(area_under_curve(np.concatenate(drawn[1]), np.concatenate(drawn[0])))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
