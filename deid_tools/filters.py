"""scipy's image filters, imported when first used; their stubs do not say what comes back for an array."""

from __future__ import annotations

from typing import Any


def filters() -> Any:
    """Return ``scipy.ndimage``."""
    from scipy import ndimage

    return ndimage
