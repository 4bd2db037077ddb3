"""Somebody else's words, made safe to print."""

from __future__ import annotations

SHOWN = 200


def plain(text: object) -> str:
    """Return somebody's words as one line of at most 200 characters that steers no terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 4 * SHOWN]).split())[:SHOWN]
