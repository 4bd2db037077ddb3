"""A coordinator and its nodes, as tests of federations build them: small enough to train in a minute."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medlsdm.config import load_preset

from .conftest import Programs, RecordingProxy, Request

SIZE = (20, 24, 10)
STEPS = 5


@dataclass
class Federation:
    root: Path
    programs: Programs
    proxy: RecordingProxy | None = None
    server: subprocess.Popen[bytes] | None = None
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    launched: dict[str, Any] = field(default_factory=dict)
    sent: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    def home(self, site: str) -> Path:
        return self.root / site / "node"

    @property
    def proxied(self) -> RecordingProxy:
        assert self.proxy is not None
        return self.proxy

    def plan(self, name: str) -> Path:
        tiny = load_preset("tiny").model_dump(mode="json")
        tiny |= {"name": "minute", "window": [20, 24, 16]}
        tiny["autoencoder"] |= {"channels": [8, 16], "label_width": 8}
        tiny["denoiser"] |= {"channels": [16, 24], "label_width": 8}
        tiny["stage1"] |= {"crop": [16, 20, 16]}
        (self.root / "preset.yaml").write_text(yaml.safe_dump(tiny))
        stages = {stage: {"rounds": 1, "steps": STEPS} for stage in ("stage1", "stage2")}
        plan = {"preset": str(self.root / "preset.yaml"), "modalities": ["MR"], "sites": 3, "deadline_s": 120} | stages
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(plan))
        return path

    def superlink(self) -> str:
        config = (self.coordinator / "flower/config.toml").read_text()
        found = re.search(r'address = "(127\.0\.0\.1:\d+)"', config)
        assert found is not None
        return found.group(1)
