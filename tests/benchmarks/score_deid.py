"""Score the de-identification by planted identifiers, beside plain deid's default recipe, and time it.

    python tests/benchmarks/score_deid.py [DATA] [--images 4] [--slices 500] [--workers 2] [--json FILE]

DATA is a folder of real DICOM series (default: ../shared/data/dicom beside the checkout). A planted copy
of every series that can be decoded is de-identified by this program and by deid's default recipe; both
are scored by the same scorer. Exit status 1 when one planted identifier of ours is found again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from deid_tools.answers import AnswerKey, plant_label_map, plant_series
from deid_tools.keys import SiteKeys
from deid_tools.score import Action, Score, score

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
KEYS = SiteKeys.derive(bytes(range(32)), "benchmark")
SCRIPTS = ("latin", "utf-8", "japanese")


def real_series(data: Path, most: int) -> dict[str, list[Path]]:
    """Find the series that can be planted: classic or multi-frame images whose pixels can be decoded."""
    import pydicom

    from deid_tools.admit import IMAGE_CLASSES

    found: dict[tuple[str, str, str], list[tuple[float, Path]]] = defaultdict(list)
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = pydicom.dcmread(path)
                shape = ds.pixel_array.shape
            except Exception:  # what cannot be decoded cannot be planted
                continue
        if str(ds.get("SOPClassUID", "")) not in IMAGE_CLASSES or ds.get("SamplesPerPixel") != 1:
            continue
        if not ds.get("SeriesInstanceUID") or "LOCALIZER" in (ds.get("ImageType") or []):
            continue
        place = float((ds.get("ImagePositionPatient") or [0, 0, 0])[2])
        found[str(path.parent.relative_to(data)), str(ds.SeriesInstanceUID), str(shape)].append((place, path))
    names: dict[str, list[Path]] = {}
    for (folder, _, _), images in sorted(found.items()):
        number = sum(name.startswith(folder) for name in names)
        names[f"{folder} {number + 1}" if number else folder] = [path for _, path in sorted(images)][:most]
    return names


def plant(series: dict[str, list[Path]], folder: Path) -> AnswerKey:
    """Write planted copies: a patient a series, the first with two studies and a label map, one with text burned in."""
    key = AnswerKey()
    for k, (name, files) in enumerate(series.items()):
        script = SCRIPTS[k % len(SCRIPTS)]
        plant_series(files, folder / f"site {k}", key, patient=name, study="1", series="1", script=script)
    first, files = next((name, files) for name, files in series.items() if _is_volume(files))
    plant_series(files, folder / "again", key, patient=first, study="2", series="1")
    plant_label_map(files, folder / f"site {list(series).index(first)}", key, patient=first, study="1")
    plant_series(files, folder / "burned", key, patient="burned in", study="1", series="1", burned_in=True)
    return key


def _is_volume(files: list[Path]) -> bool:
    """Tell whether images form a plain volume, which a label map can lie on."""
    import pydicom

    from deid_tools.series import plan_series
    from medlsdm.errors import GeometryError

    try:
        return len(plan_series([pydicom.dcmread(path, stop_before_pixels=True) for path in files]).frames) > 2
    except GeometryError:
        return False


def print_scores(ours: Score, theirs: Score) -> None:
    """Print passes by class, and each failure of ours."""
    print(f"{'class':24}{'medlsdm-deid':>16}{'deid, default recipe':>24}")
    for action in Action:
        cells = [f"{s.passed[action]} / {s.total[action]}" for s in (ours, theirs)]
        print(f"{action.value:24}{cells[0]:>16}{cells[1]:>24}")
    print(f"{'days between studies':24}{ours.intervals:>16}{theirs.intervals:>24}")
    print(f"{'identifiers found again':24}{ours.leaks:>16}{theirs.leaks:>24}")
    for action, what in ours.failures:
        print(f"  missed: {action.value}: {what}")


def long_series(data: Path, folder: Path, count: int) -> None:
    """Build a CT series of 512 x 512 by copying real slices with new UIDs and positions."""
    import pydicom

    folder.mkdir(parents=True)
    files = sorted((data / "ct-philips-phantom").glob("I*"))
    slices = []
    for path in files:
        ds = pydicom.dcmread(path)
        if (ds.Rows, ds.Columns) == (512, 512):
            slices.append(ds)
    for k in range(count):
        ds = slices[k % len(slices)]
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.10.1511.7.{k + 1}"
        ds.SeriesInstanceUID, ds.InstanceNumber = "1.2.826.0.1.3680043.10.1511.8", k + 1
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], k * 1.25]
        ds.save_as(folder / f"IM{k:05d}")


def timed(kind: str, source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Run one way over a series in a process of its own; seconds, processor seconds and peak memory."""
    command = [sys.executable, __file__, "--one", kind, str(source), str(out), str(workers)]
    used: dict[int, tuple[float, int]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None:
            used |= _session(process.pid)
            time.sleep(0.1)
        assert process.stdout is not None
        figures = json.loads(process.stdout.read().splitlines()[-1])
    peaks = [peak for pid, (_, peak) in used.items() if pid != process.pid]
    figures["processor"] = sum(seconds for seconds, _ in used.values()) - figures["before"]
    figures["peak_mb"] = [round(used[process.pid][1] / 1024), round(max(peaks, default=0) / 1024)]
    return figures


def _session(leader: int) -> dict[int, tuple[float, int]]:
    """Return processor seconds and peak resident KiB of every process that a command started, by number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            values = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(values[3]) != leader:
                continue
            peak = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
            ticks = int(values[11]) + int(values[12])
            found[int(folder.name)] = (ticks / os.sysconf("SC_CLK_TCK"), int(peak.split()[1]))
        except (OSError, StopIteration):  # it has ended
            continue
    return found


def one(kind: str, source: Path, out: Path, workers: int) -> None:
    """Do what ``timed`` asks for, and print the figures as JSON."""
    files = sorted(p for p in source.iterdir())
    if kind == "pydicom":
        import pydicom

        out.mkdir()
        start, before = time.perf_counter(), time.process_time()
        for path in files:
            pydicom.dcmread(path).save_as(out / path.name)
    elif kind == "deid":
        import deid.dicom  # noqa: F401  # imported before the clock starts

        start, before = time.perf_counter(), time.process_time()
        by_deid_files(files, out)
    else:
        from deid_tools import pixels
        from deid_tools.pipeline import deidentify

        pixels.shutil.which = lambda name: None  # text search apart
        start, before = time.perf_counter(), time.process_time()
        report = deidentify(source, out, KEYS, workers=workers)
        if sum(s.images for s in report.series) != len(files):
            raise SystemExit(f"the series did not pass: {report.reasons()}")
    print(json.dumps({"seconds": time.perf_counter() - start, "before": before}))


def by_deid_files(files: list[Path], out: Path) -> None:
    """Run plain deid's default recipe over some files."""
    from deid.config import DeidRecipe
    from deid.dicom import replace_identifiers
    from deid.logger import bot

    out.mkdir()
    bot.errorStream = bot.outputStream = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        replace_identifiers(
            [str(p) for p in files], save=True, output_folder=str(out), overwrite=True, deid=DeidRecipe()
        )


def print_speed(data: Path, count: int, workers: int) -> dict[str, Any]:
    """Print slices a second for each way, and how memory grows from a fifth of the slices to all."""
    figures: dict[str, Any] = {}
    print(f"\n{count} CT slices of 512 x 512; tesseract apart, letters by shape and faces included")
    print(f"{'':34}{'slices/s':>10}{'per processor second':>23}{'peak MiB, own + largest child':>32}")
    with tempfile.TemporaryDirectory() as name:
        few, all_ = Path(name) / "few", Path(name) / "all"
        long_series(data, few, count // 5)
        long_series(data, all_, count)
        ways = (
            ("pydicom", all_, 1),
            ("deid", few, 1),
            ("ours", few, workers),
            ("ours", all_, 1),
            ("ours", all_, workers),
        )
        for k, (kind, source, processes) in enumerate(ways):
            found = timed(kind, source, Path(name) / f"out{k}", processes)
            slices = count // 5 if source == few else count
            label = {"pydicom": "pydicom, read and write only", "deid": "deid, default recipe", "ours": "medlsdm-deid"}[
                kind
            ]
            label += f", {slices} slices, {processes} workers" if kind == "ours" else f", {slices} slices"
            rate, own = slices / found["seconds"], slices / found["processor"]
            print(f"{label:44}{rate:>8.1f}{own:>14.1f}{found['peak_mb'][0]:>16} + {found['peak_mb'][1]}", flush=True)
            figures[label] = {"slices_per_second": rate, "per_processor_second": own, "peak_mb": found["peak_mb"]}
    return figures


def main() -> int:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=DATA)
    parser.add_argument("--images", type=int, default=4, help="images of each series to plant")
    parser.add_argument("--slices", type=int, default=500, help="slices of the timed series; 0 leaves the timing out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from deid_tools.pipeline import deidentify

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        series = real_series(options.data, options.images)
        if not series:
            parser.error(f"{options.data} holds no DICOM series that can be planted")
        key = plant(series, folder / "in")
        print(f"{len(key.plants)} identifiers planted in {len(key.sources)} images of {len(series)} real series")
        report = deidentify(folder / "in", folder / "ours", KEYS)
        for reason, count in report.reasons().items():
            print(f"  held {count:>3}  {reason}")
        ours = score(key, folder / "ours")
        by_deid_files(sorted((folder / "in").rglob("*.dcm")), folder / "theirs")
        theirs = score(key, folder / "theirs")
    print_scores(ours, theirs)
    speed = print_speed(options.data, options.slices, options.workers) if options.slices else {}
    if options.json:
        table = {a.value: {"passed": ours.passed[a], "total": ours.total[a], "deid": theirs.passed[a]} for a in Action}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"classes": table, "leaks": ours.leaks, "speed": speed}, indent=2))
    return 1 if ours.leaks else 0


if __name__ == "__main__":
    sys.exit(main())
