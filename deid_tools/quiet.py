"""Keep pydicom's own log silent: it quotes the values that it finds odd, and those are a patient's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("pydicom", "deid", "highdicom")


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Drop every record of the DICOM libraries while originals are being read."""
    loggers = [logging.getLogger(name) for name in _NAMES]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
