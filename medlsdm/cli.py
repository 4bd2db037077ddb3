"""The command line ``medlsdm``: train, synthesise, evaluate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medlsdm import __version__, terminal

if TYPE_CHECKING:
    from medlsdm.training.folders import Pair
    from medlsdm.training.loop import Progress
    from medlsdm.types import Modality, SemanticMap

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Kind = Annotated[str, typer.Option(help="CT, MR or PT.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"medlsdm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train on scans with label maps, and synthesise volumes from label maps alone."""


def _modality(name: str) -> Modality:
    from medlsdm.errors import UsageError
    from medlsdm.types import Modality

    try:
        return Modality(name.upper())
    except ValueError:
        raise UsageError(f"{name!r} is not a modality.", "Use CT, MR or PT.") from None


@app.command()
def train(
    data: Annotated[
        list[Path], typer.Option(help="Folder with images/ and labels/ (.nii.gz, equal names). May be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; run the same command again to go on.")],
    preset: Annotated[
        str | None, typer.Option(help="Preset name or YAML file: tiny by default, or that of --from.")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="CT, MR or PT: one for all --data, or one for each in turn. MR by default.")
    ] = None,
    schema: Annotated[
        str | None, typer.Option(help="Label schema name or YAML file; made from the values if absent.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Fine-tune: begin with the weights of this checkpoint.")
    ] = None,
    hold_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of patients to measure with instead of training on them.")
    ] = 0.0,
    features: Annotated[
        Path | None, typer.Option(help="A VGG's weights (.safetensors), for the preset's perceptual loss to look with.")
    ] = None,
    keep_strides: Annotated[
        bool, typer.Option("--keep-strides", help="Do not fit the preset to the data's voxel size.")
    ] = False,
    pictures: Annotated[
        bool, typer.Option(help="Save pictures of cases as it trains. They show real patients: keep them.")
    ] = True,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what time, memory and disk it takes.")] = False,
    device: Device = "auto",
    few_steps: Annotated[
        int | None,
        typer.Option(min=1, max=8, help="Teach the model to draw in so many calls; with --from, nothing but that."),
    ] = None,
    steps_scale: Annotated[float, typer.Option(help="Multiply the preset's steps.")] = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train on folders of pairs: compression, synthesis, then texture. Running it again goes on where it stopped.

    Several GPUs: accelerate launch -m medlsdm.cli train ...
    """
    from medlsdm.config import load_preset, load_schema
    from medlsdm.training.folders import read_sources

    sources = _sources(data, modality or ["MR"])
    settings = load_preset(preset or "tiny").scaled(steps_scale)
    labels = load_schema(schema) if schema else None
    checkpoint = None
    if start is not None:
        from medlsdm.exports.folders import from_pretrained

        checkpoint = from_pretrained(start)
        settings = settings if preset else checkpoint.preset.scaled(steps_scale)
        labels = labels or checkpoint.schema
    if few_steps:
        settings = settings.for_few_steps(few_steps).only_few_steps() if start else settings.for_few_steps(few_steps)
    pairs = read_sources(sources, labels)

    from medlsdm.training.devices import join_processes
    from medlsdm.training.patients import typical_spacing

    if checkpoint is None and not keep_strides:
        settings = settings.for_spacing(typical_spacing(scan.geometry for scan, _ in pairs))
    _set_threads(threads)
    network = None
    if features is not None:
        from medlsdm.models.perceptual import load_features

        network = load_features(features)
    arguments: dict[str, Any] = {
        "preset": settings, "seed": seed, "device": join_processes(device), "start": checkpoint, "hold_out": hold_out,
        "features": network,
    }  # fmt: skip
    if estimate:
        _estimate(pairs, arguments, json)
    else:
        _train(out, pairs, pictures, arguments, json)


def _sources(data: list[Path], modality: list[str]) -> list[tuple[Path, Modality]]:
    """Give each data folder its modality."""
    from medlsdm.errors import UsageError

    kinds = [_modality(name) for name in modality]
    if len(kinds) not in (1, len(data)):
        raise UsageError(f"{len(data)} --data and {len(kinds)} --modality.", "Give one, or one for each --data.")
    return list(zip(data, kinds * (len(data) if len(kinds) == 1 else 1), strict=True))


def _estimate(pairs: list[Pair], arguments: dict[str, Any], as_json: bool) -> None:
    """Say what a run with these arguments would take; where several processes train, the first one does."""
    from medlsdm.training.devices import rank_and_size
    from medlsdm.training.estimate import estimate_training
    from medlsdm.training.patients import prepare

    told = estimate_training(data=prepare(pairs, arguments["preset"]), **arguments)
    if rank_and_size()[0] == 0:
        _render(told.to_json(), as_json)


def _train(out: Path, pairs: list[Pair], pictures: bool, arguments: dict[str, Any], as_json: bool) -> None:
    """Train a run with these arguments and say what came of it; where several processes train, the first one does."""
    from medlsdm.training.devices import memory_advice, rank_and_size
    from medlsdm.training.patients import prepare
    from medlsdm.training.run import TrainingRun

    started = time.process_time()
    advice = "Lower batch, crop or window in the preset, take a smaller preset, or use less data."
    with _progress() as report, memory_advice("training", advice):
        data = prepare(pairs, arguments["preset"])
        run = TrainingRun(out, data=data, progress=report, pictures=pictures, **arguments)
        card = run.train()
    if rank_and_size()[0] == 0:
        result = {
            "out": str(out),
            "model_id": card.model_id,
            "pairs": len(pairs),
            "held_out": len(run.held_out or ()),
            "steps": card.steps,
            "logs": run.log.description,
            "cpu_seconds": round(time.process_time() - started, 1),
            "card_digest": card.digest,
        }
        _render(result, as_json)


@app.command()
def synthesise(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a trained run, or an exported one.")],
    labels: Annotated[Path, typer.Option(help="A label map, or a folder of them (.nii.gz).")],
    out: Annotated[Path, typer.Option(help="Folder for the volumes.")],
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="1 is none.")] = None,
    modality: Annotated[str | None, typer.Option(help="CT, MR or PT; the checkpoint's first by default.")] = None,
    smooth: Annotated[bool, typer.Option("--smooth", help="Leave out the texture decoder.")] = False,
    unknown: Annotated[
        list[int] | None, typer.Option(help="A label value that says nothing: the model fills in. May be repeated.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Most memory to use, for example 4GB; a share of what is free by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    json: Json = False,
) -> None:
    """Make one volume for each label map, on its grid and under its file name."""
    from medlsdm.errors import BusyError, UsageError

    kind = _modality(modality) if modality else None
    paths = _label_files(labels)
    if out.exists() and not out.is_dir():
        raise BusyError(f"{str(out)!r} is a file.", "Give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise BusyError(f"The folder {str(out)!r} is not empty.", "Give another one, or --overwrite.")

    from medlsdm.exports.folders import from_pretrained
    from medlsdm.memory import parse_bytes
    from medlsdm.synthesis import LARGEST_SEED, Synthesiser
    from medlsdm.training.folders import read_labels
    from medlsdm.volumes import nifti_stem, write_nifti

    if seed + len(paths) - 1 > LARGEST_SEED:
        raise UsageError(f"{len(paths)} seeds from {seed} on end beyond {LARGEST_SEED}.", "Give a smaller --seed.")
    allowed = parse_bytes(memory) if memory else None
    loaded = from_pretrained(checkpoint)
    synthesiser = Synthesiser(loaded, threads, device, smooth=smooth, unknown=unknown or ())
    seeds = [seed + index for index in range(len(paths))]
    maps = (_told(read_labels(path, loaded.schema), path) for path in paths)
    volumes = synthesiser.synthesise_many(
        maps, seeds=seeds, steps=steps, guidance=guidance, modality=kind, memory=allowed
    )
    rows, started = [], time.process_time()
    for path, volume in zip(paths, volumes, strict=True):
        target = out / f"{nifti_stem(path)}.nii.gz"
        write_nifti(target, volume.array, volume.geometry)
        seconds, started = round(time.process_time() - started, 2), time.process_time()
        row = {"file": target.name, "seed": volume.provenance.seed, "cpu_seconds": seconds}
        plan = synthesiser.last_plan
        rows.append(row | ({"plan": plan.to_json() if json else plan.summary} if plan else {}))
        print(f"{target.name} ({len(rows)} of {len(paths)})", file=sys.stderr)
    _render({"out": str(out), "card_digest": loaded.card.digest, "volumes": rows}, json)


def _told(labels: SemanticMap, path: Path) -> SemanticMap:
    """Return the map; say so where there is nothing in it to follow."""
    if (labels.array == labels.array.flat[0]).all():
        line = f"warning: {path.name} holds one class only; check that it is the right file"
        print(line, file=sys.stderr)
    return labels


@app.command()
def evaluate(
    real: Annotated[Path, typer.Option(help="Folder of real volumes.")],
    synthetic: Annotated[Path, typer.Option(help="Folder of synthetic volumes.")],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of the label maps that the synthetic volumes were made from.")
    ] = None,
    real_labels: Annotated[Path | None, typer.Option(help="Folder of the real volumes' label maps.")] = None,
    segmenter_steps: Annotated[int, typer.Option(min=1, help="How long to train the segmenter.")] = 1500,
    modality: Kind = "MR",
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare synthetic volumes with real ones; with label maps also by a segmenter trained on the real pairs."""
    from medlsdm.evaluation.folders import compare_folders

    kind = _modality(modality)
    _set_threads(threads)
    if labels is not None and real_labels is not None:
        print(f"Training a segmenter on the real pairs, {segmenter_steps} steps.", file=sys.stderr)
    found = compare_folders(
        real, synthetic, kind, labels=labels, real_labels=real_labels, steps=segmenter_steps, seed=seed
    )
    _render(found.to_json(), json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    layout: Annotated[str, typer.Option("--format", help="hf (Hugging Face folder) or monai (MONAI bundle).")] = "hf",
    licence: Annotated[str, typer.Option(help="Licence of the weights, as the Hugging Face Hub names it.")] = "unknown",
    json: Json = False,
) -> None:
    """Write a trained model in the layout of others' tools. The card, with what it says of privacy, goes along."""
    from medlsdm.errors import UsageError

    if layout == "hf":
        from medlsdm.exports.hugging_face import export_hugging_face

        card = export_hugging_face(run, out, licence=licence)
    elif layout == "monai":
        from medlsdm.exports.monai_bundle import export_monai_bundle

        card = export_monai_bundle(run, out)
    else:
        raise UsageError(f"{layout!r} is not a layout.", "Use hf or monai.")
    print(f"privacy: {card.privacy}", file=sys.stderr)
    _render({"out": str(out), "model_id": card.model_id, "card_digest": card.digest}, json)


def _label_files(path: Path) -> list[Path]:
    from medlsdm.checks import existing_folder
    from medlsdm.errors import DataError
    from medlsdm.volumes import list_nifti

    if path.is_file():
        return [path]
    found = list_nifti(existing_folder(path, "The label map folder"))
    if not found:
        raise DataError(f"{str(path)!r} holds no NIfTI file.", "Put .nii.gz label maps there.")
    return found


def _set_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _render(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        terminal.print_json(result)
        return
    for key, value in result.items():
        rows = value if isinstance(value, list) else [value]
        for row in rows:
            print(f"{key.replace('_', ' ')}: {_plain(row)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, tuple):
        return " ".join(_plain(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Show a bar on stderr where a terminal is there, else a line every 15 s."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=console) as bars:
            tasks: dict[str, Any] = {}

            def advance(progress: Progress) -> None:
                if progress.stage not in tasks:
                    tasks[progress.stage] = bars.add_task(progress.stage, total=progress.steps)
                text = f"{progress.stage}, loss {progress.loss:.3f}"
                bars.update(tasks[progress.stage], completed=progress.step, description=text)

            yield advance
        return
    last = [0.0]

    def line(progress: Progress) -> None:
        if time.monotonic() - last[0] > 15 or progress.step == progress.steps:
            last[0] = time.monotonic()
            text = f"{progress.stage}: step {progress.step} of {progress.steps}, loss {progress.loss:.4f}"
            print(text, file=sys.stderr, flush=True)

    yield line


def main() -> None:
    """Run ``medlsdm``."""
    terminal.run(app, "medlsdm")


if __name__ == "__main__":
    main()
