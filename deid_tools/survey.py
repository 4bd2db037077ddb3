"""Follow one series through de-identification and say what volumes it makes, before anyone opens it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deid_tools.admit import Refusal
from deid_tools.series import equal_pixels, plan_volumes
from deid_tools.slices import Frame, read_frames
from deid_tools.stacks import SeriesPlan
from medlsdm.errors import DataError, GeometryError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@dataclass(slots=True)
class Survey:
    """Gather where each image of a series lies, and what was found wrong with its values."""

    frames: list[Frame] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    taken: int = 0
    placed: bool = True

    def take(self, ds: Dataset) -> None:
        """Read the next image's header, in the order of the series' files; nothing of it is kept but numbers."""
        try:
            self.frames += read_frames(ds, self.taken)
        except GeometryError as error:
            self.problem(error.message)
            self.placed = False
        self.taken += 1

    def merge(self, later: Survey) -> None:
        """Take over what was found in the files that follow."""
        self.frames += [replace(frame, source=frame.source + self.taken) for frame in later.frames]
        self.taken += later.taken
        self.placed = self.placed and later.placed
        for sentence in later.problems:
            self.problem(sentence)

    def problem(self, sentence: str) -> None:
        """Remember what is wrong with the series, once."""
        if sentence and sentence not in self.problems:
            self.problems.append(sentence)

    def plan(self, paths: Sequence[Path]) -> tuple[SeriesPlan | None, tuple[str, ...]]:
        """Return the plan of a series that is one volume, and what there is to say about it.

        Args:
            paths: The files as written, in the order in which they were taken.
        """
        if not self.placed:
            return None, tuple(self.problems)
        try:
            planned = plan_volumes(self.frames, equal_pixels(paths))
        except (DataError, Refusal, OSError):
            return None, ("the pixels of a slice cannot be read",)
        notes = [*self.problems]
        notes += [note for p in planned for note in ((p.refusal,) if p.plan is None else p.plan.notes)]
        return (planned[0].plan if len(planned) == 1 else None), tuple(dict.fromkeys(notes))
