"""A folder as the Hugging Face Hub expects it: config.json, safetensors, and a card with YAML front matter."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from medlsdm import __version__
from medlsdm.exports.folders import read_source, write_layout
from medlsdm.model_card import ModelCard

USE = """\
## Use
```python
from medlsdm.exports.folders import from_pretrained
from medlsdm.synthesis import Synthesiser
from medlsdm.types import SemanticMap

checkpoint = from_pretrained("FOLDER")
labels = SemanticMap(array, geometry, checkpoint.schema)
volume = Synthesiser(checkpoint).synthesise(labels, seed=1)
```
`pip install medlsdm`; `medlsdm synthesise --checkpoint FOLDER --labels MAPS --out SYNTHETIC` does it from the shell.
"""


def export_hugging_face(source: Path, out: Path, *, licence: str = "unknown") -> ModelCard:
    """Write a checkpoint as a Hugging Face folder, and return its card.

    The weights and the card stay what they were, byte for byte, so ``from_pretrained`` checks them and
    ``medlsdm synthesise --checkpoint`` takes the folder as it is.

    Args:
        source: A run, or an exported folder.
        out: A new or empty folder.
        licence: The Hub's name of the weights' licence, for example ``cc-by-4.0``.

    Raises:
        DataError: There is no checkpoint, or stage 2 has not been trained.
        IntegrityError: A file was changed after it was written.
        BusyError: ``out`` holds something.
    """
    found = read_source(source)
    readme = front_matter(found.card, licence) + found.card.to_markdown() + "\n" + USE
    config = json.dumps(describe(found.card), indent=2, sort_keys=True) + "\n"
    write_layout(out, {"README.md": readme.encode(), "config.json": config.encode()} | found.files)
    return found.card


def front_matter(card: ModelCard, licence: str) -> str:
    """Return the YAML between dashes that the Hub reads."""
    tags = ["medical-imaging", "3d", "latent-diffusion", "semantic-image-synthesis", "synthetic-data"]
    fields = {
        "license": licence,
        "library_name": "medlsdm",
        "tags": tags + [kind.lower() for kind in card.modalities],
        "inference": False,
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def describe(card: ModelCard) -> dict[str, object]:
    """Return what ``config.json`` says: the architecture, and the digests that lead back to the card."""
    return {
        "model_type": "medlsdm",
        "architectures": ["VQGAN", "SemanticUNet"],
        "medlsdm_version": __version__,
        "model_id": card.model_id,
        "card_digest": card.digest,
        "checkpoint_digest": card.checkpoint_digest,
        "weights": dict(sorted(card.files.items())),
        "modalities": list(card.modalities),
        "label_schema": card.label_schema,
        "preset": card.preset.model_dump(mode="json"),
    }
