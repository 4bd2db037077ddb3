"""pydicom/deid, imported once and quietly: what it prints or warns is caught, its plotting library left out.

Importing this module imports the engine; whoever may not need it imports this late.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def _without_plotting() -> Iterator[None]:
    """Stand in for matplotlib while the engine is imported: it draws animations, which takes a third of a second."""
    if "matplotlib" in sys.modules:
        yield
        return
    plotting, pyplot = types.ModuleType("matplotlib"), types.ModuleType("matplotlib.pyplot")
    plotting.__dict__.update(pyplot=pyplot, use=lambda name: None)
    sys.modules |= {"matplotlib": plotting, "matplotlib.pyplot": pyplot}
    try:
        yield
    finally:
        del sys.modules["matplotlib"], sys.modules["matplotlib.pyplot"]


with warnings.catch_warnings(), _without_plotting():
    warnings.simplefilter("ignore")
    from deid.config import DeidRecipe
    from deid.dicom import parser
    from deid.dicom.fields import _get_fields_inner  # pyright: ignore[reportPrivateUsage]
    from deid.logger import bot
    from deid.logger.message import WARNING

Parser = parser.DicomParser
forget = _get_fields_inner.cache_clear
"""Drop the engine's own memory: it keeps every header it ever saw."""
parser.get_tag = functools.cache(parser.get_tag)  # it searches the whole dictionary for every replacement


def read_recipe(text: str) -> Any:
    """Let the engine read a recipe."""
    with tempfile.TemporaryDirectory(prefix="medlsdm-recipe-") as folder:
        path = Path(folder) / "deid.dicom"
        path.write_text(text)
        return DeidRecipe(str(path))


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """Catch all that the engine prints or warns: it has its own streams, made when it is imported."""
    said = io.StringIO()
    state = bot.errorStream, bot.outputStream, bot.level
    bot.errorStream, bot.outputStream, bot.level = said, said, WARNING
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield said
    finally:
        bot.errorStream, bot.outputStream, bot.level = state
