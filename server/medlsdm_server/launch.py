"""What a coordinator launches: the plan of a whole training, and the diary that its rounds write."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.checks import write_atomic
from medlsdm.config import config_folder
from medlsdm.errors import ConfigError
from medlsdm.types import Modality
from medlsdm_server.home import ServerHome


class StagePlan(BaseModel):
    """Say how many rounds a stage has and how many steps each site takes in a round."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rounds: int = Field(ge=1, le=10_000)
    steps: int = Field(ge=1)


class FederationPlan(BaseModel):
    """Settle one training: model preset, label schema, rounds of both stages, who must be there.

    ``deadline_s`` is how long a round waits for its sites, ``gather_s`` how long it waits for
    ``sites`` of them to be online before it gives up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    preset: str = "tiny"
    schema_: str = Field(default="procedural", alias="schema")
    stage1: StagePlan
    stage2: StagePlan
    modalities: tuple[Modality, ...] = (Modality.MR,)
    sites: int = Field(default=2, ge=1, le=1000)
    deadline_s: float = Field(default=3600, gt=0)
    gather_s: float = Field(default=600, gt=0)
    seed: int = 0


class Launch(FederationPlan):
    """Carry a plan with its id and, when it goes on from an earlier one, that one's id."""

    id: str = Field(pattern=r"^[a-z0-9-]{1,64}$")


def load_plan(name: str) -> FederationPlan:
    """Read a plan from ``configs/federation`` by name, or from a YAML file by path.

    Raises:
        ConfigError: There is none, or it does not read.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else config_folder() / "federation" / f"{name}.yaml"
    try:
        return FederationPlan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"There is no federation plan {name!r}.", "Give a name or a YAML file.") from error
    except (ValidationError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The federation plan {path.name} cannot be read.", _first_line(error)) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(str(p) for p in problem['loc'])}: {problem['msg']}."
    return str(error).splitlines()[0]


def new_launch(home: ServerHome, plan: FederationPlan) -> Launch:
    """Give the plan an id and write it down for the ServerApp."""
    identity = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(2)
    launch = Launch.model_validate(plan.model_dump(by_alias=True) | {"id": identity})
    write_atomic(_spec(home, identity), launch.model_dump_json(by_alias=True, indent=2).encode())
    return launch


def read_launch(home: ServerHome, identity: str) -> Launch:
    """Read the plan of a launch, or raise ConfigError."""
    path = _spec(home, identity)
    if not path.is_file():
        raise ConfigError(f"There is no launch {identity!r}.", "See 'medlsdm-server status'.")
    return Launch.model_validate_json(path.read_bytes())


def note(home: ServerHome, identity: str, event: str, **fields: Any) -> None:
    """Add one line to the diary of a launch."""
    line = json.dumps({"time": time.time(), "event": event} | fields)
    with (home.launches / f"{identity}.diary.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_events(home: ServerHome, identity: str) -> list[dict[str, Any]]:
    """Return the diary of a launch, oldest first; a line that is being written is left out."""
    path = home.launches / f"{identity}.diary.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _spec(home: ServerHome, identity: str) -> Path:
    return home.launches / f"{Path(identity).name}.spec.json"
