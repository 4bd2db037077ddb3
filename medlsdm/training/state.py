"""What a run needs to go on, in one safetensors file: the state of each of its parts, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medlsdm.checks import write_atomic
from medlsdm.errors import IntegrityError


class Stateful(Protocol):
    """Be a module, an optimiser, a weight average: anything that hands out and takes back its state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, texts, lists, tuples and mappings of them."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state back."""
        ...


def state_bytes(parts: Mapping[str, Stateful], notes: dict[str, Any]) -> bytes:
    """Return the states of ``parts`` and ``notes`` (JSON values) as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    tree = {name: _take_apart(part.state_dict(), name, tensors) for name, part in parts.items()}
    return save(tensors, metadata={"notes": json.dumps(notes), "tree": json.dumps(tree)})


def write_state(path: Path, parts: Mapping[str, Stateful], notes: dict[str, Any]) -> None:
    """Write ``state_bytes``, for its owner alone, so that a reader sees the old file or the new one, never half."""
    write_atomic(path, state_bytes(parts, notes), mode=0o600)


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the notes and each part's state.

    Raises:
        IntegrityError: The file is damaged or of another release.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            meta = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a dict)
        tree = json.loads(meta["tree"])
        return json.loads(meta["notes"]), {name: _put_together(node, tensors) for name, node in tree.items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path.name} cannot be read, so the run cannot go on.", "Delete the run's folder and start again."
        ) from error


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON, its tensors moved to ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"map": [[key, _take_apart(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_take_apart(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} at {path} cannot be kept in a run's state")


def _put_together(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _put_together(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_put_together(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
