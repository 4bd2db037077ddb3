"""From a hospital's folder to a clean one: admit, de-identify, verify, and hold whatever is in doubt."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from deid_tools.crew import Crew
from deid_tools.evidence import EvidenceFolder, study_evidence, write_evidence
from deid_tools.folders import alone, check_output, check_same_run, start_output
from deid_tools.keys import SiteKeys
from deid_tools.pairs import PairResult, read_pairs
from deid_tools.pixels import TextSearch
from deid_tools.recipes import Recipe
from deid_tools.report import DeidReport, SeriesRecord
from deid_tools.run import Progress, Run, make_run
from deid_tools.run_images import images
from deid_tools.run_labels import label_maps, segmentations, structure_sets
from deid_tools.silence import silence
from deid_tools.treatment import PixelPolicy
from medlsdm.checks import existing_folder, write_atomic
from medlsdm.types import LabelSchema

__all__ = ["PairResult", "deidentify", "read_pairs"]


@silence()
def deidentify(
    source: Path,
    out: Path,
    keys: SiteKeys,
    *,
    schema: LabelSchema | None = None,
    recipe: Recipe | None = None,
    policy: PixelPolicy | None = None,
    progress: Progress | None = None,
    workers: int = 1,
    evidence: EvidenceFolder | None = None,
) -> DeidReport:
    """De-identify every DICOM series under a folder, and the label maps that belong to them.

    Writes ``out/<pseudonym>/<series token>/0001.dcm`` and on, ``seg-<digits>.dcm`` for a DICOM SEG,
    ``labels.nii.gz`` for a NIfTI label map, and ``out/report.json``. A series that is already
    there is left as it is, so that running again resumes.

    Args:
        source: The hospital's folder, searched through; symbolic links are not followed.
        out: Where the result goes: absent, empty, or the output of an earlier run.
        keys: The site's keys for the project; equal keys give equal pseudonyms.
        schema: The label schema; with it, segments may be named by label and values are checked.
        recipe: What stays of a header; by default the allow-list.
        policy: What is done about burned-in text and faces; by default text is blanked and faces go.
        progress: Called with what is being done, how many are done, and how many there are.
        workers: How many processes share the files of a long series.
        evidence: A private folder, apart from source and output, for what was done to each study, with pictures.

    Raises:
        DataError: The source is empty, ``out`` holds something else, or was made with another key or recipe.
    """
    existing_folder(source, "The source folder")
    check_output(source, out)
    policy = policy or PixelPolicy()
    if evidence is not None:
        evidence.prepare(source, out)
        policy = replace(policy, pictures=policy.pictures or evidence.picture_folder)
    settings = (source, out, keys, schema, recipe, policy)
    run = make_run(*settings)
    run.progress = progress or run.progress
    run.pictures = evidence.picture_folder if evidence else None
    run.crew = Crew(workers, run, make_run, settings)
    marks = (run.cleaner.recipe_sha256, keys.id, run.policy.id)
    with alone(out):
        check_same_run(out, *marks)
        start_output(out, *marks)
        with tempfile.TemporaryDirectory(dir=out, prefix=".working-") as working, closing(run.crew):
            run.working = Path(working)
            run.admit_all()
            images(run)
            segmentations(run)
            structure_sets(run)
            label_maps(run)
        report = _report(run)
        if evidence is not None:
            report = replace(report, studies=write_evidence(evidence, report.studies))
        write_atomic(out / "report.json", json.dumps(report.to_json(), indent=2).encode())
    return report


def _report(run: Run) -> DeidReport:
    """Sum up."""
    series = tuple(
        SeriesRecord(s.token, s.modality, s.images, s.labels, s.already, s.labels_held, s.notes, s.pixels)
        for s in sorted(run.passed.values(), key=lambda s: s.token)
    )
    return DeidReport(
        series,
        tuple(run.held),
        run.files_seen,
        run.cleaner.recipe_sha256,
        TextSearch.state(),
        _tools(),
        run.cleaner.recipe.label,
        run.cleaner.keys.id,
        dict(run.removed),
        studies=study_evidence(run, _tools()),
        pixel_policy=run.policy.id,
    )


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("medlsdm", "deid", "pydicom", "numpy")}
