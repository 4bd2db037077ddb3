"""What a coordinator launches: the plan of a whole training, the diary that its rounds write, and who leads it.

The diary says what happened; the lock says what is so: whoever leads a launch holds it, and it is let go of by whatever
end of that process.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.checks import write_atomic
from medlsdm.config import config_folder
from medlsdm.errors import BusyError, ConfigError, ResourceError
from medlsdm.types import Modality
from medlsdm_server.home import ServerHome
from medlsdm_server.strategy import Strategy

PATIENCE_S = 1.0  # whoever only looks who leads holds the lock too, for an instant


class StagePlan(BaseModel):
    """Say how many rounds a stage has and how many steps each site takes in a round."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rounds: int = Field(ge=1, le=10_000)
    steps: int = Field(ge=1)


class FederationPlan(BaseModel):
    """Settle one training: model preset, label schema, rounds of both stages, who must be there.

    ``deadline_s`` is how long a round waits for its sites, ``gather_s`` how long it waits for ``sites`` of them to be
    online before it gives up. Once ``quorum`` sites have replied (default: half of them, at least two), the others have
    at most twice the median site's time. ``update_bound`` refuses an update that is so many times longer than the usual
    one (null: none is). ``keep`` checkpoints are kept beside the latest, the best and the last of stage 1.
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
    quorum: int | None = Field(default=None, ge=1, le=1000)
    strategy: Strategy = Strategy()
    update_bound: float | None = Field(default=10.0, gt=1)
    keep: int = Field(default=3, ge=0, le=10_000)

    @property
    def enough(self) -> int:
        """Return how many usable replies make a round."""
        return min(self.quorum or max(2, -(-self.sites // 2)), self.sites)


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
    """Add one line to the diary of a launch.

    Raises:
        ResourceError: There is no room for it.
    """
    line = json.dumps({"time": time.time(), "event": event} | fields)
    try:
        with _diary(home, identity).open("ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
                stream.write(b"\n")  # a line that a loss of power tore
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ResourceError(f"The diary could not be written ({error.strerror}).", "Check free space.") from error


def read_events(home: ServerHome, identity: str) -> list[dict[str, Any]]:
    """Return the diary of a launch, oldest first; a line that is being written, or was torn, is left out."""
    path = _diary(home, identity)
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def launches(home: ServerHome) -> list[str]:
    """Return the ids of every launch, oldest first."""
    specs = sorted(home.launches.glob("*.spec.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    return [p.name.removesuffix(".spec.json") for p in specs]


@contextmanager
def leading(home: ServerHome, identity: str) -> Iterator[None]:
    """Hold the lock of a launch, so that one process alone leads it.

    Raises:
        BusyError: Another one does.
    """
    with _lock(home, identity).open("w") as stream:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise BusyError(f"The launch {identity} is led by another process.", "Wait for it.") from error
                time.sleep(0.01)
        yield


def is_led(home: ServerHome, identity: str) -> bool:
    """Tell whether some process leads the launch at this moment."""
    try:
        with _lock(home, identity).open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(home: ServerHome, identity: str) -> Path:
    return home.launches / f"{Path(identity).name}.lock"


def _diary(home: ServerHome, identity: str) -> Path:
    return home.launches / f"{Path(identity).name}.diary.jsonl"


def _spec(home: ServerHome, identity: str) -> Path:
    return home.launches / f"{Path(identity).name}.spec.json"
