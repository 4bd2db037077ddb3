"""The demo's report: one self-contained HTML file, with pictures, losses, gate verdicts and times.

It shows real slices beside synthetic ones: it is for the site that owns them, or for public data.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from medlsdm.checks import write_atomic
from medlsdm.errors import DataError
from medlsdm.types import LabelSchema
from medlsdm_node.report_pictures import Example, LossPoint, draw_examples, draw_losses, to_png

__all__ = ["DemoReport", "Example", "GateRow", "LeakRow", "LossPoint", "save_picture", "write_report"]


@dataclass(frozen=True, slots=True)
class GateRow:
    """Hold one site's gate verdict: counts and reasons in words."""

    site: str
    made: int
    passed: int
    blocked: int
    reasons: Mapping[str, int]
    plants_caught: int
    planted: int


@dataclass(frozen=True, slots=True)
class LeakRow:
    """Hold what was searched for the planted identifiers: how many tokens, in how much, and where found."""

    tokens: int
    bytes_searched: int
    found: int


@dataclass(frozen=True, slots=True, eq=False)
class DemoReport:
    """Hold everything the report shows.

    Attributes:
        losses: Points by site.
        timings: Step name and seconds, in order.
        federation: ``training_s`` and ``overhead_s``.
        places: What is where: a path or command by name.
    """

    title: str
    summary: str
    examples: Sequence[Example]
    losses: Mapping[str, Sequence[LossPoint]]
    gates: Sequence[GateRow]
    leak: LeakRow
    timings: Sequence[tuple[str, float]]
    federation: Mapping[str, float]
    places: Mapping[str, str]
    schema: LabelSchema


def save_picture(path: Path, examples: Sequence[Example], schema: LabelSchema) -> None:
    """Write the montage of all examples as one PNG."""
    if not examples:
        raise DataError("There is no example to draw.", "Give at least one.")
    write_atomic(path, to_png(draw_examples(examples, schema)))


def write_report(path: Path, data: DemoReport) -> None:
    """Write the report as one HTML file that loads nothing from elsewhere and runs no script."""
    sections = [
        _pictures(data),
        _losses(data),
        _gates(data),
        _leaks(data.leak),
        _times(data),
        _places(data.places),
    ]
    template = Template(files("medlsdm_node").joinpath("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(data.title), summary=html.escape(data.summary), sections="\n".join(filter(None, sections))
    )
    write_atomic(path, page.encode())


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _image(figure: Figure, alt: str, css: str) -> str:
    content = base64.b64encode(to_png(figure)).decode()
    return f'<img class="{css}" alt="{html.escape(alt)}" src="data:image/png;base64,{content}">'


def _pictures(data: DemoReport) -> str:
    figures = []
    for example in data.examples:
        caption = (
            f"{example.site}, {example.modality}, {' x '.join(map(str, example.labels.shape))} voxels of "
            f"{' x '.join(f'{s:.2g}' for s in example.spacing)} mm. The synthetic volume was made from the label map "
            "alone, which is outlined on both."
        )
        image = _image(draw_examples([example], data.schema), f"Real and synthetic slices, {example.site}", "picture")
        figures.append(
            f'<figure><div class="scroll">{image}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    if not figures:
        return ""
    classes = " ".join(
        f'<span><span class="key" style="background: rgb{c.colour}"></span>{html.escape(c.name)}</span>'
        for c in data.schema.classes
        if c.id
    )
    view = "Radiological view: the patient's right is at the left of axial and coronal pictures."
    return _section("Real and synthetic", f'<p class="soft">{view} {classes}</p>\n' + "\n".join(figures))


def _losses(data: DemoReport) -> str:
    if not any(data.losses.values()):
        return ""
    image = _image(draw_losses(data.losses), "Loss by site and step", "plot")
    return _section("Training loss by site", f'<div class="scroll">{image}</div>')


def _gates(data: DemoReport) -> str:
    rows = []
    for gate in data.gates:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in gate.reasons.items()) or "none"
        css = "good" if gate.plants_caught == gate.planted else ""
        rows.append(
            f'<tr><td>{html.escape(gate.site)}</td><td class="number">{gate.made}</td>'
            f'<td class="number">{gate.passed}</td><td class="number">{gate.blocked}</td>'
            f"<td>{html.escape(reasons)}</td>"
            f'<td class="number {css}">{gate.plants_caught} of {gate.planted}</td></tr>'
        )
    if not rows:
        return ""
    head = (
        '<tr><th>Site</th><th class="number">Made</th><th class="number">Passed</th>'
        '<th class="number">Blocked</th><th>Blocked because</th><th class="number">Planted copies caught</th></tr>'
    )
    note = (
        "Each site's gate compares every synthetic volume with its own patients, and copies planted on purpose "
        "measure what it misses. This is a measured copy check, not a formal guarantee."
    )
    return _section(
        "The export gate", f'<p class="soft">{note}</p><div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    )


def _leaks(leak: LeakRow) -> str:
    css, words = ("good", "None was found.") if not leak.found else ("bad", f"{leak.found} were found.")
    text = (
        f"{leak.tokens:,} planted identifiers were searched for in {_size(leak.bytes_searched)} of everything that "
        "left the sites or was written outside the vaults."
    )
    return _section("Search for leaks", f'<p>{text} <span class="{css}">{words}</span></p>')


def _times(data: DemoReport) -> str:
    longest = max((seconds for _, seconds in data.timings), default=0) or 1
    bars = [
        f'<div class="bar"><span>{html.escape(name)}</span><i style="width: {100 * seconds / longest:.1f}%"></i>'
        f"<b>{_duration(seconds)}</b></div>"
        for name, seconds in data.timings
    ]
    training, overhead = data.federation.get("training_s", 0.0), data.federation.get("overhead_s", 0.0)
    if training + overhead > 0:
        share = 100 * training / (training + overhead)
        bars.append(
            f'<div class="split"><div class="train" style="width: {share:.1f}%"></div>'
            f'<div class="other" style="width: {100 - share:.1f}%"></div></div><p class="soft">Federated rounds: '
            f'<span class="key" style="background: var(--train)"></span>training {_duration(training)} &nbsp; '
            f'<span class="key" style="background: var(--other)"></span>federation {_duration(overhead)}</p>'
        )
    return _section("Time", "\n".join(bars)) if bars else ""


def _places(places: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd><code>{html.escape(v)}</code></dd>" for k, v in places.items())
    return _section("Where things are", f"<dl>{rows}</dl>") if rows else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _size(size_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
