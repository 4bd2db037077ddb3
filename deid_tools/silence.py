"""Keep what other libraries say about a file off the screen and out of logs: they quote its values."""

from __future__ import annotations

import logging
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("pydicom", "deid", "highdicom", "nibabel", "nibabel.global", "PIL", "pylibjpeg")
_NEVER = logging.CRITICAL + 1


@contextmanager
def silence() -> Iterator[None]:
    """Hold back warnings and log records of the libraries that read files, whoever listens."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [(logger.level, logger.disabled) for logger in loggers]
    _silence(loggers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (level, disabled) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.disabled = disabled


def _silence(loggers: list[logging.Logger]) -> None:
    """Shut loggers, and those below them: pydicom sets its level anew when it is imported, which may be later."""
    for logger in loggers:
        logger.setLevel(_NEVER)
        logger.disabled = True


def no_core_dump() -> None:
    """Keep the system from writing this process's memory, with patients in it, to the disk when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def silence_for_good() -> None:
    """Do the same until this process ends, and leave no image of its memory behind if it crashes."""
    no_core_dump()
    _silence([logging.getLogger(name) for name in _TALKATIVE])
    warnings.simplefilter("ignore")
