"""A round's overhead apart from training, beside plain Flower's in the same run, for models of several sizes.

``python tests/benchmarks/federation.py [--busy 6] [--megabytes 0.1 6 210] [--rounds 3] [--json FILE]``. Plain Flower
runs without TLS and without checks; both have three sites on this machine, train the same model by the same step, and
are charged for what a round takes beyond its longest training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from testbed import SIZE, Bed, busy_loops, inside_own_network, program, wait

PATIENCE = 1800.0
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "plain"
version = "1.0.0"
description = "plain Flower"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42,<1.43"]
[tool.hatch.build.targets.wheel]
packages = ["plain"]
[tool.flwr.app]
publisher = "bench"
fab-format-version = 1
flwr-version-target = "1.42.0"
[tool.flwr.app.components]
serverapp = "plain.server:app"
clientapp = "plain.client:app"
"""
SERVER = """import json, time
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file
app = ServerApp()

class Timed(FedAvg):
    last = None
    def aggregate_train(self, number, replies):
        replies = list(replies)
        assert len(replies) == 3 and not any(r.has_error() for r in replies)
        longest = max(r.content["metrics"]["seconds"] for r in replies)
        made = super().aggregate_train(number, replies)
        now = time.time()
        with open({times!r}, "a") as stream:
            stream.write(json.dumps(now - Timed.last - longest) + "\\n")
        Timed.last = now
        return made

@app.main()
def main(grid, context):
    arrays = ArrayRecord({{k: Array(v) for k, v in load_file({weights!r}).items()}})
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.5)
    Timed.last = time.time()
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds={rounds})
"""
CLIENT = """from flwr.app import ArrayRecord, Array, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    import time
    began = time.monotonic()
    import torch
    from medlsdm.anatomy import generate
    from medlsdm.config import load_preset
    from medlsdm.models.vqgan import build_autoencoder
    from medlsdm.types import Modality
    from medlsdm.training.patients import prepare
    from medlsdm.training.texture import train_first_stage
    pairs = [generate(k, Modality.MR, {size}) for k in range(10)]
    preset = load_preset({preset!r})
    model = build_autoencoder(preset, len(pairs[0][1].schema.ids))
    model.load_state_dict({{k: torch.from_numpy(a.numpy()) for k, a in message.content["arrays"].items()}})
    train_first_stage(model, prepare(pairs, preset), preset, steps=1, first_step=0, total_steps=9, seed=1)
    arrays = {{k: Array(v.numpy()) for k, v in model.state_dict().items()}}
    metrics = {{"num-examples": 1.0, "seconds": time.monotonic() - began}}
    return Message(RecordDict({{"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}}), reply_to=message)
"""


def plain(folder: Path, preset: Path, rounds: int) -> list[float]:
    """Return the seconds of each round of plain Flower with our model and our training, apart from training."""
    from safetensors.numpy import save_file

    from medlsdm.anatomy import generate
    from medlsdm.config import load_preset
    from medlsdm.models.vqgan import build_autoencoder
    from medlsdm.types import Modality

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "app/plain").mkdir(parents=True)
    times, weights = folder / "times", folder / "weights.safetensors"
    labels = len(generate(0, Modality.MR, SIZE)[1].schema.ids)
    model = build_autoencoder(load_preset(str(preset)), labels)
    save_file({k: v.numpy() for k, v in model.state_dict().items()}, weights)
    (folder / "app/pyproject.toml").write_text(PROJECT)
    (folder / "app/LICENSE").write_text("none\n")
    (folder / "app/plain/__init__.py").write_text("")
    filled = SERVER.format(times=str(times), weights=str(weights), rounds=rounds)
    (folder / "app/plain/server.py").write_text(filled)
    (folder / "app/plain/client.py").write_text(CLIENT.format(size=SIZE, preset=str(preset)))
    environment = os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(program('flwr')).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    running = []

    def start(name: str, *arguments: str) -> None:
        home = folder / f"home-{len(running)}"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault="b"\n[superlink.b]\naddress="127.0.0.1:9400"\ninsecure=true\n'
        )
        with (folder / f"{len(running)}.log").open("wb") as log:
            running.append(subprocess.Popen(
                [program(name), *arguments], env=environment | {"FLWR_HOME": str(home)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            ))  # fmt: skip

    try:
        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", "9400",
              "--disable-runtime-dependency-installation")  # fmt: skip
        time.sleep(8)
        for n in range(3):
            start("flower-supernode", "--insecure", "--superlink", "127.0.0.1:9400", "--host", "127.0.0.1",
                  "--port", str(9410 + n))  # fmt: skip
        time.sleep(4)
        subprocess.run(
            [program("flwr"), "run", str(folder / "app"), "b", "--format", "json"],
            env=environment | {"FLWR_HOME": str(folder / "home-0")}, check=True, capture_output=True,
        )  # fmt: skip
        wait(lambda: times.exists() and len(times.read_text().splitlines()) >= rounds, PATIENCE, "plain Flower", 1)
        return [json.loads(line) for line in times.read_text().splitlines()]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def width(megabytes: float) -> int:
    """Return the channels of an autoencoder of about this size."""
    return max(8, int((megabytes / 8.19) ** 0.5 * 56) // 8 * 8)


def ours(bed: Bed, plan: Path, rounds: int) -> tuple[list[float], float, float]:
    """Return each round's seconds apart from training, the model's size in MB, and the ServerApp's peak in MB."""
    launch, peak = bed.launch(plan), 0.0

    def done() -> bool:
        nonlocal peak
        for pid in bed.processes(bed.home, "flwr-serverapp"):
            status = Path(f"/proc/{pid}/status")
            if status.exists() and "VmHWM" in (text := status.read_text()):
                peak = max(peak, int(text.split("VmHWM:")[1].split()[0]) / 1024)
        return len([e for e in bed.events(launch, "round") if e["stage"] == "stage1"]) >= rounds

    wait(done, PATIENCE, f"{rounds} rounds", 0.2)
    rows = [e for e in bed.events(launch, "round") if e["stage"] == "stage1"]
    file = bed.home / "models" / rows[-1]["checkpoint"] / "autoencoder.safetensors"
    size = file.stat().st_size / 1e6
    bed.call("medlsdm-server", "stop", launch, "--home", bed.home)
    wait(lambda: not bed.processes(bed.home, "flwr-serverapp"), 120, "the launch to stop", 0.5)
    return [r["seconds"] - r["training_seconds"] for r in rows], size, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.1, 6.0, 210.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    inside_own_network()
    root = Path(tempfile.mkdtemp(prefix="bench-federation-"))
    rows: list[dict[str, Any]] = []
    with busy_loops(chosen.busy):
        for megabytes in chosen.megabytes:
            wide = width(megabytes)
            bed = Bed(root / "bed")
            try:
                bed.up()
                preset = {"autoencoder": {"channels": [wide, 2 * wide], "label_width": 8}}
                plan = bed.plan(rounds=chosen.rounds, steps=1, name=f"p{wide}", preset=preset, deadline_s=PATIENCE)
                mine, size, peak = ours(bed, plan, chosen.rounds)
            finally:
                bed.down()
            flower = plain(root / "plain", plan.with_suffix(".preset.yaml"), chosen.rounds)
            ratio = round(statistics.median(mine) / statistics.median(flower), 2)
            row = {
                "asked_mb": megabytes, "our_mb": round(size, 2), "plain_s": [round(x, 1) for x in flower],
                "ours_s": [round(x, 1) for x in mine],
                "ratio": ratio, "serverapp_peak_mb": round(peak),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    shutil.rmtree(root, ignore_errors=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"busy": chosen.busy, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
