from __future__ import annotations

import numpy as np
import pydicom
import pytest

from deid_tools.admit import Refusal
from deid_tools.face_series import deface
from deid_tools.faces import ANGLES_DEGREES, FaceCut, LabelledBrain, face_cut, mask_points
from deid_tools.instances import cut, images
from deid_tools.modules import save_clean, stamp
from deid_tools.pipeline import deidentify, read_pairs
from deid_tools.plant import write_planted_study
from deid_tools.treatment import PixelPolicy, labelled_brain, says_head
from deid_tools.uids import fresh_uid
from deid_tools.verify import verify_folder
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, SemanticMap
from medlsdm.volumes import write_nifti

SIZE = (60, 76, 76)
SPACING = 3.0
ORIGIN = np.array([-90.0, -110.0, -130.0])
BRAIN = LabelSchema("brain", (LabelClass(0, "background"), LabelClass(1, "brain", "12738006")))


def places() -> tuple[np.ndarray, ...]:
    return tuple(
        o + SPACING * g for o, g in zip(ORIGIN, np.meshgrid(*map(np.arange, SIZE), indexing="ij"), strict=True)
    )


def ball(middle, half) -> np.ndarray:
    return sum(((p - m) / h) ** 2 for p, m, h in zip(places(), middle, half, strict=True)) <= 1


def phantom(modality: Modality) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a head with skull, brain, neck and a face with a nose; return it and its parts."""
    brain = ball((0, 0, 10), (62, 75, 55)) | ball((0, -45, -35), (45, 32, 28))
    inner, outer = ball((0, 0, 5), (68, 82, 66)), ball((0, 0, 5), (74, 88, 72))
    right, forward, upward = places()
    jaw = (np.abs(right) < 50) & (forward > -20) & (forward < 85) & (upward < -20) & (upward > -115)
    neck = (np.hypot(right, forward + 25) < 52) & (upward < -20)
    nose = ball((0, 92, -45), (12, 20, 16))
    head = ball((0, 0, 5), (80, 95, 78)) | jaw | neck | nose
    ct = modality is Modality.CT
    values = np.where(head, 40.0, -1000.0) if ct else np.where(head, 300.0, 2.0)
    values[outer & (upward > -60)] = 900.0 if ct else 20.0
    values[inner & (upward > -60)] = 8.0 if ct else 60.0
    values[brain] = 35.0 if ct else 400.0
    noise = np.random.default_rng(4).normal(0, 4, SIZE)
    face = (nose | jaw) & (forward > 55) & (upward < -50)
    return np.rint(values + noise), {"head": head, "brain": brain, "face": face}


def write(tmp_path, array, affine, modality) -> list:
    uids = {k: fresh_uid() for k in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    paths = []
    for n, ds in enumerate(images(cut(array, Geometry(affine, array.shape)), modality, uids)):
        stamp(ds)
        paths.append(tmp_path / f"{n + 1:04d}.dcm")
        save_clean(ds, paths[-1])
    return paths


def volume(paths) -> np.ndarray:
    slices = [pydicom.dcmread(p) for p in paths]
    slices.sort(key=lambda ds: [float(v) for v in ds.ImagePositionPatient][::-1])
    return np.stack([ds.pixel_array for ds in slices])


def upright() -> np.ndarray:
    affine = np.diag([SPACING] * 3 + [1.0])
    affine[:3, 3] = ORIGIN
    return affine


def in_space(paths, mask) -> np.ndarray:
    """Return the pixel values under a mask of the phantom, wherever the slices lie."""
    found = np.zeros(SIZE)
    for path in paths:
        ds = pydicom.dcmread(path)
        o = np.array([float(v) for v in ds.ImageOrientationPatient]).reshape(2, 3) * [-1, -1, 1]
        corner = np.array([float(v) for v in ds.ImagePositionPatient]) * [-1, -1, 1]
        r, c = np.meshgrid(np.arange(ds.Rows), np.arange(ds.Columns), indexing="ij")
        points = corner + SPACING * (r[..., None] * o[1] + c[..., None] * o[0])
        index = np.rint((points - ORIGIN) / SPACING).astype(int)
        found[tuple(np.moveaxis(index, -1, 0))] = ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(
            ds.get("RescaleIntercept", 0)
        )
    return found[mask]


@pytest.mark.parametrize("modality", [Modality.CT, Modality.MR])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (0, 2, 1)], ids=["axial", "sagittal", "coronal"])
def test_the_face_goes_and_the_brain_stays_without_labels(tmp_path, modality, axes):
    array, parts = phantom(modality)
    affine = upright()
    turned = affine.copy()
    turned[:3, :3] = affine[:3, :3][:, axes]
    paths = write(tmp_path, np.ascontiguousarray(np.transpose(array, axes)), turned, modality)
    before = {name: in_space(paths, part) for name, part in parts.items()}
    done = deface(paths, hu=modality is Modality.CT, declared=True)
    assert done.outcome == "removed"
    assert "dome" in done.guard or "estimate" in done.guard
    np.testing.assert_array_equal(in_space(paths, parts["brain"]), before["brain"])
    assert (in_space(paths, parts["face"]) != before["face"]).mean() > 0.95
    written = pydicom.dcmread(paths[0])
    assert written.RecognizableVisualFeatures == "NO"
    assert [i.CodeValue for i in written.DeidentificationMethodCodeSequence] == ["113100", "113102"]


def test_labels_guard_every_voxel_and_a_picture_shows_the_effect(tmp_path):
    array, parts = phantom(Modality.MR)
    paths = write(tmp_path, array, upright(), Modality.MR)
    before = in_space(paths, parts["brain"])
    brain = LabelledBrain(mask_points(parts["brain"], upright()), whole=True)
    done = deface(paths, hu=False, declared=False, brain=brain, picture=tmp_path / "inside" / "face.png")
    assert (done.outcome, done.guard) == ("removed", "labels")
    np.testing.assert_array_equal(in_space(paths, parts["brain"]), before)
    from matplotlib.image import imread

    shown = imread(tmp_path / "inside" / "face.png")
    half = shown.shape[0] // 2
    assert (np.abs(shown[:half] - shown[half : 2 * half]) > 0.2).mean() > 0.05
    assert (tmp_path / "inside" / "face.png").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("size", "declared"), [(0.75, False), (0.62, True)], ids=["a child", "a newborn, declared"])
def test_the_face_of_a_smaller_head_goes(tmp_path, size, declared):
    array, parts = phantom(Modality.MR)
    affine = upright()
    affine[:3] *= size
    paths = write(tmp_path, array, affine, Modality.MR)
    before = volume(paths)
    assert deface(paths, hu=False, declared=declared).outcome == "removed"
    change = np.flip(np.transpose(volume(paths) != before, (2, 1, 0)), (0, 1))  # rows and columns were turned to LPS
    assert change[parts["face"]].mean() > 0.75
    assert not change[parts["brain"]].any()


def test_what_is_no_head_is_left_alone_unless_the_header_says_head(tmp_path):
    array = np.where(ball((0, 0, 0), (85, 105, 500)), 40.0, -1000.0)  # a trunk: it does not end in the field of view
    paths = write(tmp_path, array, upright(), Modality.CT)
    before = volume(paths)
    assert deface(paths, hu=True, declared=False).outcome == "no head"
    np.testing.assert_array_equal(volume(paths), before)
    with pytest.raises(Refusal, match="no head could be told"):
        deface(paths, hu=True, declared=True)


def test_a_crop_too_small_for_a_face_passes(tmp_path):
    array = np.random.default_rng(1).normal(200, 20, (20, 20, 20)).round()
    paths = write(tmp_path, array, upright(), Modality.MR)
    assert deface(paths, hu=False, declared=True).outcome == "no face in view"


def test_a_head_whose_slices_form_no_stack_is_refused(tmp_path):
    array, _ = phantom(Modality.MR)
    paths = write(tmp_path, array, upright(), Modality.MR)[:1]
    with pytest.raises(Refusal, match="form no stack"):
        deface(paths, hu=False, declared=True)


def test_no_plane_enters_the_points_that_set_it():
    points = np.random.default_rng(2).normal(0, 40, (500, 3))
    limits = face_cut(points, 5.0)
    assert not limits.removes(points[:, 1], points[:, 2]).any()
    assert [angle for angle, _ in limits.limits] == [float(a) for a in ANGLES_DEGREES]
    other = FaceCut(tuple((angle, limit + 10) for angle, limit in limits.limits))
    assert limits.joined(other) == other
    assert limits.removes(np.array([500.0]), np.array([0.0])).all()


def test_a_label_map_guards_by_code_or_name_and_says_whether_it_is_whole():
    schema = LabelSchema(
        "x", (LabelClass(0, "background"), LabelClass(1, "part", "12738006"), LabelClass(2, "left hippocampus"))
    )
    labels = np.zeros((50, 50, 50), np.uint8)
    geometry = Geometry(np.diag([3.0, 3.0, 3.0, 1.0]), labels.shape)
    assert labelled_brain(labels, geometry, schema) is None
    labels[:2, :2, :2] = 2
    part = labelled_brain(labels, geometry, schema)
    assert part is not None
    assert (part.points.shape, part.whole) == ((8, 3), False)
    labels[10:45, 10:45, 10:45] = 1
    whole = labelled_brain(labels, geometry, schema)
    assert whole is not None
    assert whole.whole


def test_a_header_says_head_in_several_ways():
    ds = pydicom.Dataset()
    assert not says_head(ds)
    ds.BodyPartExamined = "KNEE"
    assert not says_head(ds)
    ds.BodyPartExamined = "NECK"  # shows nose, mouth and chin
    assert says_head(ds)
    ds.BodyPartExamined = "KNEE"
    item = pydicom.Dataset()
    item.CodeMeaning = "Brain structure"
    ds.AnatomicRegionSequence = [item]
    assert says_head(ds)


@pytest.mark.usefixtures("without_tesseract")
@pytest.mark.parametrize("form", ["DICOM SEG", "NIfTI"])
def test_a_labelled_brain_stays_bit_for_bit_and_the_face_goes(tmp_path, keys, form):
    array, parts = phantom(Modality.CT)
    geometry = Geometry(upright(), SIZE)
    labels = SemanticMap(parts["brain"].astype(np.uint8), geometry, BRAIN)
    write_planted_study(array, geometry, Modality.CT, labels, tmp_path / "in", seed=3, hospital="Northgate")
    if form == "NIfTI":
        segmentation = next((tmp_path / "in").rglob("*_SEG.dcm"))
        write_nifti(segmentation.parent / "brain.nii.gz", labels.array.astype(np.uint16), geometry)
        segmentation.unlink()
    policy = PixelPolicy(pictures=tmp_path / "inside")
    report = deidentify(tmp_path / "in", tmp_path / "out", keys, schema=BRAIN, policy=policy)
    (series,) = report.series
    assert (series.pixels.face, series.pixels.guard, series.labels) == ("removed", "labels", 1)
    (pair,) = read_pairs(tmp_path / "out", BRAIN)
    assert pair.scan is not None
    assert pair.labels is not None
    np.testing.assert_array_equal(pair.labels.array, labels.array)
    np.testing.assert_array_equal(pair.scan.array[parts["brain"]], array[parts["brain"]])
    assert (pair.scan.array[parts["face"]] == -1000).all()
    assert [p.suffix for p in (tmp_path / "inside").iterdir()] == [".png"]
    ds = pydicom.dcmread(next((tmp_path / "out").rglob("0001.dcm")))
    assert ds.RecognizableVisualFeatures == "NO"
    assert "113102" in [item.CodeValue for item in ds.DeidentificationMethodCodeSequence]


@pytest.mark.usefixtures("without_tesseract")
@pytest.mark.parametrize("form", ["DICOM SEG", "NIfTI"])
def test_no_label_map_outlines_the_face_that_was_cut_off_not_even_one_that_comes_later(tmp_path, keys, form):
    skin = LabelSchema("skin", (LabelClass(0, "background"), LabelClass(1, "brain", "12738006"), LabelClass(2, "body")))
    array, parts = phantom(Modality.CT)
    geometry = Geometry(upright(), SIZE)
    outlined = SemanticMap(np.where(parts["brain"], 1, parts["head"] * 2).astype(np.uint8), geometry, skin)
    write_planted_study(array, geometry, Modality.CT, outlined, tmp_path / "in", seed=3, hospital="Northgate")
    segmentation = next((tmp_path / "in").rglob("*_SEG.dcm"))
    if form == "NIfTI":
        write_nifti(segmentation.parent / "body.nii.gz", outlined.array.astype(np.uint16), geometry)
        segmentation.unlink()
    late = next(path for path in (tmp_path / "in").rglob("*") if path.name in (segmentation.name, "body.nii.gz"))
    for come in (True, False):
        out = tmp_path / f"out {come}"
        if not come:
            late.rename(tmp_path / late.name)
            assert deidentify(tmp_path / "in", out, keys, schema=skin).series[0].labels == 0
            (tmp_path / late.name).rename(late)
        report = deidentify(tmp_path / "in", out, keys, schema=skin)
        assert [s.labels for s in report.series] == [1], report.reasons()
        (pair,) = read_pairs(out, skin)
        assert pair.labels is not None
        assert not pair.labels.array[parts["face"]].any()
        assert (pair.labels.array[parts["brain"]] == 1).all()
        assert (pair.labels.array == 2).sum() > 1000
        assert verify_folder(out) == []
