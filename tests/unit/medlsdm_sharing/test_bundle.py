import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medlsdm.errors import BusyError, DataError, GateError, IntegrityError, NotSyntheticError
from medlsdm.model_card import ModelCard
from medlsdm.sharing import bundle
from medlsdm.sharing.bundle import export, public_geometry
from medlsdm.sharing.gate import AuditReport, VolumeVerdict, volume_digest
from medlsdm.sharing.gate_policy import GatePolicy
from medlsdm.sharing.receipt import verify_receipt
from medlsdm.types import Geometry, SyntheticVolume

from .conftest import GEOMETRY, batch, keys_of, reference_pairs


def judged(volumes: list[SyntheticVolume], passed: list[bool], refusal: str | None = None) -> AuditReport:
    verdicts = tuple(
        VolumeVerdict(volume_digest=volume_digest(v), passed=p, reasons=() if p else ("why",), similarity=0.7, gap=0.1)
        for v, p in zip(volumes, passed, strict=True)
    )  # fmt: skip
    return AuditReport(
        policy=GatePolicy(), verdicts=verdicts, planted=60, caught=60, recall_bound=0.95, kinds={}, refusal=refusal
    )


@pytest.fixture
def options(card: ModelCard, key: Ed25519PrivateKey) -> dict:
    return {
        "card": card.to_json_bytes(), "card_markdown": card.to_markdown(), "site": "site-a",
        "signing_key": key, "audit_head": "a" * 64, "write_dicom": None,
    }  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path, card: ModelCard, options: dict) -> Path:
    volumes, labels = batch(3, card.digest)
    export(volumes, labels, judged(volumes, [True, False, True]), tmp_path / "out", **options)
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_writes_what_passed_and_nothing_else(exported: Path, card: ModelCard):
    assert names(exported) == [
        "README.txt", "gate.json", "labels/0001.nii.gz", "labels/0002.nii.gz", "model-card.json", "model-card.md",
        "receipt.json", "volumes/0001.nii.gz", "volumes/0002.nii.gz",
    ]  # fmt: skip
    volumes, labels = batch(3, card.digest)
    second = nib.load(exported / "volumes/0002.nii.gz")
    np.testing.assert_array_equal(np.asarray(second.dataobj), volumes[2].array)
    np.testing.assert_array_equal(np.asarray(nib.load(exported / "labels/0002.nii.gz").dataobj), labels[2].array)
    assert "SYNTHETIC" in (exported / "README.txt").read_text()
    assert (exported / "model-card.json").read_bytes() == card.to_json_bytes()
    assert not keys_of(json.loads((exported / "gate.json").read_text())) & {"similarity", "gap"}
    assert list(exported.parent.iterdir()) == [exported]


def test_the_receipt_is_signed_and_verifies(exported: Path, key: Ed25519PrivateKey, card: ModelCard):
    receipt = verify_receipt(exported, key.public_key().public_bytes_raw())
    assert receipt == verify_receipt(exported, None)
    assert (receipt.site, receipt.audit_head, receipt.card_digest) == ("site-a", "a" * 64, card.digest)
    assert sorted([*receipt.files, "receipt.json"]) == names(exported)
    assert receipt.gate["blocked"] == 1


def test_a_foreign_key_is_refused(exported: Path):
    other = Ed25519PrivateKey.generate()
    with pytest.raises(IntegrityError, match="another key"):
        verify_receipt(exported, other.public_key().public_bytes_raw())


@pytest.mark.parametrize("name", ["README.txt", "gate.json", "volumes/0001.nii.gz", "labels/0002.nii.gz"])
def test_any_changed_byte_of_a_file_is_found(exported: Path, name: str):
    content = bytearray((exported / name).read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        (exported / name).write_bytes(changed)
        with pytest.raises(IntegrityError, match="was changed"):
            verify_receipt(exported)
    (exported / name).write_bytes(content)
    verify_receipt(exported)


def test_every_changed_value_of_the_receipt_is_found(exported: Path):
    path = exported / "receipt.json"
    original = json.loads(path.read_text())
    for field, value in original.items():
        changed = {int: lambda v: v + 1, str: lambda v: "0" + v[1:] if v[0] != "0" else "1" + v[1:]}.get(
            type(value), lambda v: type(v)()
        )(value)
        path.write_text(json.dumps(original | {field: changed}))
        with pytest.raises(IntegrityError):
            verify_receipt(exported)
    path.write_text(json.dumps(original | {"note": "added"}))
    with pytest.raises(IntegrityError):
        verify_receipt(exported)


def test_missing_and_extra_files_and_links_are_found(exported: Path):
    content = (exported / "gate.json").read_bytes()
    (exported / "gate.json").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        verify_receipt(exported)
    (exported / "gate.json").write_bytes(content)
    (exported / "volumes" / "0009.nii.gz").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="not on the receipt"):
        verify_receipt(exported)
    (exported / "volumes" / "0009.nii.gz").unlink()
    (exported / "link").symlink_to("gate.json")
    with pytest.raises(IntegrityError, match="link"):
        verify_receipt(exported)
    (exported / "link").unlink()
    (exported / "receipt.json").unlink()
    with pytest.raises(IntegrityError, match="no receipt"):
        verify_receipt(exported)


def test_nothing_but_a_synthetic_volume_is_taken(tmp_path: Path, card: ModelCard, options: dict):
    volumes, labels = batch(1, card.digest)
    report = judged(volumes, [True])
    scan = next(reference_pairs())[0]

    class Disguised(SyntheticVolume):
        pass

    fields = {f.name: getattr(volumes[0], f.name) for f in dataclasses.fields(volumes[0])}
    for item in (scan, Disguised(**fields), SimpleNamespace(**fields), volumes[0].array, None):
        with pytest.raises(NotSyntheticError):
            export([item], labels, report, tmp_path / "out", **options)  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_only_the_volumes_that_were_judged_may_leave(tmp_path: Path, card: ModelCard, options: dict):
    volumes, labels = batch(2, card.digest)
    report = judged(volumes, [True, True])
    smuggled = dataclasses.replace(volumes[0], array=next(reference_pairs())[0].array)
    for items in ([smuggled, volumes[1]], volumes[::-1], volumes[:1]):
        with pytest.raises(GateError, match="not the volumes"):
            export(items, labels[: len(items)], report, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_batch_and_one_where_none_passed_leave_nothing(tmp_path: Path, card: ModelCard, options: dict):
    volumes, labels = batch(2, card.digest)
    with pytest.raises(GateError, match="because"):
        export(volumes, labels, judged(volumes, [True, True], "because"), tmp_path / "out", **options)
    with pytest.raises(GateError, match="No volume passed"):
        export(volumes, labels, judged(volumes, [False, False]), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_model_card_is_refused(tmp_path: Path, options: dict):
    volumes, labels = batch(1, "f" * 64)
    with pytest.raises(DataError, match="model card"):
        export(volumes, labels, judged(volumes, [True]), tmp_path / "out", **options)


def test_an_existing_folder_is_never_overwritten(exported: Path, card: ModelCard, options: dict):
    before = {name: (exported / name).read_bytes() for name in names(exported)}
    volumes, labels = batch(1, card.digest)
    with pytest.raises(BusyError):
        export(volumes, labels, judged(volumes, [True]), exported, **options)
    assert {name: (exported / name).read_bytes() for name in names(exported)} == before
    (exported.parent / "empty").mkdir()
    export(volumes, labels, judged(volumes, [True]), exported.parent / "empty", **options)
    verify_receipt(exported.parent / "empty")


def test_a_failing_writer_leaves_nothing_half_done(tmp_path: Path, card: ModelCard, options: dict):
    volumes, labels = batch(2, card.digest)

    def fails(volume: SyntheticVolume, folder: Path) -> None:
        (folder / "half.dcm").write_bytes(b"x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        export(volumes, labels, judged(volumes, [True, True]), tmp_path / "out", **options | {"write_dicom": fails})
    assert list(tmp_path.iterdir()) == []


def _killed_while_exporting(folder: Path, card: ModelCard) -> None:
    bundle._settle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    volumes, labels = batch(1, card.digest)
    export(
        volumes, labels, judged(volumes, [True]), folder, card=card.to_json_bytes(), card_markdown="", site="s",
        signing_key=Ed25519PrivateKey.generate(), audit_head="0" * 64, write_dicom=None,
    )  # fmt: skip


def test_a_killed_export_leaves_no_export_folder(tmp_path: Path, card: ModelCard):
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_while_exporting, args=(tmp_path / "out", card)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [p.name[:11] for p in tmp_path.iterdir()] == [".exporting-"]


def test_dicom_is_written_through_the_given_writer_on_the_public_grid(tmp_path: Path, card: ModelCard, options: dict):
    volumes, labels = batch(1, card.digest)
    seen: list[SyntheticVolume] = []

    def writer(volume: SyntheticVolume, folder: Path) -> None:
        seen.append(volume)
        (folder / "slice.dcm").write_bytes(b"dicom")

    export(volumes, labels, judged(volumes, [True]), tmp_path / "out", **options | {"write_dicom": writer})
    assert "dicom/0001/slice.dcm" in verify_receipt(tmp_path / "out").files
    assert seen[0].geometry.matches(public_geometry(GEOMETRY))


def test_labels_stay_at_home_where_asked(tmp_path: Path, card: ModelCard, options: dict):
    volumes, labels = batch(1, card.digest)
    export(volumes, labels, judged(volumes, [True]), tmp_path / "out", **options, include_labels=False)
    assert not (tmp_path / "out" / "labels").exists()


def test_position_and_tilt_of_the_source_do_not_leave(exported: Path):
    image = nib.load(exported / "volumes/0001.nii.gz")
    assert nib.aff2axcodes(image.affine) == tuple(GEOMETRY.orientation) == ("L", "P", "S")
    np.testing.assert_allclose(image.header.get_zooms(), GEOMETRY.spacing, atol=1e-3)
    centre = image.affine @ [*((np.array(image.shape) - 1) / 2), 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-4)
    np.testing.assert_array_equal(np.count_nonzero(image.affine[:3, :3], axis=0), 1)


def test_public_geometry_keeps_every_axis_order():
    for linear in (np.eye(3)[[2, 0, 1]] * [1, -2, 3], np.diag([-0.5, 0.7, -3.0])):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = linear, [5, 6, 7]
        geometry = Geometry(affine, (5, 6, 8))
        left = public_geometry(geometry)
        np.testing.assert_allclose(left.affine[:3, :3], linear)
        assert left.orientation == geometry.orientation


def test_all_files_carry_one_time_and_plain_permissions(exported: Path):
    files = [p for p in exported.rglob("*") if p.is_file()]
    assert len({p.stat().st_mtime for p in files}) == 1
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {"0o644"}


def test_a_folder_filled_meanwhile_is_not_overwritten(tmp_path: Path, card: ModelCard, options: dict, monkeypatch):
    volumes, labels = batch(1, card.digest)
    original = bundle._write_documents

    def slow(*args):
        original(*args)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_bytes(b"x")

    monkeypatch.setattr(bundle, "_write_documents", slow)
    with pytest.raises(BusyError):
        export(volumes, labels, judged(volumes, [True]), tmp_path / "out", **options)
    assert os.listdir(tmp_path / "out") == ["theirs"]
    assert os.listdir(tmp_path) == ["out"]
