"""Kill, cut and fill each part of a running federation; say what was lost, how long it took, what the operator read.

``python tests/benchmarks/federation_faults.py [--busy 6] [--cells node-training,...] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from testbed import Bed, busy_loops, inside_own_network, wait

PATIENCE = 600.0


class Matrix:
    """Run cells, one after the other, within one long launch."""

    def __init__(self, bed: Bed, launch: str) -> None:
        self.bed, self.launch = bed, launch
        self.rows: list[dict[str, Any]] = []

    def rounds(self) -> list[dict[str, Any]]:
        return self.bed.events(self.launch, "round")

    def asked(self) -> dict[str, Any]:
        return (self.bed.events(self.launch, "asked") or [{}])[-1]

    def in_round(self) -> bool:
        events = self.bed.events(self.launch, "asked", "round")
        return bool(events) and events[-1]["event"] == "asked"

    def phase(self, what: str, site: str) -> bool:
        now, asked = self.bed.activity(site), self.asked()
        here = self.in_round() and now.get("round") == asked.get("round") and now.get("stage") == asked.get("stage")
        kept = self.bed.home / "run/updates" / self.launch
        received = len(list(kept.rglob("*.json"))) if kept.exists() else 0
        return {
            "idle": not self.in_round(),
            "distributing": self.in_round() and time.time() - asked.get("time", 0) < 1.0,
            "receiving": self.in_round() and self.bed.processes(self.bed.node(site), "flwr-clientapp") and not here,
            "training": here and now.get("activity") == "training",
            "sending": here and now.get("activity") == "sending",
            "collecting": self.in_round() and received >= 1,
            "aggregating": self.in_round() and received >= len(self.bed.patients),
        }[what]

    def until(self, what: str, site: str) -> None:
        fresh = len(self.rounds())
        wait(lambda: len(self.rounds()) > fresh, PATIENCE, "a round", 0.05)
        if what != "idle":
            wait(lambda: self.phase(what, site), PATIENCE, f"{site} {what}", 0.01)

    def cell(self, name: str, what: str, site: str, hurt: Any, mend: Any = None) -> None:
        self.until(what, site)
        before, began, at = len(self.rounds()), time.monotonic(), self.asked()
        seen = {label: len(self.bed.said(label)) for label in ("server", site)}
        hurt()
        if mend is not None:
            mend()
        wait(lambda: len(self.rounds()) > before, PATIENCE, f"a round after {name}", 0.2)
        first = time.monotonic() - began
        wait(lambda: self._whole(before), PATIENCE, f"all sites after {name}", 0.2)
        whole = time.monotonic() - began
        done = [(r["stage"], r["round"]) for r in self.rounds()]
        self.rows.append(
            {
                "cell": name, "round": at.get("round"), "next_round_s": round(first, 1), "all_sites_s": round(whole, 1),
                "twice": len(done) - len(set(done)),
                "refused": [
                    f"{s['site']}: {s['refused']}" for r in self.rounds()[before:] for s in r["sites"] if s["refused"]
                ],
                "asks": max(s.get("asks", 1) for r in self.rounds()[before:] for s in r["sites"]),
                "read": [line for label, n in seen.items() for line in self.bed.said(label)[n:]][:6],
            }
        )  # fmt: skip
        print(json.dumps(self.rows[-1]), flush=True)

    def _whole(self, before: int) -> bool:
        return any(all(not s["refused"] for s in r["sites"]) and len(r["sites"]) == 3 for r in self.rounds()[before:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--cells", default="")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    inside_own_network()
    bed = Bed(Path(tempfile.mkdtemp(prefix="bed-")) / "f")
    bed.set_apart("site-c")
    with busy_loops(chosen.busy):
        try:
            bed.up()
            launch = bed.launch(bed.plan(rounds=900, deadline_s=1200, gather_s=600))
            matrix = Matrix(bed, launch)
            wait(matrix.rounds, PATIENCE, "the first round")
            run(bed, matrix, [c for c in chosen.cells.split(",") if c])
        finally:
            took = bed.down()
            time.sleep(1)
            print(json.dumps({"stopped_s": round(took, 1), "left": bed.left()}), flush=True)
    if matrix.rows:
        times = [r["all_sites_s"] for r in matrix.rows]
        print(f"{len(times)} cells: recovery median {statistics.median(times):.0f} s, worst {max(times):.0f} s")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"busy": chosen.busy, "rows": matrix.rows}, indent=1))


def run(bed: Bed, matrix: Matrix, wanted: list[str]) -> None:
    def node_again() -> None:
        time.sleep(1)
        bed.join("site-b")

    def server_again() -> None:
        bed.start_server()

    def cut(seconds: float) -> Any:
        def hurt() -> None:
            bed.line(up=False)
            time.sleep(seconds)
            bed.line(up=True)

        return hurt

    cells: dict[str, Any] = {}
    for what in ("idle", "receiving", "training", "sending"):
        cells[f"node-{what}"] = (what, "site-b", lambda: bed.kill_program("site-b"), node_again)
    for what in ("idle", "distributing", "training", "collecting", "aggregating"):
        cells[f"coordinator-{what}"] = (what, "site-a", lambda: bed.kill_program("server"), server_again)
    helpers = ("flower-supernode", "flower-superexec")
    for word, what in (
        *((w, "training") for w in helpers),
        ("flwr-clientapp", "training"),
        *((w, "idle") for w in helpers),
    ):
        cells[f"{word}-{what}"] = (what, "site-b", lambda w=word: bed.kill(bed.node("site-b"), w), None)
    theirs = ("flower-superlink", "flower-superexec", "flwr-serverapp")
    for word, what in (
        *((w, "training") for w in theirs),
        ("flower-superlink", "idle"),
        ("flwr-serverapp", "collecting"),
    ):
        cells[f"server-{word}-{what}"] = (what, "site-a", lambda w=word: bed.kill(bed.home, w), None)
    for seconds in (10, 120, 600):
        cells[f"cut-{seconds}"] = ("training", "site-c", cut(seconds), None)
    cells["cut-sending-10"] = ("sending", "site-c", cut(10), None)
    for name, (what, site, hurt, mend) in cells.items():
        if (not wanted and name != "cut-600") or name in wanted:
            try:
                matrix.cell(name, what, site, hurt, mend)
            except TimeoutError as error:
                matrix.rows.append(
                    {"cell": name, "all_sites_s": PATIENCE, "error": str(error), "status": bed.status()["launch"]}
                )
                print(json.dumps(matrix.rows[-1])[:1500], flush=True)
                for site in bed.patients:  # a site that is gone would fail every cell after this one
                    if bed.running[site].poll() is not None:
                        bed.join(site)


if __name__ == "__main__":
    main()
