import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "python.md"


def blocks() -> list[tuple[int, str]]:
    """Return line number and text of each Python block."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in found]


def test_every_example_of_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks():
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)
    assert {"run", "tuned", "bundle", "for-the-hub", "synthetic.nii.gz"} <= {p.name for p in tmp_path.iterdir()}
