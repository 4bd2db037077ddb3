"""Replies are hostile input: read what a site returned, and refuse whatever is not exactly what was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from safetensors import safe_open
from safetensors.numpy import save_file

from medlsdm.errors import UNTOLD, IntegrityError, MedlsdmError, public_texts
from medlsdm.federation.arrays import Arrays
from medlsdm.federation.plan import RoundReply
from medlsdm_server.text import plain

MOST_WEIGHT = 2.0**16
MOST_SECONDS = 30 * 86_400.0
SPARE_BYTES = 4096  # of an array's own header


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold what one site returned, its weights in a file beside the launch.

    ``norm`` is the length of the update: the root of the squared differences from what was sent, over all floats.
    """

    site: str
    weight: float
    loss: float | None
    training_seconds: float
    norm: float
    file: Path

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """Return the weights one by one."""
        with safe_open(self.file, "np") as stream:
            for name in stream.keys():  # noqa: SIM118  # it is no dictionary
                yield name, stream.get_tensor(name)

    def array(self, name: str) -> Any:
        """Return one of the weights."""
        with safe_open(self.file, "np") as stream:
            return stream.get_tensor(name)


def told(reason: object) -> str:
    """Return why a site refused: one of the sentences that our nodes may say, or that it may not say more."""
    return str(reason) if reason in public_texts() else UNTOLD


def read_reply(message: Message, site: str, expected: Arrays, file: Path) -> Reply:
    """Check a site's message, keep its weights in ``file`` (safetensors), and return the rest.

    Arrays are taken out of the message one by one, so that no second copy of all of them is made.

    Raises:
        IntegrityError: Something is not as asked; ``message`` says what in words of ours.
        MedlsdmError: The reply is of another release.
    """
    content = message.content
    if set(content.keys()) != {"arrays", "metrics", "reply"}:
        raise _wrong("it does not hold exactly the three records that were asked for")
    arrays, metrics, words = content["arrays"], content["metrics"], content["reply"]
    if not (isinstance(arrays, ArrayRecord) and isinstance(metrics, MetricRecord) and isinstance(words, ConfigRecord)):
        raise _wrong("a record is of another kind")
    if set(metrics.keys()) != {"weight"} or set(words.keys()) != {"reply"}:
        raise _wrong("a record holds other fields than were asked for")
    reply = RoundReply.from_json(str(words["reply"]))
    weight = _weight(metrics["weight"], reply.weight)
    if reply.loss is not None and not math.isfinite(reply.loss):
        raise _wrong("the loss is not a number")
    if not (math.isfinite(reply.training_seconds) and reply.training_seconds <= MOST_SECONDS):
        raise _wrong("the training time is not a time")
    norm = _keep(arrays, expected, file)
    return Reply(site, weight, reply.loss, reply.training_seconds, norm, file)


def _weight(declared: Any, again: float) -> float:
    if isinstance(declared, bool) or not isinstance(declared, int | float) or not math.isfinite(declared):
        raise _wrong("the declared weight is not a number")
    if not 1 <= declared <= MOST_WEIGHT or math.frexp(declared)[0] != 0.5:
        raise _wrong(f"the declared weight is no power of two from 1 to {MOST_WEIGHT:.0f}")
    if declared != again:
        raise _wrong("the declared weight differs in its two places")
    return float(declared)


def _keep(record: ArrayRecord, expected: Arrays, file: Path) -> float:
    """Write the arrays to a file and return the length of the update."""
    if set(record.keys()) != set(expected):
        raise _wrong("its weights belong to another architecture")
    kept: Arrays = {}
    square = 0.0
    for name, like in expected.items():
        value = _array(record.pop(name), name, like)
        if value.dtype.kind == "f":
            square += float(np.square(value.astype(np.float64) - like).sum())
        kept[name] = value
    if not math.isfinite(square):
        raise _wrong("its weights are too large")
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    save_file(kept, draft)
    draft.chmod(0o600)
    draft.replace(file)
    return math.sqrt(square)


def _array(array: Array, name: str, like: Any) -> Any:
    """Return one array if its type, shape and values are as asked; its size is looked at before it is unpacked."""
    if (array.dtype, tuple(array.shape)) != (str(like.dtype), like.shape) or len(
        array.data
    ) > like.nbytes + SPARE_BYTES:
        raise _wrong(f"the weight {plain(name)} is of another type, shape or size")
    value = array.numpy()
    if value.dtype != like.dtype or value.shape != like.shape:
        raise _wrong(f"the weight {plain(name)} is of another type or shape")
    if value.dtype.kind not in "fiub" or (value.dtype.kind == "f" and not np.isfinite(value).all()):
        raise _wrong(f"the weight {plain(name)} holds values that are not finite")
    return np.ascontiguousarray(value)


def _wrong(what: str) -> IntegrityError:
    return IntegrityError(f"The reply was not used: {what}.", "Use the same release on every site.")


def refusal(error: Exception) -> str:
    """Return what a row says of a reply that could not be used."""
    return plain(error.message) if isinstance(error, MedlsdmError) else "The reply was not used: it cannot be read."


def note_reply(reply: Reply) -> None:
    """Write beside the weights what else was said, so that a coordinator that is started again can go on with it."""
    row = {
        "site": reply.site, "weight": reply.weight, "loss": reply.loss, "training_seconds": reply.training_seconds,
        "norm": reply.norm,
    }  # fmt: skip
    draft = reply.file.with_suffix(".json.draft")
    draft.write_text(json.dumps(row))
    draft.replace(reply.file.with_suffix(".json"))


def kept_replies(folder: Path, expected: Mapping[str, Any]) -> list[Reply]:
    """Return the replies of this very round that an earlier coordinator had received whole."""
    found = []
    for note in sorted(folder.glob("*.json")):
        file = note.with_suffix(".safetensors")
        try:
            row = json.loads(note.read_text())
            reply = Reply(row["site"], row["weight"], row["loss"], row["training_seconds"], row["norm"], file)
            with safe_open(file, "np") as stream:
                same = set(stream.keys()) == set(expected)
        except Exception:  # noqa: S112  # what is half written is asked for again
            continue
        if same:
            found.append(reply)
    return found
