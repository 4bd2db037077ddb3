"""What happens to the pixels of one series: declared regions, burned-in text, then the face."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.burned_in import POLICIES, hide_text
from deid_tools.face_series import deface
from deid_tools.faces import FaceCut, LabelledBrain, mask_points
from deid_tools.pixels import TextSearch
from deid_tools.slices import Frame
from medlsdm.errors import ConfigError
from medlsdm.types import Geometry, LabelSchema

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_HEAD = re.compile(
    r"HEAD|BRAIN|SKULL|FACE|ORBIT|SELLA|TEMPORAL BONE|SINUS|IAC|CRANI|HYPOPHYS|NECK|MAXILL|MANDIB|JAW|NASAL|\bNOSE"
)
_BRAIN = re.compile(
    r"\b(brain|cerebr\w*|cerebell\w*|cortex|white matter|gr[ae]y matter|ventricle\w*|thalam\w*|hippocamp\w*|"
    r"caudate|putamen|pallidum|amygdala|accumbens|brain-?stem|pons|medulla|corpus callosum)\b"
)
_BRAIN_CODES = frozenset(["12738006", "83678007", "113305005", "15926001", "389080008", "389081007", "11628009"])
_WHOLE_ML = (400.0, 2200.0)  # from an infant's; one half of an adult's guards as well, as planes run from left to right


@dataclass(frozen=True, slots=True)
class PixelPolicy:
    """Say what a site does with pixels.

    Args:
        text: ``blank`` burned-in text, or ``quarantine`` the series.
        faces: Whether faces are removed from heads.
        rules: The site's device rules in YAML; by default those of the package.
        pictures: A folder inside the node for pictures of defacing; by default none are written.

    Raises:
        ConfigError: ``text`` is neither.
    """

    text: str = "blank"
    faces: bool = True
    rules: Path | None = None
    pictures: Path | None = None

    def __post_init__(self) -> None:
        if self.text not in POLICIES:
            raise ConfigError("The policy for burned-in text is not known.", f"Use one of: {', '.join(POLICIES)}.")

    @property
    def id(self) -> str:
        """Return 12 hex digits that name what is done to pixels on this machine, tesseract's presence included."""
        rules = self.rules.read_bytes() if self.rules else b""
        said = f"{self.text}/{self.faces}/{TextSearch.state()}/".encode() + rules
        return hashlib.sha256(said).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class PixelRecord:
    """Say what was done to one series' pixels: boxes of text blanked, and what became of the face.

    ``cuts`` are where it was cut off, for the label maps of the series.
    """

    text_boxes: int = 0
    face: str = ""
    guard: str = ""
    cuts: tuple[FaceCut, ...] = field(default=(), repr=False)


NOTHING_DONE = PixelRecord()


def treat(
    text: TextSearch,
    files: list[Path],
    policy: PixelPolicy,
    *,
    hu: bool,
    head: bool,
    frames: Sequence[Frame],
    name: str,
    brain: Callable[[], LabelledBrain | None],
) -> PixelRecord:
    """Hide text and face in the staged files of one series.

    Args:
        text: The search that saw every frame of the files, and the boxes of the device rules.
        files: The staged files.
        policy: What the site does.
        hu: Whether values are Hounsfield units once rescaled.
        head: Whether an original header says head.
        frames: Where the frames of the files lie.
        name: What a picture is called; of pseudonyms only.
        brain: Finds what label maps call brain, when asked.

    Raises:
        Refusal: Something must be hidden and cannot be.
    """
    hidden = hide_text(text, files, policy.text)
    boxes = hidden.boxes if hidden else 0
    if not policy.faces:
        return PixelRecord(boxes, "left as it is")
    picture = policy.pictures / f"{name}.png" if policy.pictures else None
    done = deface(files, hu=hu, declared=head, brain=brain(), picture=picture, frames=frames)
    return PixelRecord(boxes, done.outcome, done.guard, done.cuts)


def says_head(original: Dataset) -> bool:
    """Tell whether a header's body part or anatomic region is a part of the head."""
    regions: Any = original.get("AnatomicRegionSequence", None) or []
    words = [original.get("BodyPartExamined", ""), *(item.get("CodeMeaning", "") for item in regions)]
    return any(_HEAD.search(str(word or "").upper()) for word in words)


def labelled_brain(labels: NDArray[Any], geometry: Geometry, schema: LabelSchema) -> LabelledBrain | None:
    """Return what a label map calls brain, by code or by name; None where it names none."""
    ids = [c.id for c in schema.classes if c.id and (c.snomed in _BRAIN_CODES or _BRAIN.search(c.name.casefold()))]
    chosen = np.isin(labels, ids)
    if not chosen.any():
        return None
    millilitres = float(chosen.sum()) * float(abs(np.linalg.det(geometry.affine[:3, :3]))) / 1000
    return LabelledBrain(mask_points(chosen, geometry.affine), _WHOLE_ML[0] <= millilitres <= _WHOLE_ML[1])
