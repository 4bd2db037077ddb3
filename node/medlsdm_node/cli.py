"""The hospital's command line: thin; each command parses, calls and prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deid_tools.silence import silence_for_good
from medlsdm.terminal import print_json, run
from medlsdm_node.cli_evidence import kept
from medlsdm_node.cli_options import Home, Json, end_cleanly, open_home
from medlsdm_node.cli_plans import asked
from medlsdm_node.cli_quarantine import held

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A hospital's node: scans stay, weights travel.")
app.add_typer(kept, name="evidence", invoke_without_command=True)
app.add_typer(held, name="quarantine", invoke_without_command=True)
app.add_typer(asked, name="plans")

Schema = Annotated[str, typer.Option("--schema", help="Label schema: a name of configs/schemas, or a YAML file.")]


def _settings(site: str, project: str, schema: str, threads: int) -> Any:
    import re

    from medlsdm.config import load_schema
    from medlsdm.errors import UsageError
    from medlsdm.federation.identity import SITE_NAME
    from medlsdm_node.home import NodeSettings

    if not re.fullmatch(SITE_NAME, site):
        raise UsageError("A site's name has 1-32 small letters, digits or dashes.", "For example: --site st-anna.")
    return NodeSettings(site=site, project=project, labels=load_schema(schema).to_json(), threads=threads)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bar(description: str) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal), description


@app.command()
def init(
    site: Annotated[str, typer.Option(help="Short name of this hospital, as the coordinator calls it.")],
    home: Home = None,
    schema: Schema = "procedural",
    project: Annotated[str, typer.Option(help="Pseudonyms of two projects cannot be linked.")] = "default",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for training; 0 takes all.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a node: its folder, keys, policy and vault."""
    from medlsdm_node.home import NodeHome

    opened = NodeHome.default(home)
    opened.create(_settings(site, project, schema, threads))
    if as_json:
        print_json({"home": str(opened.root), "site": site, "schema": schema})
        return
    print(f"Node {site} in {opened.root}")
    print(f"Read {opened.policy_file}: it says what this hospital allows; deid.yaml beside it, how it de-identifies.")
    print("Next: medlsdm-node ingest DIR, then medlsdm-node join --server HOST")


@app.command()
def ingest(
    folder: Annotated[Path, typer.Argument(help="A folder of DICOM, at any depth, zip archives included.")],
    segmenter: Annotated[
        str, typer.Option(help="Label scans that have no label map: NAME or NAME=FOLDER (see docs/labels.md).")
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """De-identify a folder of DICOM and keep scans with their label maps in the vault."""
    from medlsdm_node.ingest import ingest as take

    end_cleanly()
    opened = open_home(home)
    bar, text = _bar("reading")
    with bar:
        task = bar.add_task(text, total=None)
        result = take(
            opened,
            folder,
            lambda step, done, of: bar.update(task, description=step, completed=done, total=of),
            segmenter=segmenter,
        )
    if as_json:
        print_json(result.to_json())
        return
    print(f"{result.pairs} scans of {result.patients} patients went into the vault ({result.seconds:.1f} s).")
    for reason, count in sorted(result.held.items()):
        print(f"  held: {count} x {reason}")
    for note in result.notes:
        print(f"  note: {note}")


@app.command()
def receive(home: Home = None) -> None:
    """Listen for senders (C-STORE, STOW-RS) and take in each study when it is complete; see receive.yaml."""
    from medlsdm_node.intake import receive as listen

    listen(open_home(home), _say)


@app.command()
def pull(
    source: Annotated[str, typer.Option("--from", help="A DICOMweb service, such as https://pacs/dicom-web.")],
    study: Annotated[list[str] | None, typer.Option(help="A Study Instance UID; may be given again.")] = None,
    studies: Annotated[Path | None, typer.Option(help="A file of Study Instance UIDs, one a line.")] = None,
    modality: Annotated[str, typer.Option(help="Whole studies in which it occurs, such as CT.")] = "",
    date: Annotated[str, typer.Option(help="Studies of a day or of days: 20240101-20240131.")] = "",
    ca: Annotated[Path | None, typer.Option(help="The CA that the service's certificate comes from.")] = None,
    credentials: Annotated[Path | None, typer.Option(help="A YAML file (0600); or MEDLSDM_PULL_TOKEN, ...")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fetch studies over DICOMweb (QIDO-RS, WADO-RS) and take them in. Running it again goes on."""
    from medlsdm.errors import NetworkError
    from medlsdm_node.archive import Archive, read_credentials
    from medlsdm_node.pull import Selection, read_studies
    from medlsdm_node.pull import pull as fetch

    opened = open_home(home)
    wanted = Selection((*(study or ()), *(read_studies(studies) if studies else ())), modality, date)
    wanted.check()
    archive = Archive(source, read_credentials(credentials, os.environ), ca)
    end_cleanly()
    bar, text = _bar("searching")
    with bar:
        task = bar.add_task(text, total=None)
        result = fetch(
            opened, archive, wanted, lambda step, done, of: bar.update(
                task, description=step, completed=done, total=of or None), _say,
        )  # fmt: skip
    if as_json:
        print_json(result.to_json())
    else:
        print(result.in_words())
    if result.failed:  # what came is told already
        _say(f"{result.failed} instances could not be fetched. Run it again: it goes on.")
        raise typer.Exit(NetworkError.exit_status)


@app.command()
def join(
    server: Annotated[str, typer.Option(help="HOST or HOST:PORT of the coordinator.")],
    home: Home = None,
    invitation: Annotated[Path | None, typer.Option(help="File with the invitation (or MEDLSDM_INVITATION).")] = None,
    site: Annotated[str, typer.Option(help="Name for a new node; an invitation gives it.")] = "",
    schema: Schema = "procedural",
    receiving: Annotated[bool, typer.Option("--receive", help="Listen for a PACS too, as 'receive' does.")] = False,
) -> None:
    """Join a coordinator and serve its rounds until stopped. Running it again goes on."""
    from medlsdm_node.home import NodeHome
    from medlsdm_node.joining import prepare, read_invitation, serve

    opened = NodeHome.default(home)
    ticket = read_invitation(invitation, os.environ.get("MEDLSDM_INVITATION"))
    name = site or (ticket.site if ticket else "")
    fresh = _settings(name, "default", schema, 0) if name and not opened.settings_file.exists() else None
    coordinator = prepare(opened, server, ticket, fresh)
    if not receiving:
        serve(opened, coordinator, _say)
        return
    from medlsdm_node.receiving import beside

    with beside(opened, _say):
        serve(opened, coordinator, _say)


@app.command()
def status(
    home: Home = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on: one JSON line whenever the activity changes.")] = False,
    as_json: Json = False,
) -> None:
    """Show what this node holds and does."""
    from medlsdm_node.status import node_status, watch_activity

    opened = open_home(home)
    if watch:
        watch_activity(opened)
    found = node_status(opened)
    if as_json:
        print_json(found)
        return
    now = found["activity"]
    print(f"{found['site']}: {now['activity']}  (server {found['server'] or 'none'})")
    if "stage" in now:
        loss = f", loss {now['loss']}" if "loss" in now else ""
        print(f"  {now['stage']} round {now.get('round')}/{now.get('rounds')}{loss}")
    print(f"  vault: {found['pairs']} scans of {found['patients']} patients, schema {found['schema']}")
    print(f"  receiving: {found['waiting_studies']} studies wait to be taken in")
    print(f"  quarantine: {found['quarantine']} items are held")
    print(f"  waiting for export: {found['waiting_synthetic']}; models: {len(found['models'])}")
    if left := found["left_in_clear"]:
        print(f"  IN CLEAR: {left} folders that a killed run left in run/; the next ingest, receive or join wipes them")
    rules = found["deidentification"]
    if "error" in rules:
        print(f"  BROKEN: deid.yaml; nothing is taken in until it is right. {rules['error']}")
        return
    print(f"  de-identification: {rules['recipe']}, text {rules['text']}, faces {rules['faces']}")
    for line in rules["weaker"]:
        print(f"  weaker than the default: {line}")


@app.command()
def synthesise(
    labels: Annotated[Path, typer.Argument(help="A NIfTI label map, or a folder of them.")],
    home: Home = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other volumes.")] = 0,
    model: Annotated[str, typer.Option(help="Checkpoint id; default: the newest.")] = "",
    modality: Annotated[str, typer.Option(help="CT, MR or PT; default: the model's own.")] = "",
    as_json: Json = False,
) -> None:
    """Make a synthetic volume for each label map; it waits in the vault for the gate."""
    from medlsdm.errors import UsageError
    from medlsdm.types import Modality
    from medlsdm_node.synthesise import synthesise as make

    if modality and modality not in list(Modality):
        raise UsageError(f"{modality!r} is no modality.", "Give CT, MR or PT.")
    opened = open_home(home)
    bar, text = _bar("synthesising")
    with bar:
        task = bar.add_task(text, total=None)
        rows = make(
            opened, labels, seed=seed, model=model, modality=Modality(modality) if modality else None,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )  # fmt: skip
    if as_json:
        print_json(rows)
    else:
        print(f"{len(rows)} synthetic volumes wait for export. Next: medlsdm-node export --out DIR")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="A new folder for what leaves the hospital.")],
    home: Home = None,
    without_labels: Annotated[bool, typer.Option("--without-labels", help="Keep the label maps here.")] = False,
    as_json: Json = False,
) -> None:
    """Audit the waiting synthetic volumes and write those that pass: NIfTI, DICOM, card, receipt."""
    from medlsdm_node.exporting import export_waiting

    receipt, report, left = export_waiting(open_home(home), out, with_labels=not without_labels)
    if as_json:
        print_json({"folder": str(out), "receipt": receipt.model_dump(mode="json"), "gate": report.to_local_json()})
        return
    print(f"Export {receipt.id} in {out}: {len(receipt.files)} files, receipt signed by {receipt.site}.")
    print(
        f"  {report.passed} of {report.made} volumes passed; {report.caught} of {report.planted} planted copies caught."
    )
    for reason, count in report.reasons.items():
        print(f"  blocked: {count} x {reason}")
    if left:
        print(f"  {left} volumes of another model still wait; run export again for them.")


@app.command()
def audit(
    folder: Annotated[Path | None, typer.Argument(help="An exported folder, to check its receipt.")] = None,
    log: Annotated[Path | None, typer.Option(help="A copy of some site's audit.jsonl, instead of a node.")] = None,
    key: Annotated[str, typer.Option(help="With --log: that site's public key, 64 hex digits.")] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check this node's audit log and ledger line by line; with a folder, check its receipt too."""
    from medlsdm_node.auditing import check, check_log, signed_words

    if log is not None:
        copy = check_log(log, key)
        if as_json:
            print_json(copy)
            return
        print(f"audit log intact: {copy['records']} records, head {copy['head'][:16]}")
        print(f"{signed_words(copy['signed_from'])}; {copy['end']}")
        return
    found = check(open_home(home), folder)
    if as_json:
        print_json(found)
        return
    for row in found["records"]:
        print(f"{row['time']}  {row['event']:14} {row['summary']}")
    print(f"audit log intact: {len(found['records'])} records, head {found['head'][:16]}")
    print(f"{signed_words(found['signed_from'])}; public key {found['key']}")
    if back := found["clock_went_back"]:
        print(f"the machine's clock went back before record {', '.join(map(str, back))}")
    if (unknown := found["evidence_not_in_log"]) or found["pairs_not_in_log"]:
        print(
            f"NOT in the log: {unknown} records of evidence and {found['pairs_not_in_log']} scans that the vault holds;"
        )
        print("  the log is an older copy, or an ingest was killed before its entry: ingest that folder again")
    print(f"privacy ledger intact: {found['ledger']['charges']} charges, epsilon {found['ledger']['epsilon']}")
    if found["receipt"]:
        print(f"receipt {found['receipt']['id']} is right: {found['receipt']['files']} files unchanged")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demos; each run makes its own below it.")] = Path("demo-out"),
    data: Annotated[
        Path | None, typer.Option(help="images/, labels/ and sites.json; default: made-up anatomy.")
    ] = None,
    plan: Annotated[str, typer.Option(help="A federation plan; default: one that fits the data.")] = "",
    as_json: Json = False,
) -> None:
    """Walk the whole way with three hospitals on this machine, and write a report."""
    from medlsdm_node.demo.walk import walk

    result = walk(out, data, plan)
    if as_json:
        print_json(result)


def main() -> None:
    """Run the program."""
    silence_for_good()  # whoever listens: libraries quote what they warn of
    run(app, "medlsdm-node")
