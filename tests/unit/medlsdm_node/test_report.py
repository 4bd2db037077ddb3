import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import ndimage

from medlsdm.errors import DataError
from medlsdm.types import LabelClass, LabelSchema
from medlsdm_node import report_pictures
from medlsdm_node.report import DemoReport, Example, GateRow, LeakRow, LossPoint, save_picture, write_report

SCHEMA = LabelSchema(
    "heads",
    (
        LabelClass(0, "background", colour=(0, 0, 0)),
        LabelClass(1, "brain", colour=(90, 200, 250)),
        LabelClass(2, "left ventricle", colour=(255, 120, 80)),
    ),
)


def example(site: str = "site-a", spacing: tuple[float, float, float] = (1.0, 1.0, 2.5)) -> Example:
    """Make a head whose left ventricle (towards -X in RAS) is brighter and whose nose points to +Y."""
    shape = tuple(int(100 / s) for s in spacing)
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    x, y, z = np.meshgrid(x, y, z, indexing="ij")
    labels = np.zeros(shape, np.uint8)
    labels[(x / 0.7) ** 2 + (y / 0.85) ** 2 + (z / 0.7) ** 2 < 1] = 1
    labels[((x + 0.3) / 0.12) ** 2 + (y / 0.3) ** 2 + (z / 0.2) ** 2 < 1] = 2
    rng = np.random.default_rng(0)
    clean = np.array([0.0, 0.6, 1.0])[labels] + 0.5 * ((abs(x) < 0.08) & (y > 0.85) & (abs(z) < 0.15))
    real = ndimage.gaussian_filter(clean, 0.7) + 0.05 * rng.standard_normal(shape)
    made = ndimage.gaussian_filter(clean, 1.2) + 0.02 * rng.standard_normal(shape)
    return Example(site, "MR", real * 900, labels, made, spacing)


def report(**changes) -> DemoReport:
    points = [
        LossPoint(stage, n // 10 + 1, n * 10, float(np.exp(-n / 12) + 0.1))
        for stage in ("stage 1", "stage 2")
        for n in range(30)
    ]
    fields = {
        "title": "Three hospitals, one model",
        "summary": "Three nodes trained on their own scans; only weights left them.",
        "examples": [example()],
        "losses": {"site-a": points, "site-b": points[:40]},
        "gates": [GateRow("site-a", 4, 3, 1, {"it is constant": 1}, 60, 60), GateRow("site-b", 4, 4, 0, {}, 57, 60)],
        "leak": LeakRow(114, 52_428_800, 0),
        "timings": [("make the cohort", 12.3), ("train stage 1", 241.0)],
        "federation": {"training_s": 300.0, "overhead_s": 80.0},
        "places": {"Exports": "demo/exports"},
        "schema": SCHEMA,
    }
    return DemoReport(**fields | changes)


class Tags(HTMLParser):
    """Note every tag, and check that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(tmp_path: Path, data: DemoReport) -> tuple[str, Tags]:
    write_report(tmp_path / "report.html", data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return page, tags


def test_the_page_is_one_file_that_fetches_and_runs_nothing(tmp_path: Path):
    page, tags = written(tmp_path, report())
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "iframe", "object")]
    sources = [attrs["src"] for tag, attrs in tags.seen if tag == "img"]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_page_says_what_happened(tmp_path: Path):
    page, _ = written(tmp_path, report())
    for words in ("Three hospitals, one model", "1 x it is constant", "60 of 60", "57 of 60", "None was found",
                  "114 planted", "50.0 MiB", "4 min 01 s", "12.3 s", "demo/exports", "left ventricle"):  # fmt: skip
        assert words in page
    assert "rgb(90, 200, 250)" in page


def test_a_leak_is_not_hidden(tmp_path: Path):
    page, _ = written(tmp_path, report(leak=LeakRow(114, 10, 2)))
    assert '<span class="bad">2 were found.</span>' in page
    assert "None was found" not in page


def test_text_is_escaped(tmp_path: Path):
    page, _ = written(tmp_path, report(title="<script>x</script>", places={"<b>": "$title"}))
    assert "<script>x" not in page
    assert "&lt;b&gt;" in page
    assert "$title" in page


def test_a_report_of_nothing_still_reads(tmp_path: Path):
    page, _ = written(tmp_path, report(examples=[], losses={}, gates=[], timings=[], federation={}, places={}))
    assert "Three hospitals" in page


def test_the_picture_is_a_png(tmp_path: Path):
    save_picture(tmp_path / "picture.png", [example(), example("site-b", (2.0, 1.0, 1.0))], SCHEMA)
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(DataError):
        save_picture(tmp_path / "none.png", [], SCHEMA)


def test_pictures_are_radiological_and_through_the_labels_centre():
    shown = example()
    assert report_pictures._centre(shown.labels) == tuple(np.rint(ndimage.center_of_mass(shown.labels > 0)).astype(int))
    axial = report_pictures.draw_examples([shown], SCHEMA).subfigs[0].axes[0]
    image = np.asarray(axial.images[0].get_array())
    assert image.shape == shown.labels.shape[1::-1]
    bright = np.argwhere(image[:, :] > 0.93)
    inside = bright[np.abs(bright[:, 0] - image.shape[0] / 2) < image.shape[0] / 5]
    assert inside[:, 1].mean() > image.shape[1] / 2  # the patient's left is at the right of the picture
    titles = [a.get_title() for a in report_pictures.draw_examples([shown], SCHEMA).subfigs[0].axes]
    assert titles == ["real", "real + labels", "synthetic", "synthetic + labels", *[""] * 8]
    assert axial.images[0].origin == "lower"  # so that +Y, anterior, is up
    assert [t.get_text() for t in axial.texts][:4] == list("RLAP")


def test_aspect_follows_the_spacing():
    figure = report_pictures.draw_examples([example(spacing=(1.0, 1.0, 2.5))], SCHEMA)
    aspects = [figure.subfigs[0].axes[row * 4].get_aspect() for row in range(3)]
    assert aspects == [1.0, 2.5, 2.5]


def test_an_empty_map_and_a_broken_volume_still_draw():
    shown = example()
    broken = Example("s", "CT", np.full_like(shown.real, np.nan), np.zeros_like(shown.labels), shown.real, (1, 1, 1))
    assert isinstance(report_pictures.draw_examples([broken], SCHEMA), Figure)
    assert report_pictures.to_png(report_pictures.draw_losses({}))
