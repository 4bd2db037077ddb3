"""The model card: what a checkpoint is, where it comes from and what it must not be used for."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from medlsdm.config import Preset
from medlsdm.errors import ConfigError, IntegrityError
from medlsdm.types import LabelSchema, Modality

NO_GUARANTEE = (
    "No formal guarantee: trained without differential privacy. Weights may hold traces of patients; "
    "share them only where sharing the training data would be acceptable."
)
LIMITS = (
    "Synthetic volumes are for research. They show plausible anatomy, not a patient's; texture, rare "
    "pathology and quantities such as volumes or uptake are not validated. Not for diagnosis."
)


class ModelCard(BaseModel):
    """Describe one checkpoint. ``files`` maps each weight file to its SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    preset: Preset
    label_schema: dict[str, Any]
    modalities: tuple[Modality, ...]
    rounds: int = 0
    sites: tuple[str, ...] = ()
    steps: dict[str, int] = {}
    config_digest: str
    files: dict[str, str]
    training_data: str = "Not stated."
    privacy: str = NO_GUARANTEE
    limits: str = LIMITS
    created: str

    @property
    def schema(self) -> LabelSchema:  # type: ignore[override]
        """Return the label schema."""
        return LabelSchema.from_json(self.label_schema)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the card's content; it travels with every synthetic volume."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json"))).hexdigest()

    @property
    def checkpoint_digest(self) -> str:
        """Return one SHA-256 for all weight files."""
        return hashlib.sha256(_canonical(self.files)).hexdigest()

    def to_json_bytes(self) -> bytes:
        """Return the canonical JSON form, with the card's own digest inside."""
        return _canonical({**self.model_dump(mode="json"), "digest": self.digest}) + b"\n"

    @classmethod
    def from_json_bytes(cls, content: bytes) -> Self:
        """Read a card back.

        Raises:
            IntegrityError: One byte or more was changed.
            ConfigError: The card is whole, but describes a model that this version does not know.
        """
        try:
            data = json.loads(content)
            digest = data.pop("digest")
            whole = digest == hashlib.sha256(_canonical(data)).hexdigest()
            whole = whole and content == _canonical({**data, "digest": digest}) + b"\n"
        except (ValueError, AttributeError, KeyError, TypeError):
            whole, data = False, None
        if not whole:
            raise IntegrityError("The model card does not match its own digest.", "Restore the checkpoint.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(
                "The model card describes a model that this version does not know.", "Update medlsdm."
            ) from error

    def to_markdown(self) -> str:
        """Return the card for people."""
        classes = ", ".join(c.name for c in self.schema.classes)
        rows = {
            "Preset": f"{self.preset.name} (settings {self.config_digest[:12]})",
            "Modalities": ", ".join(self.modalities),
            "Label schema": f"{self.schema.name}: {classes}",
            "Steps": ", ".join(f"{stage} {count}" for stage, count in self.steps.items()) or "none",
            "Federated rounds": str(self.rounds),
            "Sites": ", ".join(self.sites) or "one machine",
            "Created": self.created,
            "Card digest": self.digest,
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        files = "\n".join(f"- `{name}`: `{digest}`" for name, digest in sorted(self.files.items()))
        return (
            f"# {self.model_id}\n\n| | |\n|---|---|\n{table}\n\n"
            f"## Training data\n{self.training_data}\n\n## Privacy\n{self.privacy}\n\n"
            f"## Limits\n{self.limits}\n\n## Files\n{files}\n"
        )


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
