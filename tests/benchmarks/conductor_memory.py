"""Peak memory of leading a round, in multiples of the model: ``--sites 30 --megabytes 200``."""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/medlsdm_server"))
import conducting
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from safetensors import safe_open

from medlsdm.federation.arrays import PACKED, pack
from medlsdm.federation.plan import Stage
from medlsdm_server.checkpointing import Trained
from medlsdm_server.conductor import Conductor


def resident() -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Line(conducting.Grid):
    """Keep what was sent on disk, as a network would take it away, and make each reply when it is pulled."""

    def __init__(self, sites: int, folder: Path) -> None:
        super().__init__(*[None] * sites)
        self.file, self.to = folder / "sent.safetensors", {}

    def push_messages(self, messages: list) -> list[str]:
        for message in messages:
            if not self.file.exists():
                self.file.write_bytes(message.content["arrays"][PACKED].numpy().data)
            self.to[f"m{len(self.to)}"] = message.metadata.dst_node_id
        return [f"m{len(self.to) - 1}"]

    def pull_messages(self, names: list[str]) -> list[Message]:
        records = conducting.answer({}, 4.0)
        with safe_open(self.file, "np") as sent:
            made = {k: sent.get_tensor(k) + np.float32(0.001) for k in sent.keys()}  # noqa: SIM118
        records["arrays"] = ArrayRecord({PACKED: Array(pack(made))})
        asked = Message(RecordDict({}), dst_node_id=self.to[names[0]], message_type="train")
        asked.metadata.__dict__["_message_id"] = names[0]
        return [Message(RecordDict(records), reply_to=asked)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=200)
    chosen = parser.parse_args()
    width = int(8 * (chosen.megabytes / 0.45) ** 0.5) // 8 * 8
    with tempfile.TemporaryDirectory() as folder:
        home, launch = conducting.coordinator(
            Path(folder) / "s", chosen.sites, channels=(width, 2 * width), deadline_s=3600, gather_s=60,
            stage1={"rounds": 1, "steps": 5},
        )  # fmt: skip
        trained = Trained.resume(home.models, launch)
        size = sum(v.nbytes for v in trained.arrays(Stage.STAGE1).values()) / 2**20
        conductor = Conductor(home, launch, Line(chosen.sites, Path(folder)))
        base = resident()
        began = time.monotonic()
        steps = {}
        for step in ("_ask_all", "_collect", "_bound"):
            inner = getattr(conductor, step)

            def noted(*a, inner=inner, step=step, **k):
                result = inner(*a, **k)
                steps[step] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
                return result

            setattr(conductor, step, noted)
        conductor._round(trained, Stage.STAGE1, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        bare = base - size  # what Python, torch and Flower take without any weights
        found = {
            "sites": chosen.sites, "model_mib": round(size), "before_mib": round(base), "peak_mib": round(peak),
            "times_model": round((peak - bare) / size, 2), "seconds": round(time.monotonic() - began, 1),
            "peak_by_step_mib": steps,
        }  # fmt: skip
        print(json.dumps(found))


if __name__ == "__main__":
    main()
