"""The site's own rules, in a file that only the hospital writes: asked before anything runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from medlsdm.errors import ConfigError, PolicyError, SchemaError
from medlsdm.federation.plan import RoundPlan, Stage
from medlsdm.sharing.gate_policy import GatePolicy
from medlsdm.types import LabelSchema

DEFAULT_POLICY = """\
# What this hospital allows. Only people of this hospital change this file; no message from outside can.
plans: any                    # "approved": train only plans that 'medlsdm-node plans approve' names
hours: always                 # or, for example, ["20:00-06:00"]: begin rounds only then (local time)
max_rounds: 1000              # refuse launches with more rounds of a stage
max_batch: 64                 # refuse plans that train on more patients or crops at once
seed: site                    # who draws the order of training: this site, or the "coordinator"
niceness: 0                   # how far training gives way to other programs: 0 not at all, 19 most
known_sites: {}               # name: key, as 'medlsdm-node status' shows it there; empty: pinned when first seen
stages: [stage1, stage2]      # what may be trained here
max_steps_per_round: 100000   # refuse longer rounds
min_patients: 3               # refuse to train on fewer patients than this
min_sites: 2                  # refuse rounds with fewer sites: an average of one is that site's own update
max_epsilon: null             # a number demands differential privacy; null allows training without it
share_loss: true              # tell the coordinator the mean training loss of a round
weight: rounded               # how much this site counts: patients rounded down to 4, 8, 16, ..., or "equal"
"""


_HOURS = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]")
_LATER = {"gate", "plans", "hours", "max_rounds", "max_batch", "seed", "niceness", "known_sites"}  # files of before
SMALLEST_WEIGHT = 4  # else a weight of 2 and a minimum of 3 patients would tell that there are 3


class SitePolicy(BaseModel):
    """Hold the rules; see DEFAULT_POLICY for what each one means."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stages: tuple[Stage, ...] = (Stage.STAGE1, Stage.STAGE2)
    max_steps_per_round: int = Field(default=100_000, ge=1)
    min_patients: int = Field(default=3, ge=1)
    min_sites: int = Field(default=2, ge=1)
    max_epsilon: float | None = Field(default=None, ge=0)
    share_loss: bool = True
    weight: Literal["rounded", "equal"] = "rounded"
    plans: Literal["any", "approved"] = "any"
    hours: Literal["always"] | tuple[str, ...] = "always"
    max_rounds: int = Field(default=1000, ge=1, le=10_000)
    max_batch: int = Field(default=64, ge=1)
    seed: Literal["site", "coordinator"] = "site"
    niceness: int = Field(default=0, ge=0, le=19)
    known_sites: dict[str, str] = Field(default_factory=dict)
    gate: GatePolicy = GatePolicy()

    @field_validator("hours")
    @classmethod
    def _readable(cls, hours: object) -> object:
        if isinstance(hours, tuple) and (not hours or not all(_HOURS.fullmatch(part) for part in hours)):
            raise ValueError("hours are 'always' or a list like ['20:00-06:00']")
        return hours

    def check_hours(self, now: time.struct_time | None = None) -> None:
        """Raise PolicyError outside the hours in which rounds may begin (local time)."""
        if self.hours == "always":
            return
        moment = time.strftime("%H:%M", now or time.localtime())
        for part in self.hours:
            start, _, end = part.partition("-")
            if (start <= moment < end) if start <= end else (moment >= start or moment < end):
                return
        raise PolicyError(
            f"Rounds begin here only at {', '.join(self.hours)}.", "Change 'hours' in policy.yaml to allow it now."
        )

    def check_plan(self, plan: RoundPlan, schema: LabelSchema) -> None:
        """Raise PolicyError or SchemaError unless the round may run here."""
        if plan.stage not in self.stages:
            raise PolicyError(f"This site does not train {plan.stage}.", "Change 'stages' in policy.yaml to allow it.")
        if plan.steps > self.max_steps_per_round:
            raise PolicyError(
                f"The round asks for {plan.steps} steps; {self.max_steps_per_round} are allowed.",
                "Change 'max_steps_per_round' in policy.yaml to allow it.",
            )
        if plan.rounds > self.max_rounds:
            raise PolicyError(
                f"The launch has {plan.rounds} rounds; {self.max_rounds} are allowed.",
                "Change 'max_rounds' in policy.yaml to allow it.",
            )
        stage = plan.preset.get(plan.stage)
        batch = stage.get("batch") if isinstance(stage, dict) else None
        if isinstance(batch, int) and batch > self.max_batch:
            raise PolicyError(
                f"The plan trains on {batch} at once; {self.max_batch} are allowed.",
                "Change 'max_batch' in policy.yaml to allow it.",
            )
        if plan.schedule and plan.schedule.get(plan.stage) != (plan.rounds, plan.steps):
            raise PolicyError("The round is not the one that its plan states.", "Ask the coordinator.")
        if plan.sites < self.min_sites:
            raise PolicyError(
                f"The round has {plan.sites} sites; at least {self.min_sites} are required.",
                "Change 'min_sites' in policy.yaml to allow it.",
            )
        if LabelSchema.from_json(plan.labels).digest != schema.digest:
            raise SchemaError(
                "The round's label schema is not this site's.", "Agree on one schema file and run init with it."
            )

    def check_patients(self, patients: int) -> None:
        """Raise PolicyError if there are too few patients to hide in."""
        if patients < self.min_patients:
            raise PolicyError(
                f"The vault holds {patients} patients; at least {self.min_patients} are required.",
                "Ingest more, or change 'min_patients' in policy.yaml.",
            )

    def declared_weight(self, patients: int) -> float:
        """Return how much this site counts in the average, without telling how many patients it has."""
        return 1.0 if self.weight == "equal" else float(max(SMALLEST_WEIGHT, 1 << (patients.bit_length() - 1)))


def load_policy(path: Path) -> SitePolicy:
    """Read the policy file; a damaged or shortened one refuses everything.

    Raises:
        ConfigError: It is missing or does not read.
    """
    try:
        rules = yaml.safe_load(path.read_text(encoding="utf-8"))
        policy = SitePolicy.model_validate(rules)
    except OSError as error:
        raise ConfigError("policy.yaml is missing.", "Restore it; without it this site does nothing.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable("it is not YAML") from error
    except ValidationError as error:
        raise _unreadable(".".join(str(p) for p in error.errors()[0]["loc"]) or "it holds no rules") from error
    if missing := sorted(set(SitePolicy.model_fields) - _LATER - set(rules)):
        raise _unreadable(f"{', '.join(missing)} missing")  # a file cut short must not fall back to what is permitted
    return policy


def _unreadable(where: str) -> ConfigError:
    return ConfigError(f"policy.yaml cannot be read ({where}).", "Correct it; until then nothing runs.")
