from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pydicom
import pytest

from deid_tools.labels import combine
from deid_tools.nested import code_meaning, match_class
from deid_tools.segmentations import read_segmentation, refuse_undescribed
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.types import Geometry, LabelClass, LabelSchema, SemanticMap


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
    first = read_segmentation(ds, study.labels.geometry, replace(schema, priority=("liver", "Geschwür")))
    second = read_segmentation(ds, study.labels.geometry, replace(schema, priority=("Geschwür", "liver")))
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


def test_a_segmentation_with_turned_axes_lands_on_the_same_voxels(study, schema):
    ds = segmentation(study)
    turned = ds.pixel_array.transpose(0, 2, 1)[:, ::-1]
    shared = ds.SharedFunctionalGroupsSequence[0]
    orientation = [float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient]
    spacing = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    along_rows = np.array(orientation[:3])
    for group in ds.PerFrameFunctionalGroupsSequence:
        position = np.array([float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient])
        moved = position + along_rows * spacing[1] * (ds.Columns - 1)
        group.PlanePositionSequence[0].ImagePositionPatient = [round(v, 6) for v in moved.tolist()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = orientation[3:] + [-v for v in orientation[:3]]
    shared.PixelMeasuresSequence[0].PixelSpacing = spacing[::-1]
    ds.Rows, ds.Columns = ds.Columns, ds.Rows
    ds.PixelData = np.packbits(turned.astype(np.uint8).ravel(), bitorder="little").tobytes()
    np.testing.assert_array_equal(read_segmentation(ds, study.labels.geometry, schema).array, study.labels.array)


def test_a_coarser_or_wider_spaced_segmentation_is_refused(study, schema):
    ds = segmentation(study)
    measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    fine = [float(v) for v in measures.PixelSpacing]
    measures.PixelSpacing = [2 * v for v in fine]
    blank = ds.pixel_array.copy()
    blank[:, 8:] = 0
    blank[:, :, 10:] = 0
    ds.PixelData = np.packbits(blank.ravel(), bitorder="little").tobytes()
    with pytest.raises(GeometryError, match="voxels"):
        read_segmentation(ds, study.labels.geometry, schema)
    measures.PixelSpacing = fine
    measures.SpacingBetweenSlices = 5.0
    with pytest.raises(GeometryError, match="spaced unlike"):
        read_segmentation(ds, study.labels.geometry, schema)


def test_the_threshold_of_fractions_can_be_chosen(study, schema):
    ds = segmentation(study)
    mask = ds.pixel_array
    ds.SegmentationType, ds.MaximumFractionalValue = "FRACTIONAL", 100
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = (mask * np.uint8(30)).astype(np.uint8).tobytes()
    for fraction, expected in ((0.3, (study.labels.array > 0).sum()), (0.31, 0), (0.0, (study.labels.array > 0).sum())):
        found = read_segmentation(ds, study.labels.geometry, schema, fraction=fraction)
        assert (found.array > 0).sum() == expected


@pytest.mark.usefixtures("without_tesseract")
def test_a_label_map_segmentation_of_another_writer_passes_the_pipeline(study, schema, keys, tmp_path):
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.coding import Code

    from deid_tools.pipeline import deidentify, read_pairs
    from deid_tools.series import plan_series
    from medlsdm.volumes import from_ras

    old = next(study.source.rglob("*SEG.dcm"))
    old.unlink()
    datasets = [pydicom.dcmread(p) for p in sorted(study.source.rglob("*.dcm"))]
    plan = plan_series(datasets)
    values = from_ras(study.labels.array, plan.geometry).astype(np.uint8)
    structure = Code("123037004", "SCT", "Anatomical Structure")
    segments = [
        SegmentDescription(1, "a liver", structure, Code("10200004", "SCT", "Liver"), "MANUAL"),
        SegmentDescription(2, "Geschwür", structure, Code("X1", "99LOCAL", "of Annegret"), "MANUAL"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = Segmentation(
            [datasets[f.source] for f in plan.frames], values, "LABELMAP", segments,
            series_instance_uid="1.2.3.4.7", series_number=9, sop_instance_uid="1.2.3.4.8", instance_number=1,
            manufacturer="X", manufacturer_model_name="Y", software_versions="1", device_serial_number="Z",
            content_description="for Annegret",
        )  # fmt: skip
    ds.PhotometricInterpretation = "PALETTE COLOR"
    ds.save_as(old)
    report = deidentify(study.source, tmp_path / "out", keys, schema=schema)
    assert report.held == ()
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert pair.labels is not None
    np.testing.assert_array_equal(pair.labels.array, study.labels.array)
    (written,) = (tmp_path / "out").rglob("seg-*.dcm")
    assert b"Annegret" not in written.read_bytes()
    ds.PixelData = bytes([77]) + ds.PixelData[1:]
    ds.save_as(old)
    report = deidentify(study.source, tmp_path / "again", keys, schema=schema)
    assert report.reasons() == {"The segmentation uses a segment that it does not describe.": 1}
    code = ds.SegmentSequence[-1].SegmentedPropertyTypeCodeSequence[0]
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "78961009", "SCT", "Spleen"
    ds.save_as(old)
    report = deidentify(study.source, tmp_path / "without a schema", keys)
    assert report.reasons() == {"The segmentation uses a segment that it does not describe.": 1}


def test_aliases_and_priority_are_the_sites_own_and_travel_with_its_schema():
    schema = LabelSchema.from_json(
        {
            "name": "s",
            "priority": ["lesion"],
            "classes": [
                {"id": 0, "name": "background", "aliases": "couch"},
                {"id": 1, "name": "lesion", "aliases": ["GTV_1", "gross tumour"]},
            ],
        }
    )
    assert LabelSchema.from_json(schema.to_json()) == schema
    assert [getattr(schema.by_name(n), "id", None) for n in ("gtv 1", " Gross  Tumour", "COUCH", "couch 2")] == [
        1,
        1,
        0,
        None,
    ]
    plain = LabelSchema("s", (LabelClass(0, "background"), LabelClass(1, "lesion")))
    assert plain.digest == schema.digest
    assert "aliases" not in str(plain.to_json())
    for classes, priority in (
        ((LabelClass(0, "background"), LabelClass(1, "a", aliases=("b_c",)), LabelClass(2, "B C")), ()),
        ((LabelClass(0, "background"), LabelClass(1, "a", aliases=("*",))), ()),
        ((LabelClass(0, "background"), LabelClass(1, "a")), ("b",)),
    ):
        with pytest.raises(SchemaError):
            LabelSchema("s", classes, priority)


def test_two_classes_of_one_code_need_a_name_even_where_the_rest_is_left_out():
    sides = LabelSchema(
        "kidneys",
        (
            LabelClass(0, "background", aliases=("*",)),
            LabelClass(1, "left kidney", "64033007"),
            LabelClass(2, "right kidney", "64033007", aliases=("Niere rechts",)),
        ),
    )
    assert match_class(sides, "64033007", "SCT", "kidney") is None
    right = match_class(sides, "64033007", "SCT", "niere_rechts")
    assert right is not None
    assert right.id == 2
    spleen = match_class(sides, "78961009", "SCT", "spleen")
    assert spleen is not None
    assert spleen.id == 0


def test_label_maps_of_one_organ_each_become_one(schema):
    grid = Geometry(np.eye(4), (4, 4, 4))
    first, second = np.zeros(grid.shape, np.uint16), np.zeros(grid.shape, np.uint16)
    first[:2], second[3:] = 1, 2
    whole = combine([SemanticMap(first, grid, schema), SemanticMap(second, grid, schema)], schema)
    np.testing.assert_array_equal(whole.array, first + second)
    with pytest.raises(DataError, match="which one counts"):
        combine([whole, SemanticMap(second, grid, schema)], schema)
    second[1] = 2
    with pytest.raises(DataError, match="overlap"):
        combine([SemanticMap(first, grid, schema), SemanticMap(second, grid, schema)], schema)


@pytest.mark.parametrize(("values", "fine"), [([0, 1, 2, 9], True), ([0, 1, 3], False)])
def test_a_label_map_may_hold_only_the_numbers_that_it_describes(values, fine):
    ds = pydicom.Dataset()
    ds.SegmentationType, ds.BitsAllocated, ds.PixelPaddingValue = "LABELMAP", 16, 9
    ds.SegmentSequence = [pydicom.Dataset(), pydicom.Dataset()]
    for number, segment in enumerate(ds.SegmentSequence, start=1):
        segment.SegmentNumber = number
    ds.PixelData = np.array(values, "<u2").tobytes()
    if fine:
        refuse_undescribed(ds)
    else:
        with pytest.raises(DataError, match="does not describe"):
            refuse_undescribed(ds)
