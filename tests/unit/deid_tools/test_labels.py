from __future__ import annotations

import warnings

import numpy as np
import pydicom
import pytest

from deid_tools.labels import read_segmentation
from deid_tools.nested import code_meaning, match_class
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.types import Geometry, LabelClass, LabelSchema


def segmentation(study) -> pydicom.FileDataset:
    return pydicom.dcmread(next(study.source.rglob("*SEG.dcm")))


def test_agrees_with_highdicom(study, schema):
    import highdicom

    ds = segmentation(study)
    ours = read_segmentation(ds, study.labels.geometry, schema)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = highdicom.seg.Segmentation.from_dataset(ds).get_volume(combine_segments=True)
    assert int((ours.array == 1).sum()) == int((oracle.array == 1).sum())
    np.testing.assert_array_equal(ours.array, study.labels.array)


def test_overlap_is_refused_unless_a_priority_is_declared(study, schema):
    ds = segmentation(study)
    for frame in ds.PerFrameFunctionalGroupsSequence:
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = number
    bits = np.ones_like(ds.pixel_array)
    ds.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    with pytest.raises(DataError, match="overlap"):
        read_segmentation(ds, study.labels.geometry, schema)
    first = read_segmentation(ds, study.labels.geometry, schema, priority=("liver", "Geschwür"))
    second = read_segmentation(ds, study.labels.geometry, schema, priority=("Geschwür", "liver"))
    assert (first.array == 1).sum() > (second.array == 1).sum()
    assert set(np.unique(first.array)) <= {0, 1, 2}


def test_fractions_count_from_one_half(study, schema):
    ds = segmentation(study)
    mask = ds.pixel_array
    ds.SegmentationType, ds.MaximumFractionalValue = "FRACTIONAL", 200
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    for value, expected in ((99, 0), (100, int((study.labels.array > 0).sum()))):
        ds.PixelData = (mask * np.uint8(value)).astype(np.uint8).tobytes()
        assert int((read_segmentation(ds, study.labels.geometry, schema).array > 0).sum()) == expected


def test_a_label_map_object_uses_its_values(study, schema):
    ds = segmentation(study)
    values = ds.pixel_array.astype(np.uint8)
    for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        values[k] *= frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    ds.SegmentationType = "LABELMAP"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = values.tobytes()
    np.testing.assert_array_equal(read_segmentation(ds, study.labels.geometry, schema).array, study.labels.array)


def test_refuses_another_grid_and_unknown_segments(study, schema):
    ds = segmentation(study)
    smaller = Geometry(study.labels.geometry.affine, (20, 16, 5))
    with pytest.raises(GeometryError, match="voxels"):
        read_segmentation(ds, smaller, schema)
    other = LabelSchema("other", (LabelClass(0, "background"), LabelClass(7, "spleen", "78961009")))
    with pytest.raises(SchemaError, match="2 of 2"):
        read_segmentation(ds, study.labels.geometry, other)


def test_segments_map_by_code_then_by_exact_name():
    sides = LabelSchema(
        "kidneys",
        (
            LabelClass(0, "background"),
            LabelClass(1, "left kidney", "64033007"),
            LabelClass(2, "right kidney", "64033007"),
            LabelClass(3, "liver", "10200004"),
        ),
    )

    def found(*parts: str) -> int | None:
        cls = match_class(sides, *parts)
        return cls.id if cls else None

    assert found("64033007", "SCT", "RIGHT Kidney") == 2
    assert found("64033007", "SCT", "kidney") is None
    assert found("T-62000", "SRT", "anything") == 3
    assert found("", "", "Liver") == 3
    assert found("", "", "liver ") == 3
    assert found("", "", "liver of Anna") is None
    assert code_meaning("10200004", "SCT") == "Liver"
    assert code_meaning("12345678", "SCT") == ""
