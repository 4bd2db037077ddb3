from __future__ import annotations

import pytest


@pytest.fixture
def without_tesseract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no program found: words are not looked for, which is quick, and alike on every machine."""
    monkeypatch.setattr("shutil.which", lambda name: None)
