"""What a round asks of a site and what the site returns, as versioned JSON beside the arrays."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.errors import ConfigError

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
    label schema as JSON values. ``autoencoder`` is the checkpoint id of the frozen stage 1 in stage 2.
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


class RoundReply(_Wire):
    """Return what a site says about its round: a declared weight, and a loss where its policy allows.

    ``weight`` is what the site's policy declares, never an exact number of patients.
    """

    weight: float = Field(gt=0)
    loss: float | None = None
    training_seconds: float = Field(ge=0)
