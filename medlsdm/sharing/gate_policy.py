"""What a site asks of an export: apart from the gate itself, so that a policy is read without the gate's tools."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from medlsdm.privacy import MIN_PATIENTS


class GatePolicy(BaseModel):
    """Say what a site asks of an export. Every number may be tightened; the defaults are for small sites.

    Attributes:
        min_patients: Patients below which nothing is exported.
        max_blocked_fraction: Share of a batch that may be blocked before the whole batch is refused.
        plants: Copies planted in every audit.
        min_plant_recall: What the one-sided 95 % lower bound of the plants' recall must reach.
        min_label_voxels: Voxels a label needs to be judged.
        label_room: How far beyond 3 sd of the reals a label's mean may lie, in units of the volume's range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    min_patients: int = Field(default=MIN_PATIENTS, ge=MIN_PATIENTS)
    max_blocked_fraction: float = Field(default=0.25, ge=0, lt=1)
    plants: int = Field(default=60, ge=20)
    min_plant_recall: float = Field(default=0.85, gt=0, lt=1)
    min_label_voxels: int = Field(default=20, ge=1)
    label_room: float = Field(default=0.15, ge=0, le=1)
