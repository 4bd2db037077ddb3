"""What a round asks of a site and what the site returns, as versioned JSON beside the arrays."""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.errors import ConfigError
from medlsdm.federation.identity import RosterEntry

PLAN_VERSION = 1
CHECKPOINT_ID = r"^[a-z0-9-]{1,64}\.stage[12]-[0-9]{4,5}$"


class Stage(StrEnum):
    """Name what is trained: the autoencoder, then the denoiser of its latents."""

    STAGE1 = "stage1"
    STAGE2 = "stage2"


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = PLAN_VERSION

    def to_json(self) -> str:
        """Return canonical JSON."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what the other side sent.

        Raises:
            ConfigError: It is of another version or form.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                f"A {cls.__name__} of another version or form arrived.",
                "Install the same medlsdm release on both sides.",
            ) from error


class RoundPlan(_Wire):
    """Ask a site to train for ``steps`` steps.

    ``first_step`` and ``total_steps`` place the round in the schedule of its stage, so that rounds are
    slices of one learning-rate curve. ``preset`` and ``labels`` are the resolved model settings and the
    label schema as JSON values. ``autoencoder`` is the checkpoint id of the frozen stage 1 in stage 2. ``schedule``
    states rounds and steps of both stages, so that a site can agree to the whole; ``roster`` names who takes part, each
    in its own signed words.
    """

    model: str = Field(pattern=r"^[a-z0-9-]{1,64}$")
    stage: Stage
    round: int = Field(ge=1, le=10_000)
    rounds: int = Field(ge=1, le=10_000)
    steps: int = Field(ge=1, le=10_000_000)
    first_step: int = Field(ge=0)
    total_steps: int = Field(ge=1)
    preset: dict[str, Any]
    labels: dict[str, Any]
    autoencoder: str = Field(default="", pattern=rf"^$|{CHECKPOINT_ID}")
    sites: int = Field(ge=1, description="how many sites take part")
    seed: int = 0
    privacy: Literal["none"] = "none"
    proximal_mu: float = Field(default=0, ge=0, le=100, description="FedProx: pulls towards the weights that were sent")
    schedule: dict[Stage, tuple[int, int]] = Field(default_factory=dict)
    roster: tuple[RosterEntry, ...] = ()

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what a site agrees to: all that stays the same from round to round."""
        schedule = self.schedule or {self.stage: (self.rounds, self.steps)}
        rows = {str(stage): list(row) for stage, row in sorted(schedule.items())}
        agreed = {
            "preset": self.preset, "labels": self.labels, "sites": self.sites, "seed": self.seed,
            "privacy": self.privacy, "proximal_mu": self.proximal_mu, "schedule": rows,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(agreed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def summary(self) -> str:
        """Return the plan in one line that a person can read."""
        schedule = self.schedule or {self.stage: (self.rounds, self.steps)}
        rounds = ", ".join(f"{stage}: {r} rounds of {s} steps" for stage, (r, s) in sorted(schedule.items()))
        name, labels = self.preset.get("name", "?"), self.labels.get("name", "?")
        privacy = "no differential privacy" if self.privacy == "none" else self.privacy
        return f"preset {name} on schema {labels}; {rounds}; {self.sites} sites; {privacy}"


class RoundReply(_Wire):
    """Return what a site says about its round: a declared weight, and a loss where its policy allows.

    ``weight`` is what the site's policy declares, never an exact number of patients.
    """

    weight: float = Field(gt=0)
    loss: float | None = None
    training_seconds: float = Field(ge=0)
