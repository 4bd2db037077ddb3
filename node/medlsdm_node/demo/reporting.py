"""Put what a demo did into the report: pictures, losses, verdicts, times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlsdm_node.demo.leaks import LeakSearch
from medlsdm_node.demo.programs import ask
from medlsdm_node.report import DemoReport, GateRow, LeakRow, LossPoint, save_picture, write_report

if TYPE_CHECKING:
    from medlsdm_node.demo.walk import Demo


def report(demo: Demo, launch: dict[str, Any], leaks: LeakSearch) -> Path:
    """Write ``report.html`` and ``picture.png`` and return the report's path."""
    assert demo.schema is not None
    examples = list(demo.examples())
    rounds = launch["finished_rounds"]
    training = sum(r["training_seconds"] for r in rounds)
    whole = sum(r["seconds"] for r in rounds)
    patients = sum(len(h.patients) for h in demo.hospitals)
    source = "made-up anatomy" if demo.data is None else f"the pairs of {demo.data.name}"
    data = DemoReport(
        title="Three hospitals, one model, no shared patient",
        summary=(
            f"{patients} patients of {source} at {len(demo.hospitals)} hospitals were de-identified, encrypted and "
            f"trained on where they are, in {len(rounds)} federated rounds over TLS. Each hospital then made volumes "
            "from label maps of nobody it trained on, audited them for copies of its patients, and exported them."
        ),
        examples=examples,
        losses={h.site: _losses(demo, h) for h in demo.hospitals},
        gates=[GateRow(**row) for row in sorted(demo.gates, key=lambda g: g["site"])],
        leak=LeakRow(leaks.tokens, leaks.bytes_searched, len(leaks.found)),
        timings=list(demo.board.timings),
        federation={"training_s": training, "overhead_s": max(0.0, whole - training)},
        places={
            "exports": ", ".join(str(h.folder / "export") for h in demo.hospitals),
            "models": str(demo.server / "models"),
            "everything": str(demo.root),
        },
        schema=demo.schema,
    )
    path = demo.root / "report.html"
    write_report(path, data)
    if examples:
        save_picture(demo.root / "picture.png", examples, demo.schema)
    return path


def _losses(demo: Demo, hospital: Any) -> list[LossPoint]:
    rows = ask("medlsdm-node", "status", "--home", hospital.folder / "node")["losses"]
    return [LossPoint(r["stage"], r["round"], r["step"], r["loss"]) for r in rows]
