"""Header de-identification: an allow-list recipe run by pydicom/deid inside a wrapper that fails closed.

The engine leaves a value in place when a recipe names a variable that is not there or a function
returns nothing. So the recipe is checked when it is loaded, the engine sees only what the recipe
names, everything that it writes or warns about is a refusal, and its result is compared element by
element with what it should be before anything is built from it.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deid_tools.admit import ADMITTED, IMAGE_CLASSES, Refusal
from deid_tools.frames import rebuild, references
from deid_tools.keys import SiteKeys
from deid_tools.modules import complete, stamp
from deid_tools.nested import segment_words
from deid_tools.numbers import LARGEST, may_stay, within_length
from deid_tools.private import take_private
from deid_tools.recipes import NUMBERS, Recipe, load_recipe
from deid_tools.terms import TERMS
from deid_tools.transforms import Transforms, as_text
from medlsdm.errors import ConfigError
from medlsdm.types import LabelSchema

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MOST_REMEMBERED = 4096
_FAILED = "the header could not be de-identified"


@dataclass(frozen=True, slots=True)
class _Done:
    """Hold what became of one element: its new VR and value, or none; and what of it may stand in its original."""

    tag: Any
    vr: str = ""
    value: Any = None
    wrote: frozenset[str] = frozenset()
    removed: Counter[str] = field(default_factory=Counter)


class HeaderCleaner:
    """De-identify headers under one recipe and one set of keys; made once, used for every file.

    Args:
        keys: The site's keys.
        schema: The label schema that may name segments; without it only dictionary codes do.
        recipe: A checked recipe; by default the allow-list.

    Attributes:
        removed: How many values were removed because they could not be read, by kind.
        wrote: What the last result holds that also stands in its original, and may: cleaned words, times.
    """

    def __init__(self, keys: SiteKeys, *, schema: LabelSchema | None = None, recipe: Recipe | None = None) -> None:
        self.keys = keys
        self.schema = schema
        self.recipe = recipe or load_recipe()
        self.recipe_sha256 = self.recipe.sha256
        self.kept, self.replaced = self.recipe.kept, self.recipe.replaced
        self.removed: Counter[str] = Counter()
        self.wrote: set[str] = set()
        self._named = _tags_of({*self.kept, *self.replaced})
        minimal = load_recipe()
        self._needed = _tags_of({*minimal.kept, *minimal.replaced})
        self._engine_recipes: dict[frozenset[str], Any] = {}
        self._recipe: Any = None
        self._done: dict[tuple[Any, ...], _Done] = {}

    def clean(self, ds: Dataset) -> Dataset:
        """Return a new dataset with nothing in it but what the recipe allows, without pixel data.

        Raises:
            Refusal: The engine failed, warned or left something it should not have.
        """
        from pydicom.dataelem import DataElement
        from pydicom.dataset import Dataset

        transforms = Transforms(self.keys, ds, words=bool(self.recipe.by("clean_text")))
        self.wrote = set()
        result = Dataset()
        for done in self._elements(ds, transforms):
            if done.vr:
                result.add(DataElement(done.tag, done.vr, done.value, already_converted=True))
            self.wrote |= done.wrote
            self.removed.update(done.removed)
        multiframe = ADMITTED[str(ds.SOPClassUID)] == "SEG" or "PerFrameFunctionalGroupsSequence" in ds
        rebuild(ds, result, self.keys, self.schema, multiframe=multiframe)
        if self.recipe.name == "basic":
            references(ds, result, self.keys)
        self.wrote.update(take_private(ds, result, self.recipe.private, self.keys))
        complete(result, IMAGE_CLASSES.get(str(ds.SOPClassUID), "SEG"), multiframe=multiframe)
        stamp(result, self.recipe.codes, name=self.recipe.name, dates=self.recipe.shifts_dates)
        self.wrote.update(word for word in segment_words(result) if len(word) > 2)
        return result

    def _elements(self, ds: Dataset, transforms: Transforms) -> list[_Done]:
        """Return what becomes of each element that the recipe names; the rest never reaches the engine.

        Nor does what it has seen before with this patient: an element is read once for each way it is stored.
        """
        if len(self._done) > _MOST_REMEMBERED:
            self._done.clear()
        context = transforms.scope, str(ds.get("SpecificCharacterSet", "")), str(ds.get("PixelRepresentation", ""))
        keys = {tag: (context, *_as_stored(e)) for tag, e in list(ds.items()) if int(tag) in self._named}
        found: dict[Any, _Done] = {}
        fresh = self._flat(ds, [tag for tag, key in keys.items() if key not in self._done], found)
        originals = {element.keyword: copy.copy(element.value) for element in fresh}
        for element in self._run(fresh, transforms) if originals else ():
            found[element.tag] = self._become(element, originals, transforms)
        self._done.update((keys[tag], done) for tag, done in found.items())
        return [found.get(tag) or self._done[key] for tag, key in keys.items()]

    def _become(self, element: Any, originals: dict[str, Any], transforms: Transforms) -> _Done:
        from pydicom.dataset import Dataset

        part, before, self.wrote = Dataset(), Counter(transforms.removed), set()
        self._take(element, originals, transforms, part)
        kept = part.get(element.tag)
        vr, value = (kept.VR, kept.value) if kept is not None else ("", None)
        wrote, self.wrote = frozenset(self.wrote), set()
        return _Done(element.tag, vr, value, wrote, transforms.removed - before)

    def _flat(self, ds: Dataset, tags: list[Any], found: dict[Any, _Done]) -> Dataset:
        """Copy some elements; what cannot be read and is not needed is removed, which goes to ``found``."""
        from pydicom.dataset import FileDataset, FileMetaDataset

        flat = FileDataset("", {}, file_meta=FileMetaDataset())
        for tag in tags:
            found[tag] = _Done(tag)
            try:
                element = ds[tag]
                if element.VR in ("SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN"):
                    raise Refusal("an element is not of the type that the standard gives it")
                flat.add_new(tag, element.VR, copy.copy(element.value))
            except Refusal:
                raise
            except Exception:
                if int(tag) in self._needed:
                    raise Refusal("an element that is needed cannot be read") from None
                found[tag] = _Done(tag, removed=Counter(["a number that cannot be read was removed"]))
        return flat

    def _run(self, flat: Dataset, transforms: Transforms) -> Dataset:
        def function(name: str) -> Any:
            def call(item: Any, value: Any, field: Any, dicom: Any) -> str:
                return transforms.apply(f"func:{name}", field.element.VR, field.element.value)

            return call

        present = frozenset(element.keyword for element in flat)
        self._start()
        from deid_tools import engine

        try:
            with engine.listening() as said:
                parser = engine.Parser(flat, recipe=self._for(present), force=False, disable_skip=True)
                for rule in {*self.replaced.values()}:
                    kind, _, name = rule.partition(":")
                    parser.define(name, transforms.pseudonym if kind == "var" else function(name))
                parser.parse()
        except (Exception, SystemExit):
            raise Refusal(f"{_FAILED} (the engine failed)") from None
        finally:
            engine.forget()  # else the engine keeps every header it ever saw in memory
        if said.getvalue().strip():
            raise Refusal(f"{_FAILED} (the engine warned)")
        return parser.dicom

    def _start(self) -> None:
        """Import the engine and let it read the recipe, when the first header comes.

        Raises:
            ConfigError: The engine reads the recipe differently.
        """
        if self._recipe is not None:
            return
        from deid_tools import engine

        with engine.listening() as said:
            recipe = engine.read_recipe(self.recipe.text)
        _check_same(recipe, self.recipe, said.getvalue())
        self._recipe = recipe

    def _for(self, present: frozenset[str]) -> Any:
        """Return the engine's recipe without the lines for attributes that this kind of header does not have."""
        if present not in self._engine_recipes:
            if len(self._engine_recipes) > 256:
                self._engine_recipes.clear()
            part = copy.copy(self._recipe)
            header = [a for a in self._recipe.deid["header"] if a["field"] in present or a["field"] == "ALL"]
            part.deid = {**self._recipe.deid, "header": header}
            self._engine_recipes[present] = part
        return self._engine_recipes[present]

    def _take(self, element: Any, originals: dict[str, Any], transforms: Transforms, result: Dataset) -> None:
        keyword = element.keyword
        if keyword in self.replaced:
            self._take_replaced(element, originals.get(keyword), transforms, result)
        elif keyword not in self.kept:
            raise Refusal("the engine left an element in place that is not on the allow-list")
        elif element.VR in NUMBERS:
            if not _take_number(element, result):
                transforms.removed["a number that may be a date or an identifier was removed"] += 1
        elif element.VR == "CS":
            _take_terms(element, result)
        elif keyword == "SOPClassUID" and str(element.value) in ADMITTED:
            result.SOPClassUID = element.value
        elif keyword == "RescaleType":
            if str(element.value) in TERMS[keyword]:
                result.add_new(element.tag, element.VR, str(element.value))
        else:
            raise Refusal("an element is not of the type that the standard gives it")

    def _take_replaced(self, element: Any, original: Any, transforms: Transforms, result: Dataset) -> None:
        rule = self.replaced[element.keyword]
        if not as_text(original):
            return
        expected = transforms.apply(rule, element.VR, original, count=True)
        if as_text(element.value) != expected:
            raise Refusal("the engine left an identifier in place")
        if expected:
            result.add_new(element.tag, element.VR, expected.split("\\") if "\\" in expected else expected)
            if rule in ("func:shift", "func:age", "func:age_band", "func:clean_text"):
                self.wrote.update(_traces(element.VR, expected))


def _as_stored(element: Any) -> tuple[Any, ...]:
    """Return all that an element's value depends on, beside the character set and whether pixels have a sign."""
    if hasattr(element, "is_implicit_VR"):
        return element.tag, element.VR, element.value, element.is_implicit_VR, element.is_little_endian
    return element.tag, element.VR, as_text(element.value)


def _traces(vr: str, text: str) -> set[str]:
    """Return which parts of a new value may also stand in the original: words, times, zones, years; no whole date."""
    if vr == "DA":
        values = text.split("\\")
        return {end for value in values for end in (value, *value.split("-")) if not re.search(r"\d{8}", end)}
    if vr == "DT":
        return {part for value in text.split("\\") for part in re.findall(r"(?<=\.)\d+", value)}
    return {text, *text.split("\\"), *re.findall(r"\w+", text)}


def _take_number(element: Any, result: Dataset) -> bool:
    """Take a number over; False if it was left out for what it may say."""
    try:
        values = [] if element.value is None else element.value if element.VM > 1 else [element.value]
        finite = all(abs(float(v)) < LARGEST for v in values)
    except (TypeError, ValueError):
        raise Refusal("a numeric element does not hold a number") from None
    if not finite:
        raise Refusal("a numeric element holds a value out of range")
    if values and not may_stay(element):
        return False
    if values:
        result.add_new(element.tag, element.VR, within_length(element.VR, element.value))
    return True


def _take_terms(element: Any, result: Dataset) -> None:
    allowed = TERMS.get(element.keyword, frozenset())
    values = element.value if element.VM > 1 else [element.value] if element.value else []
    if element.keyword == "ImageType":
        terms = [str(v) if str(v) in allowed else "NONE" for v in values][:4]
    else:
        terms = [str(v) for v in values if str(v) in allowed]
    if terms:
        result.add_new(element.tag, "CS", terms)


def _tags_of(keywords: set[str]) -> frozenset[int]:
    from pydicom.datadict import tag_for_keyword

    return frozenset(tag for tag in map(tag_for_keyword, keywords) if tag is not None)


def _check_same(engine: Any, recipe: Recipe, said: str) -> None:
    """Raise ConfigError unless the engine read from the recipe what we read."""
    actions = [(a["action"], a["field"], str(a.get("value") or "")) for a in engine.get_actions() or []]
    ours = {("REMOVE", "ALL", ""), *(("KEEP", k, "") for k in recipe.kept)}
    ours |= {("REPLACE", k, value) for k, value in recipe.replaced.items()}
    if said.strip() or set(actions) != ours or len(actions) != len(ours):
        raise ConfigError("The de-identification recipe is not safe: the engine reads it differently.")
