"""How this node de-identifies: ``deid.yaml``, which only the hospital writes; one set of rules for every way in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.checks import write_atomic
from medlsdm.errors import ConfigError
from medlsdm.sharing.receipt import canonical_json
from medlsdm_node.home import NodeHome

if TYPE_CHECKING:
    from deid_tools.recipes import Recipe
    from deid_tools.treatment import PixelPolicy

FILE_NAME = "deid.yaml"
DEFAULT_DEID = """\
# How this node de-identifies what comes in: ingest, receive, join --receive, and what quarantine releases.
# Only people of this hospital change this file. Each line below is the strict choice; 'status' names every weaker one.
recipe: allow-list    # what stays of a header: allow-list, basic (PS3.15), or the path of a recipe (.dicom)
options: []           # with basic: modified-dates, patient-characteristics, age-bands, clean-descriptors, safe-private
text: blank           # burned-in text: blank it, or quarantine the series
faces: remove         # faces in head scans: remove, or keep
device_rules: null    # a file with this site's own device rules (YAML); null takes the package's
segmenter: null       # labels a series that has no label map: NAME or NAME=FOLDER (docs/labels.md)
workers: 2            # processes that share the files of a long series
pictures: false       # true: keep small pictures before and after, faces included, sealed with the evidence
"""


class DeidSettings(BaseModel):
    """Hold the rules; see DEFAULT_DEID for what each one means. A path is relative to the node's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipe: str = "allow-list"
    options: tuple[str, ...] = ()
    text: Literal["blank", "quarantine"] = "blank"
    faces: Literal["remove", "keep"] = "remove"
    device_rules: Path | None = None
    segmenter: str | None = None
    workers: int = Field(default=2, ge=1, le=64)
    pictures: bool = False


@dataclass(frozen=True, slots=True)
class Deidentification:
    """Hold the settings of a node, checked and ready for use.

    ``digest`` covers every setting that changes what comes out, and the content of the site's device rules.
    ``weaker`` says in words what is weaker than the default; empty where nothing is.
    """

    settings: DeidSettings
    recipe: Recipe = field(repr=False)
    rules: Path | None
    digest: str
    weaker: tuple[str, ...]

    def policy(self) -> PixelPolicy:
        """Return what is done with pixels."""
        from deid_tools.treatment import PixelPolicy

        return PixelPolicy(self.settings.text, self.settings.faces == "remove", self.rules)

    def check_segmenter(self) -> None:
        """Raise ConfigError where the segmenter cannot run here, before anything is taken in."""
        from deid_tools.segmenters import load_segmenter

        if self.settings.segmenter:
            load_segmenter(self.settings.segmenter)


def load_deid(home: NodeHome) -> Deidentification:
    """Read ``deid.yaml``, check all that it names, and make it where there is none.

    Raises:
        ConfigError: It does not read, a rule is missing or unknown, or it names what is not there.
    """
    from deid_tools.device_rules import DeviceRules
    from deid_tools.evidence import weaker
    from deid_tools.recipes import load_recipe
    from deid_tools.treatment import PixelPolicy

    write_default(home)
    settings = _read(home.root / FILE_NAME)
    recipe = load_recipe(_recipe_name(home, settings.recipe), settings.options)
    rules = home.root / settings.device_rules if settings.device_rules else None
    DeviceRules(rules)
    policy = PixelPolicy(settings.text, settings.faces == "remove", rules)
    return Deidentification(settings, recipe, rules, _digest(settings, recipe, rules), weaker(recipe, policy))


def write_default(home: NodeHome) -> None:
    """Make the file with the strict choices, where there is none."""
    path = home.root / FILE_NAME
    if not path.exists():
        write_atomic(path, DEFAULT_DEID.encode(), mode=0o600)


def _read(path: Path) -> DeidSettings:
    try:
        rules = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = DeidSettings.model_validate(rules)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable("it is not YAML") from error
    except ValidationError as error:
        raise _unreadable(".".join(str(p) for p in error.errors()[0]["loc"]) or "it holds no rules") from error
    if missing := sorted(set(DeidSettings.model_fields) - set(rules)):
        raise _unreadable(f"{', '.join(missing)} missing")  # a file cut short must not quietly become another
    return settings


def _recipe_name(home: NodeHome, name: str) -> str | Path:
    return home.root / name if name.endswith(".dicom") else name


def _digest(settings: DeidSettings, recipe: Recipe, rules: Path | None) -> str:
    facts: dict[str, Any] = settings.model_dump(mode="json", exclude={"workers", "recipe", "device_rules"})
    facts["recipe"] = recipe.sha256
    facts["device_rules"] = hashlib.sha256(rules.read_bytes()).hexdigest() if rules else None
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def _unreadable(where: str) -> ConfigError:
    return ConfigError(f"{FILE_NAME} cannot be read ({where}).", "Correct it; until then nothing is taken in.")
