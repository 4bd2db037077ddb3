"""Model weights as named arrays: what is sent, checked and averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlsdm.errors import IntegrityError

Arrays = dict[str, NDArray[Any]]
PACKED = "weights"  # the one array that travels


def pack(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Return all arrays as one of bytes, (N,): a safetensors file. Flower makes two calls or more for each array."""
    from safetensors.numpy import save

    return np.frombuffer(save({k: np.asarray(v, order="C") for k, v in arrays.items()}), np.uint8)


def unpack(packed: NDArray[np.uint8]) -> Arrays:
    """Return what ``pack`` was given, in order of name.

    Raises:
        IntegrityError: These are no packed arrays.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(sorted(load(packed.tobytes()).items()))
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(
            "The weights that arrived cannot be read.", "Use the same release on every site."
        ) from error


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over names, types, shapes and values, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def check_like(arrays: Mapping[str, NDArray[Any]], expected: Mapping[str, Any]) -> None:
    """Raise IntegrityError unless names and shapes equal ``expected`` and every value is finite."""
    if set(arrays) != set(expected):
        raise IntegrityError(
            "The weights that arrived belong to another architecture.", "Use the same release and preset on every site."
        )
    for name, array in arrays.items():
        if tuple(array.shape) != tuple(expected[name].shape):
            raise IntegrityError(
                f"The weight {name} has shape {tuple(array.shape)} instead of {tuple(expected[name].shape)}.",
                "Use the same release and preset on every site.",
            )
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise IntegrityError(f"The weight {name} holds values that are not finite.", "The round is not usable.")
