from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from deid_tools.slices import Frame
from deid_tools.split import differences, split_volumes
from deid_tools.stacks import plan_stack
from medlsdm.errors import GeometryError

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def frame(number: int, z: float, apart: str = "", perhaps: Iterable[object] = (), **changes: object) -> Frame:
    values: dict[str, object] = {
        "source": number,
        "index": 0,
        "position": np.array([0.0, 0.0, z]),
        "orientation": np.array(AXIAL),
        "spacing": (1.0, 1.0),
        "thickness": 2.0,
        "shape": (4, 5),
        "slope": 1.0,
        "intercept": 0.0,
        "padding": None,
        "apart": (("echo", (apart,)),),
        "perhaps": tuple((("phase", "flip angle")[k], (value,)) for k, value in enumerate(perhaps)),
    }
    return Frame(**{**values, **changes})  # type: ignore[arg-type]


def sources(parts: list[list[Frame]]) -> list[list[int]]:
    return [sorted(f.source for f in part) for part in parts]


def test_slices_of_two_echoes_never_meet_even_without_a_repeated_position():
    found = [frame(k, 2.0 * k, apart="ab"[k % 2]) for k in range(6)]
    assert sources(split_volumes(found)) == [[0, 2, 4], [1, 3, 5]]


def test_an_attribute_that_varies_in_a_good_volume_does_not_part_it():
    found = [frame(k, 2.0 * k, perhaps=[100.0 + k, k // 3]) for k in range(6)]
    assert sources(split_volumes(found)) == [[0, 1, 2, 3, 4, 5]]


def test_phases_are_parted_by_value_and_else_by_rank():
    by_value = [frame(k, 2.0 * (k % 3), perhaps=[float(k // 3)]) for k in range(6)]
    assert sources(split_volumes(by_value)) == [[0, 1, 2], [3, 4, 5]]
    by_rank = [frame(k, 2.0 * (k % 3), perhaps=[10.0 * (k // 3) + k]) for k in range(6)]
    assert sources(split_volumes(by_rank)) == [[0, 1, 2], [3, 4, 5]]


def test_rank_counts_only_for_what_is_an_order_in_time():
    jitter = [frame(k, 2.0 * (k % 3), perhaps=["same", 10.0 * (k // 3) + k]) for k in range(6)]
    assert len(split_volumes(jitter)) == 1


def test_two_attributes_part_one_after_the_other():
    found = [frame(k, 2.0 * (k % 3), perhaps=[k // 6, (k // 3) % 2]) for k in range(12)]
    assert sources(split_volumes(found)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_positions_that_repeat_unevenly_are_left_together_and_refused():
    found = [frame(k, 2.0 * k, perhaps=[0.0]) for k in range(4)] + [frame(9, 2.0, perhaps=[1.0])]
    (part,) = split_volumes(found)
    with pytest.raises(GeometryError, match="Several different images lie at one position"):
        plan_stack(part, lambda a, b: False)
    assert len(plan_stack(part, lambda a, b: True).frames) == 4


def test_orientation_parts_beyond_tolerance_only():
    turned = np.array([1.0, 0.0, 5e-8, 0.0, 1.0, 0.0])
    found = [frame(k, 2.0 * k, orientation=turned if k % 2 else np.array(AXIAL)) for k in range(4)]
    assert len(split_volumes(found)) == 1
    other = frame(9, 2.0, orientation=np.array([0.0, 1.0, 0.0, 0.0, 0.0, -1.0]))
    parts = split_volumes([*found, other])
    assert sources(parts) == [[0, 1, 2, 3], [9]]
    assert differences(parts) == ["orientation"]
    with pytest.raises(GeometryError, match="single slice"):
        plan_stack(parts[1])


def test_slice_thickness_parts_uneven_spacing_only():
    thin = [frame(k, 2.0 * k) for k in range(4)]
    thick = [frame(4 + k, 8.0 + 5.0 * k, thickness=5.0) for k in range(4)]
    assert sources(split_volumes(thin + thick)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    even = [frame(k, 2.0 * k, thickness=2.0 + k % 2) for k in range(4)]
    assert len(split_volumes(even)) == 1
