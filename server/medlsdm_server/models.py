"""The models that rounds made: one folder each, ``<id>/card.json`` beside the weights.

``<launch>/stage1-003`` is the checkpoint after round 3 of stage 1; the highest of stage 2 is the model.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medlsdm.checks import file_digest
from medlsdm.errors import DataError
from medlsdm.federation.plan import CHECKPOINT_ID

CHECKPOINT = re.compile(CHECKPOINT_ID)
FILES = ("card.json", "card.md", "autoencoder.safetensors", "denoiser.safetensors")


@dataclass(frozen=True, slots=True)
class Model:
    """Describe one checkpoint: its id, stage, round, and the digest of its card."""

    id: str
    launch: str
    stage: str
    round: int
    digest: str
    created: str
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def checkpoint_id(launch: str, stage: str, number: int) -> str:
    """Name the checkpoint after a round."""
    return f"{launch}.{stage}-{number:04d}"


def list_models(folder: Path) -> list[Model]:
    """Return the finished checkpoints, oldest first."""
    models = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not CHECKPOINT.fullmatch(path.name) or not (path / "card.json").exists():
            continue
        launch, _, rest = path.name.rpartition(".")
        stage, _, number = rest.partition("-")
        card = json.loads((path / "card.json").read_bytes())
        size = sum(f.stat().st_size for f in path.iterdir())
        created = str(card.get("created", ""))
        models.append(Model(path.name, launch, stage, int(number), file_digest(path / "card.json"), created, size))
    return sorted(models, key=lambda m: (m.created, m.stage, m.round))


def latest(folder: Path) -> Model | None:
    """Return the newest checkpoint that can synthesise (stage 2), or None."""
    ready = [m for m in list_models(folder) if m.stage == "stage2"]
    return ready[-1] if ready else None


def file_of(folder: Path, model: str, name: str) -> Path:
    """Return the path of one file of a checkpoint, from names that came over the network."""
    path = folder / model / name
    if not CHECKPOINT.fullmatch(model) or name not in FILES or not path.is_file():
        raise DataError("There is no such model or file.", "See 'medlsdm-server models'.")
    return path
