"""What tests of the conductor share: a coordinator's folder with sites, and a grid whose sites answer at will."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors import SafetensorError

from medlsdm.config import load_preset
from medlsdm.federation.arrays import PACKED, pack, unpack
from medlsdm.federation.plan import RoundReply
from medlsdm_server.home import ServerHome, ServerSettings
from medlsdm_server.launch import Launch, load_plan, new_launch
from medlsdm_server.registry import Registry

for name in ("task_id", "run_id", "node_id"):
    setattr(TaskIdentity, f"_{name}", 1)

Answer = Callable[[dict[str, Any], float], Any]
"""Takes the weights that were sent and the site's declared weight; returns records, an Error, or None for silence."""


def answer(arrays: dict[str, Any], weight: float = 4.0, **changed: Any) -> dict[str, Any]:
    """Return the records of a good reply; ``changed`` replaces metrics, loss, seconds or the reply's own weight."""
    reply = RoundReply(
        weight=changed.get("again", weight), loss=changed.get("loss", 0.5),
        training_seconds=changed.get("seconds", 1.0),
    )  # fmt: skip
    return {
        "arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}),
        "metrics": MetricRecord(changed.get("metrics", {"weight": weight})),
        "reply": ConfigRecord({"reply": reply.to_json()}),
    }


def honest(arrays: dict[str, Any], weight: float, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    moved = {
        k: v + rng.normal(0, 0.01, v.shape).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in arrays.items()
    }
    return answer(moved, weight)


def as_sent(records: dict[str, Any]) -> dict[str, Any]:
    """Return the records with the weights in one array, as our nodes send them, where they can be packed."""
    try:
        arrays = {k: a.numpy() for k, a in records["arrays"].items()}
        if any(a.dtype.byteorder == ">" for a in arrays.values()):
            return records
        packed = pack(arrays)
    except (KeyError, ValueError, AttributeError, SafetensorError):
        return records
    return records | {"arrays": ArrayRecord({PACKED: Array(packed)})}


class Grid:
    """Carry messages to sites that are functions; replies are made when they are pulled, one at a time."""

    def __init__(self, *sites: Answer, weights: tuple[float, ...] = (4.0, 8.0, 16.0)) -> None:
        self.sites = {101 + n: site for n, site in enumerate(sites)}
        self.weights = weights
        self.pushed: dict[str, Message] = {}
        self.asked: list[int] = []
        self.online = set(self.sites)
        self._number = itertools.count()

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def push_messages(self, messages: list[Message]) -> list[str]:
        names = []
        for message in messages:
            names.append(f"m{next(self._number)}")
            self.pushed[names[-1]] = message
            self.asked.append(message.metadata.dst_node_id)
        return names

    def pull_messages(self, names: list[str]) -> list[Message]:
        found = []
        for name in names:
            message = self.pushed[name]
            node = message.metadata.dst_node_id
            arrays = unpack(message.content["arrays"][PACKED].numpy())
            said = self.sites[node](arrays, self.weights[(node - 101) % len(self.weights)])
            if said is None:
                continue
            message.metadata.__dict__["_message_id"] = name
            content = said if isinstance(said, Error) else RecordDict(as_sent(said))
            found.append(Message(content, reply_to=message))
        return found


def coordinator(
    root: Path, sites: int = 3, *, channels: tuple[int, ...] = (8, 16), **plan: Any
) -> tuple[ServerHome, Launch]:
    """Return a coordinator's folder with admitted sites 101, 102, ... and a launch of a small preset."""
    home = ServerHome(root)
    home.create(ServerSettings(hosts=("127.0.0.1",)))
    registry = Registry(home.registry)
    with registry._change() as database:
        for n in range(sites):
            database.execute(
                "INSERT INTO sites (name, status, node_key, identity, node_id, enrolled) VALUES (?, ?, ?, ?, ?, ?)",
                (f"site-{n}", "admitted", f"k{n}", "0" * 64, str(101 + n), int(time.time())),
            )
    tiny = load_preset("tiny").model_dump(mode="json") | {"name": "minute", "window": [20, 24, 16]}
    tiny["autoencoder"] |= {"channels": list(channels), "label_width": 8, "texture_channels": 0}
    tiny["denoiser"] |= {"channels": [16, 24], "label_width": 8}
    tiny["stage1"] |= {"crop": [16, 20, 16]}
    tiny["texture"] |= {"steps": 0}
    (root / "preset.yaml").write_text(yaml.safe_dump(tiny))
    settled = {
        "preset": str(root / "preset.yaml"), "modalities": ["MR"], "sites": sites, "deadline_s": 20, "gather_s": 2,
        "stage1": {"rounds": 2, "steps": 5}, "stage2": {"rounds": 1, "steps": 5},
    } | plan  # fmt: skip
    (root / "plan.yaml").write_text(yaml.safe_dump(settled))
    return home, new_launch(home, load_plan(str(root / "plan.yaml")))
