"""What a site says that its node does: read from a header, so checked word by word."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.federation.plan import Stage


class Activity(BaseModel):
    """Hold what a node does now; ``model``, ``stage`` and ``round`` say at which round of which launch."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    activity: Literal[
        "idle", "waiting", "receiving", "starting", "encoding", "training", "sending", "refused", "stopped"
    ]
    model: str = Field(default="", pattern=r"^[a-z0-9-]{0,64}$")
    stage: Stage | None = None
    round: int = Field(default=0, ge=0, le=10_000)


def read_activity(text: str) -> dict[str, Any]:
    """Return the activity as plain values, or nothing if it is of another form."""
    try:
        return Activity.model_validate_json(text[:300]).model_dump(mode="json")
    except ValidationError:
        return {}
