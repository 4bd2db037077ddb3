"""The demo's hospitals: patients as DICOM with planted identifiers, and label maps to synthesise from.

Label maps for synthesis never belong to a patient that is trained on: they are made up, or held out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medlsdm.checks import existing_folder, write_atomic
from medlsdm.config import config_folder
from medlsdm.errors import ConfigError, DataError, GeometryError
from medlsdm.types import LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import list_nifti, nifti_stem, read_nifti, write_nifti

SITES = ("site-a", "site-b", "site-c")
MADE_UP = {
    "site-a": ((Modality.CT, 10),),
    "site-b": ((Modality.MR, 10),),
    "site-c": ((Modality.CT, 6), (Modality.MR, 6)),
}
HELD_OUT = 4
CT_BELOW = -500.0

Pair = tuple[Scan, SemanticMap]
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Patient:
    """Say where a patient comes from: a seed of made-up anatomy, or a pair of files."""

    modality: Modality
    seed: int = 0
    image: Path | None = None
    labels: Path | None = None
    schema: LabelSchema | None = None

    def load(self) -> Pair:
        """Return scan and label map."""
        if self.image is None or self.labels is None or self.schema is None:
            from medlsdm.anatomy import generate

            return generate(self.seed, self.modality)
        array, geometry = read_nifti(self.image)
        values, grid = read_nifti(self.labels)
        if not geometry.matches(grid):
            raise GeometryError(f"{self.labels.name} lies on another grid than its image.", "Resample it first.")
        scan = Scan(array, geometry, self.modality, "demo")
        return scan, SemanticMap(np.round(values).astype(np.int64), geometry, self.schema)


@dataclass(slots=True)
class Hospital:
    """Hold one hospital of the demo: folders, and the patients that nobody trains on."""

    site: str
    folder: Path
    patients: list[Patient]
    held_out: list[Patient]
    tokens: list[str] = field(default_factory=list)

    @property
    def incoming(self) -> Path:
        """Return where the PACS's DICOM lies, with names and dates in it."""
        return self.folder / "incoming"

    def maps(self, modality: Modality) -> Path:
        """Return where the label maps to synthesise from lie."""
        return self.folder / "labels" / modality.lower()

    @property
    def modalities(self) -> list[Modality]:
        """Return what this hospital scans."""
        return sorted({p.modality for p in self.held_out})


def made_up(root: Path) -> tuple[list[Hospital], LabelSchema]:
    """Make three hospitals of procedural anatomy."""
    from medlsdm.config import load_schema

    hospitals = []
    for number, (site, kinds) in enumerate(MADE_UP.items()):
        trained, held = [], []
        for kind, count in kinds:
            start = 1000 * (number + 1) + 500 * (kind is Modality.MR)
            trained += [Patient(kind, seed=start + k) for k in range(count)]
            held += [Patient(kind, seed=start + 400 + k) for k in range(max(2, HELD_OUT // len(kinds)))]
        hospitals.append(Hospital(site, root / site, trained, held))
    return hospitals, load_schema("procedural")


def dealt(data: Path, root: Path) -> tuple[list[Hospital], LabelSchema]:
    """Deal the pairs of a folder (``images/``, ``labels/``) to hospitals as its ``sites.json`` says.

    Without that file the pairs go round three hospitals. The last few of each are held out.

    Raises:
        DataError: Pairs are missing or too few.
    """
    images = {nifti_stem(p): p for p in list_nifti(existing_folder(data / "images", "The image folder"))}
    labels = {nifti_stem(p): p for p in list_nifti(existing_folder(data / "labels", "The label folder"))}
    if not images or set(images) != set(labels):
        raise DataError(
            f"{len(set(images) ^ set(labels))} files under {data} have no partner, or there are none.",
            "images/ and labels/ need files of equal names.",
        )
    schema = _schema(data, labels)
    hospitals = []
    for site, names in _deal(data, sorted(images)).items():
        patients = [Patient(_kind(images[n]), 0, images[n], labels[n], schema) for n in names]
        if len(patients) < HELD_OUT + 5:
            raise DataError(f"{site} gets {len(patients)} pairs; at least {HELD_OUT + 5} are needed.", "Add pairs.")
        hospitals.append(Hospital(site, root / site, patients[:-HELD_OUT], patients[-HELD_OUT:]))
    return hospitals, schema


def _deal(data: Path, names: list[str]) -> dict[str, list[str]]:
    path = data / "sites.json"
    if not path.exists():
        return {site: names[k :: len(SITES)] for k, site in enumerate(SITES)}
    try:
        sites = {str(site): [str(n) for n in chosen] for site, chosen in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError("sites.json cannot be read.", 'It is {"site": ["name", ...], ...}.') from error
    missing = {n for chosen in sites.values() for n in chosen} - set(names)
    if missing:
        raise DataError(f"sites.json names {len(missing)} pairs that are not there.", "Correct it.")
    return sites


def _kind(path: Path) -> Modality:
    """Tell CT from MR: only CT has air far below zero."""
    array, _ = read_nifti(path)
    return Modality.CT if float(array.min()) < CT_BELOW else Modality.MR


def _schema(data: Path, labels: dict[str, Path]) -> LabelSchema:
    """Return the schema of configs/schemas with the folder's name, if its values fit; else one of plain numbers."""
    values = {0} | {int(v) for path in labels.values() for v in np.unique(np.round(read_nifti(path)[0]))}
    named = config_folder() / "schemas" / f"{data.resolve().name}.yaml"
    if named.exists():
        schema = LabelSchema.from_json(yaml.safe_load(named.read_text(encoding="utf-8")))
        if values <= set(schema.ids):
            return schema
    colours = [(230, 90, 80), (80, 160, 240), (240, 190, 60), (110, 200, 120), (180, 120, 220)]
    classes = [
        {"id": v, "name": f"label {v}" if v else "background", "colour": colours[v % 5] if v else (0, 0, 0)}
        for v in sorted(values)
    ]
    return LabelSchema.from_json({"name": data.resolve().name, "classes": classes})


def write_hospitals(hospitals: list[Hospital], report: Report, workers: int = 2) -> None:
    """Write every patient as DICOM with planted identifiers, and the label maps for synthesis."""
    jobs = [
        (h.site, str(h.incoming), p, 7919 * k + n) for k, h in enumerate(hospitals) for n, p in enumerate(h.patients)
    ]
    by_site = {h.site: h for h in hospitals}
    with ProcessPoolExecutor(workers) as pool:
        for done, (site, tokens) in enumerate(pool.map(_plant, jobs, chunksize=2), start=1):
            by_site[site].tokens += tokens
            report(done, len(jobs))
    for hospital in hospitals:
        for modality in hospital.modalities:
            chosen = (p for p in hospital.held_out if p.modality is modality)
            for number, patient in enumerate(chosen, start=1):
                _, labels = patient.load()
                write_nifti(hospital.maps(modality) / f"map-{number:02d}.nii.gz", labels.array, labels.geometry)
        write_atomic(hospital.folder / "planted.json", json.dumps(hospital.tokens).encode())


def _plant(job: tuple[str, str, Patient, int]) -> tuple[str, list[str]]:
    from deid_tools.plant import write_planted_study

    site, incoming, patient, seed = job
    scan, labels = patient.load()
    folder = Path(incoming) / f"study-{seed:06d}"
    tokens = write_planted_study(
        scan.array, scan.geometry, scan.modality, labels, folder, seed=seed, hospital=f"{site} hospital"
    )
    return site, tokens


def real_of(hospital: Hospital, labels: np.ndarray[Any, Any]) -> Pair | None:
    """Return the held-out patient whose label map this is."""
    found: Iterator[Pair] = (p.load() for p in hospital.held_out)
    return next((pair for pair in found if np.array_equal(pair[1].array, labels)), None)
