"""Replies are hostile input: read what a site returned, and refuse whatever is not exactly what was asked."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medlsdm.checks import write_atomic, writing
from medlsdm.errors import UNTOLD, IntegrityError, MedlsdmError, public_texts
from medlsdm.federation.arrays import PACKED, Arrays
from medlsdm.federation.plan import RoundReply
from medlsdm_server.text import plain

MOST_WEIGHT = 2.0**16
MOST_SECONDS = 30 * 86_400.0
SPARE_BYTES = 4096  # of an array's own header
PIECE = 1 << 20  # values at a time, where float64 is needed


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

    def forget(self) -> None:
        """Delete what was kept."""
        for suffix in (".json", ".safetensors"):
            self.file.with_suffix(suffix).unlink(missing_ok=True)


def told(reason: object) -> str:
    """Return why a site refused: one of the sentences that our nodes may say, or that it may not say more."""
    return str(reason) if reason in public_texts() else UNTOLD


def read_reply(message: Message, site: str, expected: Arrays, file: Path) -> Reply:
    """Check a site's message, keep its weights in ``file`` (safetensors), and return the rest.

    Arrays are taken out of the message one by one, so that no second copy of all of them is made.

    Raises:
        IntegrityError: Something is not as asked; ``message`` says what in words of ours.
        MedlsdmError: The reply is of another release.
        ResourceError: There is no room to keep it.
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
    """Write the arrays to a file and return the length of the update. They come as one array, or by name."""
    with writing(file, mode=0o600) as draft:
        if set(record.keys()) == {PACKED}:
            draft.write_bytes(_packed(record.pop(PACKED), expected))
        else:
            _same_names(record, expected)
            save_file({name: _array(record.pop(name), name, like) for name, like in expected.items()}, draft)
        return _norm(draft, expected)


def _norm(file: Path, expected: Arrays) -> float:
    """Return the length of the update in a file whose arrays are all as asked."""
    square = 0.0
    try:
        with safe_open(file, "np") as stream:
            _same_names(stream.keys(), expected)
            for name, like in expected.items():
                value = _checked(stream.get_tensor(name), name, like)
                square += _square(value, like) if value.dtype.kind == "f" else 0.0
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:  # TypeError: NumPy has no such type
        raise _wrong("its weights cannot be read") from error
    if not math.isfinite(square):
        raise _wrong("its weights are too large")
    return math.sqrt(square)


def _same_names(names: Iterable[str], expected: Arrays) -> None:
    if set(names) != set(expected):
        raise _wrong("its weights belong to another architecture")


def _packed(array: Array, expected: Arrays) -> memoryview:
    """Return the bytes of the one array that holds all, if there are as many as were asked for."""
    most = sum(like.nbytes + SPARE_BYTES for like in expected.values())
    value = _unpacked(array.data) if len(array.data) <= most else None
    if value is None or value.dtype != np.uint8 or value.ndim != 1:
        raise _wrong("its weights are of another type, shape or size")
    return value.data


def _array(array: Array, name: str, like: Any) -> Any:
    """Return one array if its type, shape and values are as asked; its size is looked at before it is unpacked."""
    if (array.dtype, tuple(array.shape)) != (str(like.dtype), like.shape) or len(
        array.data
    ) > like.nbytes + SPARE_BYTES:
        raise _wrong(f"the weight {plain(name)} is of another type, shape or size")
    value = _unpacked(array.data)
    return _checked(value, name, like)


def _checked(value: Any, name: str, like: Any) -> Any:
    if value is None or value.dtype != like.dtype or value.shape != like.shape:
        raise _wrong(f"the weight {plain(name)} is of another type or shape")
    if value.dtype.kind not in "fiub" or (value.dtype.kind == "f" and not np.isfinite(value).all()):
        raise _wrong(f"the weight {plain(name)} holds values that are not finite")
    return np.asarray(value, order="C")


def _unpacked(data: bytes) -> Any:
    """Return the array in the bytes of a .npy file without a copy, or None where they are none or of another size.

    NumPy's own reader takes memory for whatever size the header states, and opens archives too.
    """
    stream = io.BytesIO(data[:SPARE_BYTES])
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError:
        return None
    begin = stream.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - begin:
        return None
    return np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if by_columns else "C")


def _square(value: Any, like: Any) -> float:
    """Return the squared length of a difference, in float64, a piece at a time."""
    mine, sent = np.ravel(value), np.ravel(like)
    pieces = (slice(i, i + PIECE) for i in range(0, mine.size, PIECE))
    return sum(float(np.square(mine[p].astype(np.float64) - sent[p]).sum()) for p in pieces)


@contextmanager
def within(expected: Arrays) -> Iterator[None]:
    """While Flower puts a reply together, refuse arrays that are larger in sum than those that were asked for.

    An array lists its pieces by number and may list one a million times, so that a few bytes on the line become more
    than memory holds before anybody here has looked at them.

    Raises:
        IntegrityError: They are larger; raised through Flower's call.
    """
    room = sum(like.nbytes + SPARE_BYTES for like in expected.values())
    original = Array.__dict__["inflate"]

    def inflate(cls: type[Array], object_content: bytes, children: Any = None) -> Array:
        nonlocal room
        names = get_object_children_ids_from_object_content(object_content)
        for listed in json.loads(get_object_body(object_content, cls))["arraychunk_ids"]:
            room -= len(children[names[listed]].data)
            if room < 0:
                raise _wrong("its weights are larger than those that were asked for")
        return original.__func__(cls, object_content, children)

    Array.inflate = classmethod(inflate)  # type: ignore[assignment]
    try:
        yield
    finally:
        Array.inflate = original


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
    write_atomic(reply.file.with_suffix(".json"), json.dumps(row).encode(), mode=0o600)


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
