"""A MONAI bundle: configs/inference.json runs with ``python -m monai.bundle run``; the networks are ours."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from medlsdm import __version__
from medlsdm.checks import existing_folder
from medlsdm.errors import DataError
from medlsdm.exports.folders import MODELS, read_source, write_layout
from medlsdm.model_card import LIMITS, ModelCard
from medlsdm.synthesis import Synthesiser
from medlsdm.training.folders import read_labels
from medlsdm.volumes import list_nifti, nifti_stem, write_nifti

MONAI_VERSION = "1.6.1"
"""The version that bundles are tested with."""

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

README = """\

## Use
Put label maps (.nii.gz, schema "{schema}") into `labels/`, then, in this folder:

```sh
pip install medlsdm 'monai[fire]'
python -m monai.bundle run --config_file configs/inference.json --bundle_root .
```

The volumes come to `eval/`, on the maps' own grids. `--labels_dir`, `--output_dir`, `--seed`, `--steps` and
`--guidance` change what is done. In Python, `ConfigParser` gives the networks as `autoencoder` and `denoiser`.
"""


def export_monai_bundle(source: Path, out: Path) -> ModelCard:
    """Write a checkpoint as a MONAI bundle, and return its card.

    Args:
        source: A run, or an exported folder.
        out: A new or empty folder.

    Raises:
        DataError: There is no checkpoint, or stage 2 has not been trained.
        IntegrityError: A file was changed after it was written.
        BusyError: ``out`` holds something.
    """
    found = read_source(source)
    readme = found.card.to_markdown() + README.format(schema=found.card.schema.name)
    files = {
        "configs/inference.json": _json(inference_config()),
        "configs/metadata.json": _json(describe(found.card)),
        "docs/README.md": readme.encode(),
    }
    write_layout(out, files | {f"{MODELS}/{name}": content for name, content in found.files.items()})
    return found.card


def inference_config() -> dict[str, object]:
    """Return the bundle's program: every entry can be overridden by an option of its name."""
    return {
        "imports": ["$from pathlib import Path"],
        "bundle_root": ".",
        "labels_dir": "$@bundle_root + '/labels'",
        "output_dir": "$@bundle_root + '/eval'",
        "seed": 0,
        "steps": None,
        "guidance": None,
        "checkpoint": {"_target_": "medlsdm.exports.folders.from_pretrained", "folder": "@bundle_root"},
        "autoencoder": "$@checkpoint.build_autoencoder()",
        "denoiser": "$@checkpoint.build_denoiser()",
        "synthesiser": {"_target_": "medlsdm.synthesis.Synthesiser", "checkpoint": "@checkpoint"},
        "evaluator": {
            "_target_": "medlsdm.exports.monai_bundle.FolderSynthesis",
            "synthesiser": "@synthesiser",
            "labels": "$Path(@labels_dir)",
            "out": "$Path(@output_dir)",
            "seed": "@seed",
            "steps": "@steps",
            "guidance": "@guidance",
        },
        "run": ["$@evaluator.run()"],
    }


class FolderSynthesis:
    """Make one volume for each label map of a folder: what the bundle's ``run`` does."""

    def __init__(
        self,
        synthesiser: Synthesiser,
        labels: Path,
        out: Path,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> None:
        self.synthesiser, self.labels, self.out = synthesiser, labels, out
        self.seed, self.steps, self.guidance = seed, steps, guidance

    def run(self) -> list[Path]:
        """Write the volumes under the maps' names, seeds counted on from ``seed``, and return their paths.

        Raises:
            DataError: The folder holds no label map.
        """
        paths = list_nifti(existing_folder(self.labels, "The label map folder"))
        if not paths:
            raise DataError(f"{str(self.labels)!r} holds no NIfTI file.", "Put .nii.gz label maps there.")
        schema = self.synthesiser.checkpoint.schema
        volumes = self.synthesiser.synthesise_many(
            (read_labels(path, schema) for path in paths),
            seeds=range(self.seed, self.seed + len(paths)),
            steps=self.steps,
            guidance=self.guidance,
        )
        written = []
        for path, volume in zip(paths, volumes, strict=True):
            written.append(self.out / f"{nifti_stem(path)}.nii.gz")
            write_nifti(written[-1], volume.array, volume.geometry)
        return written


def describe(card: ModelCard) -> dict[str, object]:
    """Return ``metadata.json``: MONAI's fields, with the card's digest and what it says of privacy."""
    names = {str(index): cls.name for index, cls in enumerate(sorted(card.schema.classes, key=lambda c: c.id))}
    modality = "/".join(card.modalities)
    image = {
        "type": "image", "format": modality, "modality": modality, "num_channels": 1, "spatial_shape": ["*", "*", "*"],
        "dtype": "float32", "value_range": [], "is_patch_data": False, "channel_def": {"0": "image"},
    }  # fmt: skip
    labels = image | {
        "format": "segmentation", "modality": "n/a", "dtype": "uint16", "value_range": list(card.schema.ids),
        "channel_def": names,
    }  # fmt: skip
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported from {card.model_id}"},
        "monai_version": MONAI_VERSION,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"medlsdm": __version__, "nibabel": metadata.version("nibabel")},
        "name": card.model_id,
        "task": "Synthesis of 3D volumes from label maps",
        "description": "A 3D VQ-GAN and a latent diffusion model guided by a label map (Med-LSDM).",
        "authors": ", ".join(card.sites) or "not stated",
        "copyright": "not stated",
        "data_source": card.training_data,
        "data_type": "nifti",
        "image_classes": "single channel, label map of the schema in models/card.json",
        "intended_use": LIMITS,
        "privacy": card.privacy,
        "card_digest": card.digest,
        "checkpoint_digest": card.checkpoint_digest,
        "network_data_format": {"inputs": {"image": labels}, "outputs": {"pred": image}},
    }


def _json(value: object) -> bytes:
    return json.dumps(value, indent=4).encode() + b"\n"
