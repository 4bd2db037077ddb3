"""What a run writes down as it trains: two CSV files, and TensorBoard's events where it is installed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlsdm.checks import write_atomic
from medlsdm.training.loop import Progress

LOSSES, VALIDATION, EVENTS = "losses.csv", "validation.csv", "tensorboard"
LOSS_COLUMNS = ("stage", "step", "loss", "learning_rate", "gradient_norm", "seconds")
VALIDATION_COLUMNS = ("stage", "step", "measure", "value")
EVENT_EVERY = 10


class TrainingLog:
    """Keep the losses of every step and the measures of every save.

    Rows beyond ``position``, which a run that was killed left behind, are dropped: the steps come again.

    Args:
        folder: The run's folder.
        position: How many steps of each stage are saved.
        totals: How many steps each stage has, in their order; TensorBoard counts through.
    """

    def __init__(self, folder: Path, position: Mapping[str, int], totals: Mapping[str, int]) -> None:
        self.folder = folder
        self._rows: dict[str, list[list[str]]] = {LOSSES: [], VALIDATION: []}
        for name, columns in ((LOSSES, LOSS_COLUMNS), (VALIDATION, VALIDATION_COLUMNS)):
            _trim(folder / name, columns, position)
        self._begin = {name: sum(list(totals.values())[:index]) for index, name in enumerate(totals)}
        self._events = _writer(folder / EVENTS, sum(position.values()))
        self._with_events = self._events is not None

    @property
    def description(self) -> str:
        """Say what is written, and how to get the rest."""
        if self._with_events:
            return f"{LOSSES}, {VALIDATION}, {EVENTS}/"
        return f"{LOSSES}, {VALIDATION} (for TensorBoard: pip install 'medlsdm[logs]')"

    def note(self, progress: Progress) -> None:
        """Keep one step."""
        values = (progress.loss, progress.learning_rate, progress.gradient_norm, progress.seconds)
        self._rows[LOSSES].append([progress.stage, str(progress.step), *(f"{v:.6g}" for v in values)])
        if self._events is not None and progress.step % EVENT_EVERY == 0:
            for name, value in zip(LOSS_COLUMNS[2:], values, strict=True):
                self._scalar(progress.stage, progress.step, name, value)

    def measure(self, stage: str, step: int, measures: Mapping[str, float]) -> None:
        """Keep what was measured at a save."""
        for name, value in measures.items():
            self._rows[VALIDATION].append([stage, str(step), name, f"{value:.6g}"])
            self._scalar(stage, step, name, value)

    def picture(self, stage: str, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show TensorBoard a picture [height, width, RGB]."""
        if self._events is not None:
            self._events.add_image(f"{stage}/{name}", picture, self._begin[stage] + step, dataformats="HWC")

    def flush(self) -> None:
        """Write what was kept."""
        for name, columns in ((LOSSES, LOSS_COLUMNS), (VALIDATION, VALIDATION_COLUMNS)):
            if self._rows[name]:
                _append(self.folder / name, columns, self._rows[name])
                self._rows[name] = []
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Write what was kept and let go of the files."""
        self.flush()
        if self._events is not None:
            self._events.close()
            self._events = None

    def _scalar(self, stage: str, step: int, name: str, value: float) -> None:
        if self._events is not None and math.isfinite(value):
            self._events.add_scalar(f"{stage}/{name}", value, self._begin[stage] + step)


def _writer(folder: Path, step: int) -> Any:
    """Return TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _append(path: Path, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([list(columns), *rows] if fresh else rows)


def _trim(path: Path, columns: tuple[str, ...], position: Mapping[str, int]) -> None:
    """Drop rows of steps that were not saved, half a row included."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.reader(stream) if len(row) == len(columns) and row[1].isdigit()]
    kept = io.StringIO(newline="")
    csv.writer(kept).writerows([columns, *(row for row in rows if int(row[1]) <= position.get(row[0], 0))])
    write_atomic(path, kept.getvalue().encode())
