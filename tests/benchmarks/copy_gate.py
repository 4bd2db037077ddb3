"""Measure the copy gate: recall by kind of plant, and unrelated patients called copies. ``make bench-gate DATA=DIR``.

DIR holds ``images/`` and ``labels/`` under equal names. Prints one table for each number of references.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from medlsdm.privacy.audit import PLANTS, CopyDetector, Plant, plant_recall
from medlsdm.training.folders import find_schema, read_labels
from medlsdm.types import Modality, Scan, SemanticMap
from medlsdm.volumes import list_nifti, nifti_stem, read_nifti

PLANTED = 40
HELD_OUT = 90
Pair = tuple[Scan, SemanticMap]


def both(change: Callable[[np.ndarray, int], np.ndarray]) -> Plant:
    """Apply a spatial change to the volume (spline order 1) and to its labels (order 0)."""
    return lambda array, labels, rng: (change(array, 1), None if labels is None else change(labels, 0))


def rotated(degrees: float) -> Plant:
    return both(lambda a, order: ndimage.rotate(a, degrees, reshape=False, order=order, mode="nearest"))


def zoomed(factor: float) -> Plant:
    def change(array: np.ndarray, order: int) -> np.ndarray:
        centre = (np.array(array.shape) - 1) / 2
        return ndimage.affine_transform(
            array, np.eye(3) / factor, centre - centre / factor, order=order, mode="nearest"
        )

    return both(change)


def shifted(voxels: int) -> Plant:
    return both(lambda a, order: ndimage.shift(a, (voxels, 0, 0), order=order, mode="nearest"))


def blurred(sigma: float) -> Plant:
    return lambda array, labels, rng: (ndimage.gaussian_filter(array, sigma), labels)


KINDS: dict[str, Plant] = {
    **PLANTS,
    "inverted": lambda array, labels, rng: (array.max() - array, labels),
    **{f"blur {s}": blurred(s) for s in (1.0, 2.0, 2.5)},
    **{f"shift by {n}": shifted(n) for n in (3, 5)},
    **{f"rotation {d}": rotated(d) for d in (5, 10, 20)},
    **{f"zoom {z}": zoomed(z) for z in (0.9, 1.1, 1.2)},
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--references", type=int, nargs="+", default=[10, 40, 100])
    chosen = parser.parse_args()
    images = {nifti_stem(p): p for p in list_nifti(chosen.data / "images")}
    labels = {nifti_stem(p): p for p in list_nifti(chosen.data / "labels")}
    schema = find_schema(list(labels.values()))
    names = sorted(images)
    np.random.default_rng(0).shuffle(names)

    def pairs(some: list[str]) -> Iterator[Pair]:
        for name in some:
            array, geometry = read_nifti(images[name])
            yield Scan(array, geometry, Modality.MR, name), read_labels(labels[name], schema)

    for count in chosen.references:
        references, others = names[:count], names[count : count + HELD_OUT]
        start = time.process_time()
        detector = CopyDetector.fit(pairs(references))
        fitted = time.process_time() - start
        rows = ((s.array, s.geometry, s.modality, m.array) for s, m in pairs(others))
        called = sum(v.is_copy for v in detector.check_all(rows))
        result = plant_recall(detector, pairs(references), 1, kinds=KINDS, planted=PLANTED * len(KINDS))
        print(f"{count} references, fitted in {fitted:.1f} CPU-s")
        print(f"  unrelated patients called copies: {called} of {len(others)}")
        for kind, (planted, caught) in result.kinds.items():
            print(f"  {kind:14} {caught:3} of {planted}")


if __name__ == "__main__":
    main()
