"""Who sits at the machine: the account that a person's act is written down under."""

from __future__ import annotations

import os
import pwd


def who() -> str:
    """Return the account that asks, for the audit log."""
    number = int(os.environ.get("SUDO_UID", os.getuid()))
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"
