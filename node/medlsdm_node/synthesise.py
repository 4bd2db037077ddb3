"""Label maps in, synthetic volumes into the vault, where they wait for the gate."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medlsdm.checks import existing_folder
from medlsdm.errors import DataError, NetworkError, SchemaError
from medlsdm.types import Modality, SemanticMap
from medlsdm.volumes import list_nifti, read_nifti
from medlsdm_node.coordinator import Coordinator
from medlsdm_node.home import NodeHome
from medlsdm_node.status import write_activity
from medlsdm_node.vault import Vault

log = logging.getLogger(__name__)


def choose_model(home: NodeHome, wanted: str) -> Path:
    """Return the folder of a checkpoint: the one named, else the coordinator's newest, else the newest here.

    Raises:
        DataError: There is none yet.
    """
    local = sorted(p.name for p in home.models.iterdir() if not p.name.startswith(".") and ".stage2-" in p.name)
    if wanted in local:
        return home.models / wanted
    if home.server_file.exists():
        coordinator = Coordinator.joined(home)
        try:
            remote = [m["id"] for m in coordinator.models() if m["stage"] == "stage2"]
        except NetworkError:
            if wanted or not local:
                raise
            log.warning("the coordinator does not answer; using the newest model that is here")
            return home.models / local[-1]
        if wanted and wanted not in remote:
            raise DataError(f"There is no model {wanted!r}.", "Leave --model out to take the newest.")
        if wanted or remote:
            return coordinator.fetch_model(wanted or remote[-1])
    if wanted or not local:
        raise DataError("There is no trained model yet.", "Take part in a launch, or import a checkpoint.")
    return home.models / local[-1]


def read_labels(path: Path, home: NodeHome) -> SemanticMap:
    """Read one NIfTI label map under the site's schema."""
    array, geometry = read_nifti(path)
    if array.dtype.kind == "f":
        if (array != array.round()).any():
            raise SchemaError(f"{path.name} does not hold whole numbers.", "Give a label map.")
        array = array.astype("int64")
    return SemanticMap(array, geometry, home.settings.label_schema)


def synthesise(
    home: NodeHome, source: Path, *, seed: int, model: str = "", modality: Modality | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Make one volume for each label map of a folder (or the one file) and keep it until export.

    The seed of a volume is drawn from ``seed`` and its label map, so it does not depend on the others.
    """
    files = [source] if source.is_file() else list_nifti(existing_folder(source, "The label folder"))
    if not files:
        raise DataError(f"{str(source)!r} holds no NIfTI label map.", "Give .nii or .nii.gz files.")
    maps = [read_labels(path, home) for path in files]
    from medlsdm.checkpoints import load_checkpoint
    from medlsdm.synthesis import Synthesiser

    checkpoint = load_checkpoint(choose_model(home, model))
    engine, vault = Synthesiser(checkpoint, threads=home.settings.threads or None), Vault(home)
    rows = []
    with home.locked("synthesise"):
        for number, labels in enumerate(maps):
            own = int(hashlib.sha256(f"{seed}|{labels.digest}".encode()).hexdigest()[:8], 16)
            write_activity(home, "synthesising", done=number, steps=len(maps))
            volume = engine.synthesise(labels, seed=own, modality=modality)
            name = hashlib.sha256(f"{volume.provenance}".encode()).hexdigest()[:16]
            vault.put_synthetic(name, volume, labels)
            rows.append(
                {"id": name, "modality": str(volume.modality), "shape": list(volume.geometry.shape), "seed": own}
            )
            if progress is not None:
                progress(number + 1, len(maps))
        write_activity(home, "idle")
    home.audit.append("synthesise", volumes=len(rows), card=checkpoint.card.digest)
    return rows
