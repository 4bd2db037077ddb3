"""The values that flow through the system. Arrays are [X, Y, Z] in the order of the affine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from medlsdm.errors import DataError, GeometryError, NotSyntheticError, SchemaError

MAX_LABEL = 65_535


class Modality(StrEnum):
    """Name the kinds of scan, by their DICOM Modality."""

    CT = "CT"
    MR = "MR"
    PT = "PT"


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """Place a voxel grid in the patient: affine (4x4, index to mm, RAS+) and shape.

    Raises:
        GeometryError: The affine is singular or not finite, or the shape is not 3D.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        shape = tuple(int(n) for n in self.shape)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError("The affine is not a finite 4x4 matrix.", "Check the volume's header.")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise GeometryError("The spacing is zero along an axis.", "Check the volume's header.")
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"The volume has shape {shape}; three axes are needed.", "Give a 3D volume.")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Return the voxel size along each array axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def orientation(self) -> str:
        """Return where each array axis points, for example ``"RAS"``."""
        directions = self.affine[:3, :3] / np.array(self.spacing)
        letters, free = "", [0, 1, 2]
        for axis in range(3):
            world = max(free, key=lambda w: abs(directions[w, axis]))
            free.remove(world)
            letters += ("RAS" if directions[world, axis] > 0 else "LPI")[world]
        return letters

    def matches(self, other: Geometry, tolerance_mm: float = 1e-2) -> bool:
        """Tell whether both grids have one shape and every corner within ``tolerance_mm``."""
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], [1])).reshape(4, -1)
        distance = np.linalg.norm((self.affine - other.affine) @ corners, axis=0)
        return bool(distance.max() <= tolerance_mm)


def _fits(array: NDArray[Any], geometry: Geometry) -> None:
    if array.shape != geometry.shape:
        raise GeometryError(f"An array of shape {array.shape} does not fit a grid of shape {geometry.shape}.")


def _refuse_pickle(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is never pickled")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Scan:
    """Hold one de-identified, still private scan: float32 [X, Y, Z] in HU, SUV or MR units.

    Only the vault may save it. ``subject`` is a pseudonym; ``repr`` shows no content.
    """

    array: NDArray[np.float32]
    geometry: Geometry
    modality: Modality
    subject: str

    def __post_init__(self) -> None:
        array = np.asarray(self.array, dtype=np.float32)
        _fits(array, self.geometry)
        if not np.isfinite([array.min(), array.max()]).all():  # needs no second array of the scan's size
            raise DataError("The scan holds values that are not finite.", "Check the source series.")
        object.__setattr__(self, "array", array)

    def __repr__(self) -> str:
        return "Scan(private)"

    def __reduce__(self) -> NoReturn:
        _refuse_pickle(self)


@dataclass(frozen=True, slots=True)
class LabelClass:
    """Name one class: id in the map, name, SNOMED CT code ("" if none), colour (RGB 0-255).

    ``aliases`` are the names that this site's own segments and contours use for the class. An alias
    of the background leaves a structure out; the alias ``*`` there leaves out whatever is not named.
    """

    id: int
    name: str
    snomed: str = ""
    colour: tuple[int, int, int] = (128, 128, 128)
    aliases: tuple[str, ...] = ()

    def answers_to(self, text: str) -> bool:
        """Tell whether ``text`` is the class's name or an alias; case, spaces and underscores alike."""
        return plain_name(text) in {plain_name(name) for name in (self.name, *self.aliases)}


def plain_name(text: str) -> str:
    """Return a name in lower case with single spaces, underscores being spaces."""
    return " ".join(text.replace("_", " ").split()).casefold()


@dataclass(frozen=True, slots=True)
class LabelSchema:
    """List the classes that every site agrees on; class 0 is the background.

    ``priority`` names classes, the winner first, for voxels that two structures claim; it and the
    aliases are the site's own business and not part of the digest.

    Raises:
        SchemaError: Ids or names repeat, id 0 is missing, an id is out of range, or ``priority``
            names no class.
    """

    name: str
    classes: tuple[LabelClass, ...]
    priority: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = [c.id for c in self.classes]
        names = [name for c in self.classes for name in {plain_name(n) for n in (c.name, *c.aliases)}]
        if 0 not in ids or len(set(ids)) < len(ids) or len(set(names)) < len(names):
            raise SchemaError(
                f"The label schema {self.name!r} repeats an id or a name, or has no background.",
                "Give every class one id and one name, with id 0 for the background.",
            )
        if min(ids) < 0 or max(ids) > MAX_LABEL:
            raise SchemaError(f"The label schema {self.name!r} has ids outside 0-{MAX_LABEL}.")
        if any("*" in c.aliases for c in self.classes if c.id):
            raise SchemaError("Only the background may have the alias '*'.", "Name the structures of each class.")
        if any(name not in {c.name for c in self.classes} for name in self.priority):
            raise SchemaError(
                f"The priority of the label schema {self.name!r} names no class.", "Use the names of its classes."
            )

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the class ids, ascending: the channel order of one-hot arrays."""
        return tuple(sorted(c.id for c in self.classes))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what must be equal across sites: ids, names and codes."""
        rows = sorted((c.id, c.name, c.snomed) for c in self.classes)
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()

    def agreed(self) -> LabelSchema:
        """Return what all sites share, without this site's own aliases and priority: they may say more than classes."""
        return LabelSchema(self.name, tuple(replace(c, aliases=()) for c in self.classes))

    def by_id(self, label: int) -> LabelClass:
        """Return the class with this id, or raise SchemaError."""
        for cls in self.classes:
            if cls.id == label:
                return cls
        raise SchemaError(f"Label {label} is not in the schema {self.name!r}.")

    def by_name(self, text: str) -> LabelClass | None:
        """Return the class that has this name or alias, else the background if its aliases hold ``*``."""
        named = [c for c in self.classes if c.answers_to(text)] if plain_name(text) != "*" else []
        others = [c for c in self.classes if "*" in c.aliases]
        return (named + others or [None])[0]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_json`` reads them back."""
        classes = [
            {"id": c.id, "name": c.name, "snomed": c.snomed, "colour": list(c.colour)}
            | ({"aliases": list(c.aliases)} if c.aliases else {})
            for c in self.classes
        ]
        return {"name": self.name, "classes": classes} | ({"priority": list(self.priority)} if self.priority else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build a schema from ``to_json`` output or a YAML file of the same form."""
        try:
            classes = tuple(
                LabelClass(
                    int(row["id"]),
                    str(row["name"]),
                    str(row.get("snomed", "")),
                    tuple(row.get("colour", (128, 128, 128))),
                    _strings(row.get("aliases", ())),
                )
                for row in data["classes"]
            )
            return cls(str(data["name"]), classes, _strings(data.get("priority", ())))
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(
                "The label schema cannot be read.", "It needs a name and classes with id and name."
            ) from error


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(v) for v in value)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SemanticMap:
    """Hold an integer label map [X, Y, Z] (uint8 or uint16) on a grid, under a schema.

    Raises:
        SchemaError: A value is not in the schema.
    """

    array: NDArray[np.integer[Any]]
    geometry: Geometry
    schema: LabelSchema

    def __post_init__(self) -> None:
        source = np.asarray(self.array)
        _fits(source, self.geometry)
        found = np.unique(source)
        unknown = sorted(set(found.tolist()) - set(self.schema.ids))
        if unknown:
            shown = ", ".join(f"{v:g}" for v in unknown[:5])
            raise SchemaError(
                f"The label map holds values that the schema {self.schema.name!r} does not name: {shown}.",
                "Add them to the label schema or remap the labels.",
            )
        dtype = np.uint8 if max(self.schema.ids) < 256 else np.uint16
        object.__setattr__(self, "array", source.astype(dtype))

    def __repr__(self) -> str:
        return f"SemanticMap(schema={self.schema.name!r}, private)"

    def __reduce__(self) -> NoReturn:
        _refuse_pickle(self)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of values, shape and affine."""
        sha = hashlib.sha256(json.dumps([list(self.geometry.shape), self.schema.digest]).encode())
        sha.update(np.round(self.geometry.affine, 4).astype("<f8").tobytes())
        sha.update(np.ascontiguousarray(self.array.astype("<u2")).tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class Provenance:
    """Say where a synthetic volume comes from: digests of checkpoint, card and label map, and the seed."""

    checkpoint_digest: str
    card_digest: str
    labels_digest: str
    seed: int


SYNTHESIS_SEAL = object()
"""What ``SyntheticVolume`` asks for: used by ``medlsdm.synthesis`` and nowhere else (a test checks it)."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SyntheticVolume:
    """Hold a volume that the model made: float32 [X, Y, Z] on the label map's own grid.

    Only ``medlsdm.synthesis`` makes one, and ``medlsdm.sharing`` exports nothing else.

    Raises:
        NotSyntheticError: It was built anywhere else.
    """

    array: NDArray[np.float32]
    geometry: Geometry
    modality: Modality
    provenance: Provenance
    seal: object = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.seal is not SYNTHESIS_SEAL:
            raise NotSyntheticError(
                "A SyntheticVolume can only come from synthesis.", "Use medlsdm.synthesis to make one."
            )
        _fits(self.array, self.geometry)

    def __repr__(self) -> str:
        return f"SyntheticVolume({self.modality}, shape={self.geometry.shape}, seed={self.provenance.seed})"

    def __reduce__(self) -> NoReturn:
        _refuse_pickle(self)
