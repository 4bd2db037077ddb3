"""What a run of the pipeline says: to a program, to the person at the machine, and to nobody else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deid_tools.treatment import NOTHING_DONE, PixelRecord

PROGRAM = "medlsdm-deid"


@dataclass(frozen=True, slots=True)
class StudyEvidence:
    """Hold what was done to one study: plain JSON values, in which nothing of an original stands."""

    patient: str
    study: str
    document: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Return pseudonym and study token: the name of its files."""
        return f"{self.patient}-{self.study}"


@dataclass(frozen=True, slots=True)
class SeriesRecord:
    """Describe one series that passed: its token (pseudonym/series), modality, and how many files.

    ``labels_held`` counts the label maps that belong to it and are held. ``notes`` say in words what
    its geometry asks for: a tilt, several volumes, why it is no volume.
    """

    token: str
    modality: str
    images: int
    labels: int
    already: bool = False
    labels_held: int = 0
    notes: tuple[str, ...] = ()
    pixels: PixelRecord = NOTHING_DONE


@dataclass(frozen=True, slots=True)
class HeldFile:
    """Say why one file is held. ``path`` is for the local user and is never written down.

    ``study`` is the name of the study's evidence, where the file says what it belongs to.
    """

    token: str
    path: Path = field(repr=False)
    reason: str
    study: str = ""


@dataclass(frozen=True, slots=True)
class DeidReport:
    """Sum up a run: what passed, what is held and why, and with which recipe and tools."""

    series: tuple[SeriesRecord, ...]
    held: tuple[HeldFile, ...] = field(repr=False)
    files_seen: int
    recipe_sha256: str
    ocr: str
    tools: dict[str, str]
    recipe: str = "allow-list"
    key_id: str = ""
    removed: dict[str, int] = field(default_factory=dict)
    pixel_policy: str = ""
    studies: tuple[StudyEvidence, ...] = field(default=(), repr=False)

    @property
    def patients(self) -> int:
        """Return how many pseudonyms the passed series belong to."""
        return len({record.token.split("/")[0] for record in self.series})

    def reasons(self) -> dict[str, int]:
        """Return how many files are held for each reason, the most frequent first."""
        return dict(Counter(h.reason for h in self.held).most_common())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values without paths: safe to keep beside the output."""
        return {
            "program": PROGRAM,
            "finished": True,
            "files_seen": self.files_seen,
            "patients": self.patients,
            "series": [
                {
                    "token": s.token,
                    "modality": s.modality,
                    "images": s.images,
                    "labels": s.labels,
                    "already_there": s.already,
                    "labels_held": s.labels_held,
                    "notes": list(s.notes),
                    "text_boxes_blanked": s.pixels.text_boxes,
                    "face": s.pixels.face,
                    "face_guard": s.pixels.guard,
                }
                for s in self.series
            ],
            "quarantined": [{"token": h.token, "reason": h.reason} for h in self.held],
            "reasons": self.reasons(),
            "recipe": self.recipe,
            "key_id": self.key_id,
            "unreadable_values": self.removed,
            "pixel_policy": self.pixel_policy,
            "recipe_sha256": self.recipe_sha256,
            "burned_in_text": self.ocr,
            "tools": self.tools,
        }
