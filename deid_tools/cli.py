"""The command line ``medlsdm-deid``: de-identify a folder, or check one that was written."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from medlsdm.errors import ConfigError, DataError, QuarantineError, UsageError
from medlsdm.terminal import print_json
from medlsdm.terminal import run as run_app

if TYPE_CHECKING:
    from deid_tools.keys import SiteKeys
    from deid_tools.report import DeidReport
    from medlsdm.types import LabelSchema

app = typer.Typer(
    help="De-identify DICOM studies and their label maps; whatever is in doubt is held, with a reason.",
    no_args_is_help=True,
    add_completion=False,
)
_KEY_BYTES = 32


def main() -> NoReturn:
    """Run the program."""
    run_app(app, "medlsdm-deid")


def default_key_file() -> Path:
    """Return where the site's master key lies: ``$XDG_DATA_HOME/medlsdm/deid.key``."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "medlsdm" / "deid.key"


def load_master_key(named: Path | None) -> bytes:
    """Read the master key (64 hex digits); only at its usual place is one made, mode 0600, where there is none.

    Args:
        named: The file that the user named, which must exist; None: the usual place.

    Raises:
        ConfigError: There is no such file, it is not a key, or others may read it.
    """
    path = named or default_key_file()
    if named is None and not path.exists():
        return _make_master_key(path)
    if not path.exists():
        raise ConfigError(
            f"There is no key file {str(path)!r}.",
            "Check the path: another key gives every patient another pseudonym. A site's first run, "
            "without --key, makes a key.",
        )
    if path.stat().st_mode & 0o077:
        raise ConfigError("Others may read the key file.", "Run: chmod 600 on it.")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError("The key file does not hold 64 hex digits.", "Restore it from your backup.")
    return key


def _make_master_key(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    key = secrets.token_bytes(_KEY_BYTES)
    with os.fdopen(handle, "w") as stream:
        stream.write(key.hex() + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    print(
        f"medlsdm-deid: a new site key was made at {path}. Back it up and keep it secret: without it, "
        "every patient gets another pseudonym.",
        file=sys.stderr,
    )
    return key


def _default_workers() -> int:
    return min(4, os.cpu_count() or 1)


@app.command("run")
def run_command(
    source: Path = typer.Argument(..., metavar="IN", help="The folder with DICOM files, searched through."),
    out: Path = typer.Argument(..., metavar="OUT", help="Where the result goes: empty, absent, or an earlier output."),
    key: Path | None = typer.Option(
        None,
        "--key",
        help="The site's key file, which must exist; without it ~/.local/share/medlsdm/deid.key, made if absent. "
        "Back it up, and keep it secret.",
    ),
    project: str = typer.Option("default", help="The project; two projects give one patient two pseudonyms."),
    schema: str | None = typer.Option(
        None, help="The label schema that names the segments: a built-in name (tissues), or a YAML or JSON file."
    ),
    recipe: str = typer.Option("allow-list", help="What stays of a header: allow-list, basic, or a recipe file."),
    option: list[str] = typer.Option(
        [],
        help="With basic, again for each: modified-dates, patient-characteristics, age-bands, clean-descriptors, "
        "safe-private.",
    ),
    workers: int = typer.Option(_default_workers(), min=1, help="How many processes share the files of a series."),
    text: str = typer.Option("blank", help="Burned-in text: 'blank' it, or 'quarantine' the series."),
    keep_faces: bool = typer.Option(False, "--keep-faces", help="Leave faces in head scans as they are."),
    device_rules: Path | None = typer.Option(None, help="The site's own device rules (YAML)."),
    face_pictures: Path | None = typer.Option(
        None, help="Write pictures of each face before and after to this folder; keep it inside the hospital."
    ),
    evidence: Path | None = typer.Option(
        None, help="Write what was done to each study to this private folder, with pictures; keep it in the hospital."
    ),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """De-identify every series under IN into OUT, and say what is held and why."""
    from deid_tools.evidence import EvidenceFolder
    from deid_tools.keys import SiteKeys
    from deid_tools.pipeline import deidentify
    from deid_tools.recipes import load_recipe
    from deid_tools.silence import no_core_dump
    from deid_tools.treatment import PixelPolicy

    no_core_dump()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no working files stay behind
    if not source.is_dir():
        raise DataError("The source is not a folder.", "Check the path.")
    if face_pictures and (face_pictures.resolve() == out.resolve() or out.resolve() in face_pictures.resolve().parents):
        raise UsageError("Pictures of faces may not lie in the output.", "Give --face-pictures another folder.")
    policy = PixelPolicy(text, not keep_faces, device_rules, face_pictures)
    names = _load_schema(schema) if schema else None
    rules = load_recipe(recipe, option)
    keys: SiteKeys = SiteKeys.derive(load_master_key(key), project)
    with _progress() as progress:
        report = deidentify(
            source, out, keys, schema=names, recipe=rules, policy=policy, progress=progress, workers=workers,
            evidence=EvidenceFolder(evidence) if evidence else None,
        )  # fmt: skip
    if json and report.series:
        print_json(report.to_json())
    elif not json:
        _print_report(report)
        if evidence:
            print(f"{len(report.studies)} reports are in {evidence}; they show originals and stay in the hospital")
    if not report.series:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in report.reasons().items())
        raise QuarantineError(f"Nothing passed: {reasons}.", "Look at the reasons and export the series again.")


@app.command()
def verify(
    folder: Path = typer.Argument(..., metavar="DIR", help="An output folder of 'run', or any other."),
    quick: bool = typer.Option(False, "--quick", help="Leave out the search for burned-in text, and dciodvfy."),
    json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Check every file of any folder with a reader and lists of its own; exit 10 if something is found."""
    from dataclasses import asdict

    from deid_tools.verify import conformance, count_files, verify_folder
    from deid_tools.verify_report import UNFINISHED
    from medlsdm.checks import existing_folder

    findings = verify_folder(existing_folder(folder, "The folder"), whole_series=not quick)
    files = count_files(folder)
    notes = [] if quick else conformance(folder)
    if json:
        found, noted = [*map(asdict, findings)], [*map(asdict, notes)]
        print_json({"clean": not findings, "files": files, "findings": found, "notes": noted})
    else:
        for note in notes:
            print(f"note: {note.line()} (no identifier; originals often have such)")
        for finding in findings:
            print(finding.line())
        print(f"{_count(len(findings), 'finding')}: " if findings else "clean: ", end="")
        print(f"{_count(files, 'file')} checked")
    if findings:
        if json:
            raise typer.Exit(QuarantineError.exit_status)
        if all(finding.reason == UNFINISHED for finding in findings):
            raise QuarantineError("The run is not finished.", "Run it again into this folder, then verify again.")
        number = _count(len(findings), "finding")
        raise QuarantineError(f"{number}.", "Do not use these files; de-identify the originals again.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@app.command()
def names(
    folder: Path = typer.Argument(..., metavar="IN", help="A folder with DICOM SEG or RTSTRUCT files."),
    schema: str | None = typer.Option(
        None, help="The label schema to look the names up in: a built-in name (tissues), or a YAML or JSON file."
    ),
    json: bool = typer.Option(False, "--json", help="Print the names as JSON."),
) -> None:
    """List what the segments and structures under IN are called, for the schema's aliases. May show anything."""
    from dataclasses import asdict

    from deid_tools.names import list_names
    from medlsdm.checks import existing_folder

    rows = list_names(existing_folder(folder, "The folder"), _load_schema(schema) if schema else None)
    if json:
        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        print(f"{row.count:>5}  {row.name!r}  {row.code or '-'}  ->  {row.becomes or 'unknown'}")
    print(f"{len(rows)} names, {sum(not row.becomes for row in rows)} unknown")


def _load_schema(name_or_path: str) -> LabelSchema:
    import yaml

    from deid_tools.config_files import schema_file
    from medlsdm.types import LabelSchema

    path = schema_file(name_or_path)
    try:
        return LabelSchema.from_json(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise DataError(f"The label schema {path.name!r} cannot be read.", "Give a YAML or JSON file.") from None


def _print_report(report: DeidReport) -> None:
    images = sum(s.images for s in report.series)
    print(f"{len(report.series)} series of {report.patients} patients passed: {images} images,", end=" ")
    print(f"{sum(s.labels for s in report.series)} label maps; {len(report.held)} of {report.files_seen} files held")
    boxes = sum(s.pixels.text_boxes for s in report.series)
    faces = sum(s.pixels.face == "removed" for s in report.series)
    print(f"{boxes} boxes of burned-in text blanked, {faces} faces removed")
    for reason, count in report.reasons().items():
        print(f"  held {count:>5}  {reason}")
    for what, count in report.removed.items():
        print(f"  {count:>10}  {what}")
    print(report.ocr)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show progress on stderr where it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done + 1)

        yield show
