"""The coordinator's folder: settings, certificates, registry, models, logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.checks import write_atomic
from medlsdm.errors import ConfigError, IntegrityError

HOME_VARIABLE = "MEDLSDM_SERVER_HOME"


class ServerSettings(BaseModel):
    """Say under which names and port hospitals reach this coordinator."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(default="medlsdm", max_length=64)
    hosts: tuple[str, ...]
    port: int = Field(default=8443, ge=1, le=65535)


class ServerHome:
    """Name every path of the coordinator's folder. ``root`` is private to the service user (0700)."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.settings_file = self.root / "server.json"
        self.ca_key, self.ca_cert = self.root / "keys/ca.key", self.root / "ca.crt"
        self.server_key, self.server_cert = self.root / "keys/server.key", self.root / "server.crt"
        self.registry = self.root / "registry.db"
        self.models = self.root / "models"
        self.launches = self.root / "launches"
        self.logs = self.root / "logs"
        self.run = self.root / "run"
        self.flwr = self.root / "flower"

    @classmethod
    def default(cls, given: Path | None) -> Self:
        """Use the path given, else ``MEDLSDM_SERVER_HOME``, else ``~/.medlsdm/server``."""
        return cls(given or Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".medlsdm/server"))

    def create(self, settings: ServerSettings) -> None:
        """Make the folder and write the settings; refuse to touch one that exists."""
        if self.settings_file.exists():
            raise ConfigError(f"There is a coordinator in {self.root} already.", "Use it, or give another --home.")
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for folder in (self.models, self.launches, self.logs, self.run, self.flwr, self.root / "keys"):
            folder.mkdir(exist_ok=True)
        write_atomic(self.settings_file, settings.model_dump_json(indent=2).encode())

    def settings(self) -> ServerSettings:
        """Read the settings, or say that ``init`` comes first."""
        if not self.settings_file.exists():
            raise ConfigError(f"There is no coordinator in {self.root}.", "Run 'medlsdm-server init' first.")
        try:
            return ServerSettings.model_validate_json(self.settings_file.read_bytes())
        except ValidationError as error:
            raise IntegrityError("server.json cannot be read.", "Restore it or run init in a new folder.") from error
