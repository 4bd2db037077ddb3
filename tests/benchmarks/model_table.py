"""The bars of picture quality, and the table that holds the results of several seeds against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bar:
    """Name one measure, where a seed's result holds it, and the spans that count as must and goal."""

    name: str
    value: Callable[[Result], float]
    must: Span
    goal: Span
    set_value: Callable[[Result], float] | None = None
    """Reads the same measure from one set's comparison, for the columns of real volumes and matched noise."""

    def verdict(self, mean: float) -> str:
        """Return goal, must or missed."""
        for span, word in ((self.goal, "goal"), (self.must, "must")):
            if span[0] <= mean <= span[1]:
                return word
        return "missed"


def at_least(value: float) -> Span:
    return value, math.inf


def at_most(value: float) -> Span:
    return -math.inf, value


def _of_set(name: str, read: Callable[[Result], float], must: Span, goal: Span) -> Bar:
    return Bar(name, lambda result: read(result["sets"]["default"]), must, goal, read)


def _against_ancestral(key: str) -> Callable[[Result], float]:
    def ratio(result: Result) -> float:
        many = result["sets"]["ancestral"]
        return result["sets"]["default"][key] / many[key]

    return ratio


BARS = (
    Bar("stage 1: CPU-minutes", lambda r: r["cpu_seconds"]["stage 1"] / 60, at_most(8), at_most(8)),
    Bar("stage 1: PSNR, dB", lambda r: r["reconstruction"]["psnr"], at_least(22.5), at_least(23.5)),
    Bar("stage 1: SSIM", lambda r: r["reconstruction"]["ssim"], at_least(0.83), at_least(0.86)),
    Bar("all stages: CPU-minutes", lambda r: r["cpu_seconds"]["all"] / 60, at_most(20), at_most(20)),
    _of_set("gradient energy over real", lambda s: s["gradient_energy_ratio"], (0.75, 1.25), (0.9, 1.1)),
    _of_set("told-apart AUC", lambda s: s["told_apart_auc"], at_most(0.97), at_most(0.8)),
    _of_set("power over real, lowest band", lambda s: min(s["power_ratio_by_band"]), (0.5, 1.2), (0.85, 1.1)),
    _of_set("power over real, highest band", lambda s: max(s["power_ratio_by_band"]), (0.5, 1.2), (0.85, 1.1)),
    _of_set("Dice below real", lambda s: s["dice_real"] - s["dice"], at_most(0.03), at_most(0.01)),
    Bar(
        "Dice below real, guided",
        lambda r: r["sets"]["guided"]["dice_real"] - r["sets"]["guided"]["dice"],
        at_most(0.03),
        at_most(0.01),
    ),
    Bar(
        "trained on synthetic: share of real Dice",
        lambda r: r["segmenters"]["synthetic"] / r["segmenters"]["real"],
        at_least(0.98),
        at_least(0.995),
    ),
    Bar(
        "trained on both: Dice above real alone",
        lambda r: r["segmenters"]["both"] - r["segmenters"]["real"],
        at_least(0.0),
        at_least(0.01),
    ),
    _of_set("FID over floor, random features", lambda s: s["fid"] / s["fid_floor"], at_most(2.5), at_most(1.3)),
    _of_set(
        "FID over floor, segmenter's deepest",
        lambda s: s["fid_segmenter"] / s["fid_segmenter_floor"],
        at_most(2.0),
        at_most(1.2),
    ),
    _of_set(
        "FID over floor, segmenter's finest",
        lambda s: s["fid_segmenter_fine"] / s["fid_segmenter_fine_floor"],
        at_most(2.0),
        at_most(1.2),
    ),
    Bar("label map to volume, CPU-s", lambda r: r["seconds"]["default"], at_most(0.25), at_most(0.1)),
    Bar(
        "times faster than 300 ancestral steps",
        lambda r: r["seconds"]["ancestral"] / r["seconds"]["default"],
        at_least(25),
        at_least(60),
    ),
    Bar("  its FID over theirs, random", _against_ancestral("fid"), at_most(1.0), at_most(1.0)),
    Bar("  its FID over theirs, segmenter's", _against_ancestral("fid_segmenter"), at_most(1.0), at_most(1.0)),
)
"""From the project's list of what the pictures must reach; the upper end of gradient energy is ours."""


def _values(read: Callable[[Result], float], results: Sequence[Result]) -> list[float]:
    """Return the values of the results that have one: a sampler may be missing, a smoke test's Dice be zero."""
    found = []
    for result in results:
        try:
            found.append(float(read(result)))
        except (KeyError, ZeroDivisionError):
            continue
    return found


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one row for each bar: mean, range, verdict, and what real volumes and matched noise reach."""
    table = []
    for bar in BARS:
        values = _values(bar.value, results)
        mean = sum(values) / len(values) if values else None
        row: dict[str, Any] = {
            "measure": bar.name,
            "mean": mean,
            "low": min(values, default=None),
            "high": max(values, default=None),
            "seeds": len(values),
            "must": _span_text(bar.must),
            "goal": _span_text(bar.goal),
            "verdict": "not measured" if mean is None else bar.verdict(mean),
        }
        for column in ("real", "noise"):
            read = bar.set_value
            others = _values(lambda r, c=column, f=read: f(r["sets"][c]), results) if read else []
            row[column] = sum(others) / len(others) if others else None
        table.append(row)
    return table


def _span_text(span: Span) -> str:
    low, high = span
    if math.isinf(high):
        return f">= {low:g}"
    return f"<= {high:g}" if math.isinf(low) else f"{low:g} to {high:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def render(results: Sequence[Result]) -> str:
    """Return both tables as text: bars, and every set of volumes by every measure."""
    lines = [
        f"{'measure':42}{'mean':>8}  {'range':17}{'must':>13}{'goal':>13}  {'verdict':13}{'real':>8}{'noise':>8}",
    ]
    for row in rows(results):
        span = "-" if row["low"] is None else f"{_number(row['low'])} to {_number(row['high'])}"
        lines.append(
            f"{row['measure']:42}{_number(row['mean']):>8}  {span:17}{row['must']:>13}{row['goal']:>13}"
            f"  {row['verdict']:13}{_number(row['real']):>8}{_number(row['noise']):>8}"
        )
    lines += ["", _sets_table(results), "", *_notes(results)]
    return "\n".join(lines)


SET_COLUMNS: tuple[tuple[str, Callable[[Result], float]], ...] = (
    ("AUC", lambda s: s["told_apart_auc"]),
    ("energy", lambda s: s["gradient_energy_ratio"]),
    *((f"band {i}", lambda s, i=i: s["power_ratio_by_band"][i]) for i in range(6)),
    ("FID rnd", lambda s: s["fid"] / s["fid_floor"]),
    ("FID seg", lambda s: s["fid_segmenter"] / s["fid_segmenter_floor"]),
    ("FID fine", lambda s: s["fid_segmenter_fine"] / s["fid_segmenter_fine_floor"]),
    ("Dice", lambda s: s["dice"]),
    ("nearest", lambda s: s["nearest_mean"]),
    ("largest", lambda s: s["nearest_max"]),
)


def _sets_table(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["sets"]))
    lines = [f"{'set of volumes':24}" + "".join(f"{title:>9}" for title, _ in SET_COLUMNS) + f"{'CPU-s':>9}"]
    for name in names:
        cells = [_values(lambda r, f=read, n=name: f(r["sets"][n]), results) for _, read in SET_COLUMNS]
        cells.append(_values(lambda r, n=name: r["seconds"][n], results))
        means = (_number(sum(values) / len(values) if values else None) for values in cells)
        lines.append(f"{name:24}" + "".join(f"{mean:>9}" for mean in means))
    return "\n".join(lines)


def _notes(results: Sequence[Result]) -> list[str]:
    def mean(read: Callable[[Result], float]) -> str:
        values = _values(read, results)
        return _number(sum(values) / len(values) if values else None)

    first = results[0]
    return [
        f"Seeds {', '.join(str(r['seed']) for r in results)}; means over them. {first['train']} patients to train on, "
        f"{first['test']} held out; FID at n = {first['sets']['default']['fid_count']} over its floor at equal n.",
        f"Segmenter: Dice {mean(lambda r: r['segmenters']['real'])} on real held-out volumes; "
        f"{mean(lambda r: r['dice_floor'])} for unrelated real volumes under these labels (the floor); "
        f"trained on synthetic {mean(lambda r: r['segmenters']['synthetic'])}, on both "
        f"{mean(lambda r: r['segmenters']['both'])}.",
        "Nearest training volume: held-out real ones correlate "
        f"{mean(lambda r: r['sets']['default']['nearest_real_mean'])} on average, "
        f"{mean(lambda r: r['sets']['default']['nearest_real_max'])} at most.",
        f"Sampling: {first['calls']['default']} network calls by default.",
        "The real row is real training volumes against held-out ones; noise is the smooth decoding with noise of the "
        "residual's spectrum and spread.",
    ]
