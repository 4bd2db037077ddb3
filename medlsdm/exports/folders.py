"""What every exported layout shares: a checkpoint's own files, unchanged, and the way back from any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medlsdm.checkpoints import CARD, Checkpoint, load_checkpoint
from medlsdm.checks import write_atomic
from medlsdm.errors import BusyError, DataError
from medlsdm.model_card import ModelCard

MODELS = "models"
"""Where a MONAI bundle keeps the checkpoint's files; the other layouts keep them at the top."""


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """Hold a checkpoint that is to be exported: its card, and its files byte for byte, the card last."""

    card: ModelCard
    files: dict[str, bytes]


def read_source(folder: Path) -> Source:
    """Read a run, or an exported folder, and check every file against the card.

    Raises:
        DataError: There is no checkpoint, or stage 2 has not been trained.
        IntegrityError: A file was changed after it was written.
    """
    place = checkpoint_folder(folder)
    checkpoint = load_checkpoint(place)
    if checkpoint.denoiser is None:
        raise DataError("The checkpoint ends after stage 1.", "Train stage 2 before exporting.")
    names = [*sorted(checkpoint.card.files), CARD]
    return Source(checkpoint.card, {name: (place / name).read_bytes() for name in names})


def write_layout(out: Path, files: dict[str, bytes]) -> None:
    """Write files, named by their path below ``out``, which must not hold anything yet.

    Raises:
        BusyError: It is a file, or a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BusyError(f"{str(out)!r} is there already, and not an empty folder.", "Give another one.")
    for name, content in files.items():
        write_atomic(out / name, content)


def from_pretrained(folder: Path | str) -> Checkpoint:
    """Load the checkpoint of a run, a Hugging Face folder or a MONAI bundle, every file checked against the card.

    Raises:
        DataError: There is no checkpoint in the folder.
        IntegrityError: A file was changed after it was written.
    """
    return load_checkpoint(checkpoint_folder(Path(folder)))


def checkpoint_folder(folder: Path) -> Path:
    """Return where a layout keeps the checkpoint's files."""
    inner = folder / MODELS
    return inner if (inner / CARD).is_file() else folder
