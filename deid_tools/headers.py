"""Header de-identification: an allow-list recipe run by pydicom/deid inside a wrapper that fails closed.

The engine leaves a value in place when a recipe names a variable that is not there or a function
returns nothing. So the recipe is checked when it is loaded, everything the engine writes or warns
about is a refusal, and its result is checked element by element before anything is built from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deid_tools.admit import ADMITTED, IMAGE_CLASSES, Refusal
from deid_tools.keys import SiteKeys
from deid_tools.modules import complete, stamp
from deid_tools.nested import rebuild
from deid_tools.uids import new_uid, pseudonym
from medlsdm.errors import ConfigError
from medlsdm.types import LabelSchema

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_FUNCTIONS = ("keyed_uid",)
_VARIABLES = ("pseudonym",)
_NUMBERS = ("DS", "IS", "US", "SS", "UL", "SL", "FD", "FL")


def _terms(text: str) -> frozenset[str]:
    return frozenset(text.split())


TERMS: dict[str, frozenset[str]] = {
    "Modality": _terms("CT MR PT SEG"),
    "ImageType": _terms(
        "ORIGINAL DERIVED PRIMARY SECONDARY AXIAL M M_FFE NONE NORM DIS2D DIS3D ADD VOLUME MIXED T1 T2 "
        "PROTON_DENSITY DIFFUSION FFE SE"
    ),
    "PatientPosition": _terms("HFP HFS HFDR HFDL FFDR FFDL FFP FFS"),
    "MRAcquisitionType": _terms("2D 3D"),
    "ScanningSequence": _terms("SE IR GR EP RM"),
    "SequenceVariant": _terms("SK MTC SS TRSS SP MP OSP NONE"),
    "Units": _terms("CNTS NONE CM2 PCNT CPS BQML MGMINML UMOLMINML MLMING MLG 1CM UMOLML PROPCNTS GML STDDEV"),
    "SUVType": _terms("BSA BW LBM LBMJAMES128 LBMJANMA IBW"),
    "DecayCorrection": _terms("NONE START ADMIN"),
    "CorrectedImage": _terms("DECY RADL ATTN SCAT DTIM MOTN PMOT CLN RAN DCAL NORM"),
    "PhotometricInterpretation": _terms("MONOCHROME2"),
    "RescaleType": _terms("HU US OD"),
    "LossyImageCompression": _terms("00 01"),
    "SegmentationType": _terms("BINARY FRACTIONAL LABELMAP"),
    "SegmentationFractionalType": _terms("PROBABILITY OCCUPANCY"),
    "SegmentsOverlap": _terms("YES NO UNDEFINED"),
}
"""The terms that a code string may hold; any other term is dropped (ImageType: becomes NONE)."""


def default_recipe() -> Path:
    """Return the allow-list recipe that comes with the package."""
    return Path(str(resources.files("deid_tools"))) / "recipes" / "allow-list.dicom"


class HeaderCleaner:
    """De-identify headers under one recipe and one set of keys.

    Args:
        keys: The site's keys.
        schema: The label schema that may name segments; without it only dictionary codes do.
        recipe: An allow-list recipe: REMOVE ALL, KEEP and REPLACE, nothing else.

    Raises:
        ConfigError: The recipe names an unknown tag, variable, function or action.
    """

    def __init__(self, keys: SiteKeys, *, schema: LabelSchema | None = None, recipe: Path | None = None) -> None:
        recipe = recipe or default_recipe()
        self.keys = keys
        self.schema = schema
        self.recipe_sha256 = hashlib.sha256(recipe.read_bytes()).hexdigest()
        with _engine() as said:
            from deid.config import DeidRecipe
            from deid.dicom.fields import _get_fields_inner  # pyright: ignore[reportPrivateUsage]
            from deid.dicom.parser import DicomParser

            self._parser, self._forget = DicomParser, _get_fields_inner.cache_clear
            self._recipe = DeidRecipe(str(recipe))
        self.kept, self.replaced = _check_recipe(self._recipe, said.getvalue())

    def clean(self, ds: Dataset) -> Dataset:
        """Return a new dataset with nothing in it but what the recipe allows, without pixel data.

        Raises:
            Refusal: The engine failed, warned or left something it should not have.
        """
        from pydicom.dataset import Dataset

        patient = pseudonym(self.keys, str(ds.get("IssuerOfPatientID", "") or ""), str(ds.PatientID))
        flat = self._run(_without_nested(ds), patient)
        result = Dataset()
        for element in flat:
            self._take(element, ds, patient, result)
        multiframe = ADMITTED[str(ds.SOPClassUID)] == "SEG" or "PerFrameFunctionalGroupsSequence" in ds
        rebuild(ds, result, self.keys, self.schema, multiframe=multiframe)
        complete(result, IMAGE_CLASSES.get(str(ds.SOPClassUID), "SEG"), multiframe=multiframe)
        stamp(result)
        return result

    def _run(self, flat: Dataset, patient: str) -> Dataset:
        def keyed_uid(item: Any, value: Any, field: Any, dicom: Any) -> str:
            return new_uid(self.keys, str(field.element.value))

        try:
            with _engine() as said:
                parser = self._parser(flat, recipe=self._recipe, force=False, disable_skip=True)
                parser.define("keyed_uid", keyed_uid)
                parser.define("pseudonym", patient)
                parser.parse()
        except (Exception, SystemExit):
            raise Refusal("the header could not be de-identified (the engine failed)") from None
        finally:
            self._forget()  # else the engine keeps every header it ever saw in memory
        if said.getvalue().strip():
            raise Refusal("the header could not be de-identified (the engine warned)")
        return parser.dicom

    def _take(self, element: Any, ds: Dataset, patient: str, result: Dataset) -> None:
        keyword = element.keyword
        if keyword in self.replaced:
            original = str(ds.get(keyword, "") or "")
            expected = new_uid(self.keys, original) if element.VR == "UI" else patient
            if str(element.value) != expected and original:
                raise Refusal("the engine left an identifier in place")
            if original:
                result.add_new(element.tag, element.VR, expected)
        elif keyword not in self.kept:
            raise Refusal("the engine left an element in place that is not on the allow-list")
        elif element.VR in _NUMBERS:
            _take_number(element, result)
        elif element.VR == "CS":
            _take_terms(element, result)
        elif keyword == "SOPClassUID" and str(element.value) in ADMITTED:
            result.SOPClassUID = element.value
        elif keyword in ("RescaleType",):
            if str(element.value) in TERMS[keyword]:
                result.add_new(element.tag, element.VR, str(element.value))
        else:
            raise Refusal("an element is not of the type that the standard gives it")


def _take_number(element: Any, result: Dataset) -> None:
    try:
        values = [] if element.value is None else element.value if element.VM > 1 else [element.value]
        finite = all(abs(float(v)) < 1e12 for v in values)
    except (TypeError, ValueError):
        raise Refusal("a numeric element does not hold a number") from None
    if not finite:
        raise Refusal("a numeric element holds a value out of range")
    if values:
        result.add_new(element.tag, element.VR, element.value)


def _take_terms(element: Any, result: Dataset) -> None:
    allowed = TERMS.get(element.keyword, frozenset())
    values = element.value if element.VM > 1 else [element.value] if element.value else []
    if element.keyword == "ImageType":
        terms = [str(v) if str(v) in allowed else "NONE" for v in values][:4]
    else:
        terms = [str(v) for v in values if str(v) in allowed]
    if terms:
        result.add_new(element.tag, "CS", terms)


def _without_nested(ds: Dataset) -> Dataset:
    """Copy the public, flat elements: private ones, sequences and pixels never reach the engine."""
    from pydicom.dataset import FileDataset, FileMetaDataset

    flat = FileDataset("", {}, file_meta=FileMetaDataset())
    for tag in list(ds.keys()):
        if tag.is_private or tag.group >= 0x7FE0 or tag.element == 0 or tag.group in (0x0002, 0x0004):
            continue
        try:
            element = ds[tag]
        except Exception:
            if tag in _kept_tags():
                raise Refusal("an element that is needed cannot be read") from None
            continue
        if element.VR not in ("SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN"):
            flat.add_new(tag, element.VR, element.value)
    return flat


def _kept_tags() -> frozenset[int]:
    from pydicom.datadict import tag_for_keyword

    lines = default_recipe().read_text().splitlines()
    tags = (tag_for_keyword(line.split()[1]) for line in lines if line.startswith(("KEEP", "REPLACE")))
    return frozenset(tag for tag in tags if tag is not None)


def _check_recipe(recipe: Any, said: str) -> tuple[frozenset[str], frozenset[str]]:
    from pydicom.datadict import tag_for_keyword

    actions = recipe.get_actions() or []
    problems = [said.strip()] if said.strip() else []
    if not any(a["action"] == "REMOVE" and a["field"] == "ALL" for a in actions):
        problems.append("it does not start from REMOVE ALL")
    if any(recipe.deid.get(section) for section in ("filter", "values", "fields")):
        problems.append("it has sections other than %header")
    kept, replaced = set(), set()
    for action in actions:
        name, field, value = action["action"], action["field"], str(action.get("value") or "")
        if name == "REMOVE" and field == "ALL":
            continue
        if name not in ("KEEP", "REPLACE") or tag_for_keyword(field) is None:
            problems.append(f"{name} {field} is not an action on a known attribute")
        kind, _, target = value.partition(":")
        known = {"func": _FUNCTIONS, "var": _VARIABLES}.get(kind, ())
        if name == "REPLACE" and target not in known:
            problems.append(f"{field} is replaced by something undefined")
        (kept if name == "KEEP" else replaced).add(field)
    if problems or kept & replaced:
        raise ConfigError(
            f"The de-identification recipe is not safe: {'; '.join(problems) or 'it contradicts itself'}."
        )
    return frozenset(kept), frozenset(replaced)


@contextlib.contextmanager
def _engine() -> Any:
    """Catch all that the engine prints or warns: it has its own streams, made when it is imported."""
    from deid.logger import bot
    from deid.logger.message import WARNING

    said = io.StringIO()
    state = bot.errorStream, bot.outputStream, bot.level
    bot.errorStream, bot.outputStream, bot.level = said, said, WARNING
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield said
    finally:
        bot.errorStream, bot.outputStream, bot.level = state
