"""Write what leaves the node. Nothing else in the code base writes to an export folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import nibabel as nib
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medlsdm.checks import file_digest, write_atomic
from medlsdm.errors import BusyError, DataError, GateError, ResourceError
from medlsdm.model_card import ModelCard
from medlsdm.sharing.gate import AuditReport, check_synthetic, volume_digest
from medlsdm.sharing.receipt import RECEIPT_NAME, ExportReceipt, files_below
from medlsdm.types import Geometry, SemanticMap, SyntheticVolume
from medlsdm.volumes import write_nifti

log = logging.getLogger(__name__)

DicomWriter = Callable[[SyntheticVolume, Path], object]

README = """SYNTHETIC DATA - NOT PATIENTS - NOT FOR DIAGNOSIS

The volumes in this folder were made by a generative model from label maps. No volume shows a
patient, and none may be used to examine, diagnose or treat anyone.

volumes/         the synthetic volumes, NIfTI
labels/          the label map each was made from, same number and grid (where included)
dicom/           the same volumes as DICOM, marked synthetic (where included)
model-card.json  the model: data, training, privacy, limits; model-card.md is the same to read
gate.json        what the site's export gate checked
receipt.json     SHA-256 of every file, signed by the site

Verify the folder before use. At the site: medlsdm-node audit FOLDER. Elsewhere, with the site's public
key got from the site itself: medlsdm.sharing.receipt.verify_receipt(folder, public_key).
The gate is a copy check with a measured recall. Read in the model card whether the model was
trained with differential privacy; without it there is no formal guarantee.
"""


def public_geometry(geometry: Geometry) -> Geometry:
    """Return the grid as it may leave: same spacing and axes, straight, with its centre at 0 mm.

    Where and how obliquely a patient lay in the scanner is a trace of the patient.
    """
    spacing = np.round(geometry.spacing, 4)
    turn = nib.orientations.axcodes2ornt(geometry.orientation)
    linear = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(turn):
        linear[int(world), axis] = sign * spacing[axis]
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = -linear @ ((np.array(geometry.shape) - 1) / 2)
    return Geometry(affine, geometry.shape)


def export(
    volumes: Sequence[SyntheticVolume],
    labels: Sequence[SemanticMap],
    report: AuditReport,
    folder: Path,
    *,
    card: bytes,
    card_markdown: str,
    site: str,
    signing_key: Ed25519PrivateKey,
    audit_head: str,
    write_dicom: DicomWriter | None = None,
    include_labels: bool = True,
) -> ExportReceipt:
    """Write the volumes that passed, with card, gate verdict and signed receipt, and return the receipt.

    The folder appears whole or not at all. Volumes and maps leave on ``public_geometry``.

    Args:
        volumes: Exactly what ``report`` judged, in its order.
        labels: The map each was made from.
        report: The gate's verdict.
        folder: A folder that does not exist yet, or is empty.
        card: The model card's JSON, byte for byte.
        card_markdown: The same to read.
        site: The site's name, as it signs.
        signing_key: The site's key.
        audit_head: Head of the node's audit log.
        write_dicom: Writes one volume as a DICOM series into a new folder.
        include_labels: Whether the label maps leave too. A real label map is real anatomy.

    Raises:
        NotSyntheticError: An item is not exactly a SyntheticVolume.
        GateError: The batch is refused, none passed, or these are not the volumes that were judged.
        DataError: The card is not the one that the volumes were made with.
        BusyError: The folder holds something already.
    """
    kept = _passed(volumes, labels, report)
    card_digest = ModelCard.from_json_bytes(card).digest
    if any(v.provenance.card_digest != card_digest for v, _ in kept):
        raise DataError("The model card is not the one that the volumes were made with.", "Give that card.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _busy(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".exporting-"))
    try:
        _write_volumes(draft, kept, write_dicom, include_labels)
        _write_documents(draft, card, card_markdown, report)
        receipt = ExportReceipt(
            id=uuid.uuid4().hex,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            site=site,
            files={name: file_digest(path) for name, path in files_below(draft).items()},
            card_digest=card_digest,
            checkpoint_digests=tuple(sorted({v.provenance.checkpoint_digest for v, _ in kept})),
            gate=report.to_public_json(),
            audit_head=audit_head,
        ).sign(signing_key)
        write_atomic(draft / RECEIPT_NAME, receipt.to_bytes())
        _settle(draft, folder, receipt.time)
    except OSError as error:
        raise ResourceError(
            f"The export could not be written ({error.strerror}).", "Check free space and permissions."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("exported %d synthetic volumes, export %s", len(kept), receipt.id)
    return receipt


def _passed(
    volumes: Sequence[SyntheticVolume], labels: Sequence[SemanticMap], report: AuditReport
) -> list[tuple[SyntheticVolume, SemanticMap]]:
    """Return the volumes that passed, with their maps, once it is sure that these are what the gate judged."""
    check_synthetic(volumes, labels)
    report.raise_if_refused()
    if [volume_digest(v) for v in volumes] != [v.volume_digest for v in report.verdicts]:
        raise GateError("These are not the volumes that the gate judged.", "Audit exactly what is to be exported.")
    kept = [(v, m) for v, m, verdict in zip(volumes, labels, report.verdicts, strict=True) if verdict.passed]
    if not kept:
        raise GateError("No volume passed the gate; nothing is exported.", "See the gate's reasons.")
    return kept


def _write_volumes(
    draft: Path,
    kept: Sequence[tuple[SyntheticVolume, SemanticMap]],
    write_dicom: DicomWriter | None,
    include_labels: bool,
) -> None:
    for number, (volume, semantic) in enumerate(kept, 1):
        name, geometry = f"{number:04d}", public_geometry(volume.geometry)
        write_nifti(draft / "volumes" / f"{name}.nii.gz", volume.array.astype(np.float32), geometry)
        if include_labels:
            write_nifti(draft / "labels" / f"{name}.nii.gz", semantic.array, geometry)
        if write_dicom:
            (draft / "dicom" / name).mkdir(parents=True)
            write_dicom(replace(volume, geometry=geometry), draft / "dicom" / name)


def _write_documents(draft: Path, card: bytes, card_markdown: str, report: AuditReport) -> None:
    write_atomic(draft / "model-card.json", card)
    write_atomic(draft / "model-card.md", card_markdown.encode())
    write_atomic(draft / "gate.json", json.dumps(report.to_public_json(), indent=2, sort_keys=True).encode() + b"\n")
    write_atomic(draft / "README.txt", README.encode())


def _busy(folder: Path) -> BusyError:
    return BusyError(f"The export folder {folder.name!r} holds something already.", "Choose a new folder.")


def _settle(draft: Path, folder: Path, time: str) -> None:
    """Give every file the receipt's time, make it durable, and move the draft into place."""
    moment = datetime.fromisoformat(time).timestamp()
    for path in sorted(draft.rglob("*"), reverse=True):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (moment, moment))
    draft.chmod(0o755)
    try:
        draft.rename(folder)  # replaces an empty folder; refuses one that was filled meanwhile
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _busy(folder) from error
        raise
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
