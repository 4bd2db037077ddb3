"""Turn PET values into SUV by body weight while dose, weight and times are still at hand.

The result is a rescale slope in g/ml: nothing of dose, weight or time is kept.
Source: QIBA FDG-PET/CT, vendor-neutral pseudo-code for SUV (DAC, 2018-06-26); PS3.3 C.8.9.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from medlsdm.errors import DataError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PHILIPS = "Philips PET Private Group"
_GE = "GEMS_PETD_01"
_HINT = "Export the series as SUV by body weight (g/ml)."
_MAX_DELAY = timedelta(hours=24)


def to_suv(source: Dataset, clean: Dataset) -> str:
    """Rescale a de-identified PET image to SUV by body weight, from what the original header says.

    Args:
        source: The image as the hospital has it.
        clean: The same image, de-identified; its rescale, Units and SUVType are changed.

    Returns:
        Why that is not possible, in words, or an empty string.
    """
    from pydicom.valuerep import format_number_as_ds

    try:
        factor = suv_factor(source)
    except DataError as error:
        return error.message
    if factor != 1.0:
        clean.RescaleSlope = format_number_as_ds(float(source.get("RescaleSlope", None) or 1) * factor)
        clean.RescaleIntercept = format_number_as_ds(float(source.get("RescaleIntercept", None) or 0) * factor)
    clean.Units, clean.SUVType = "GML", "BW"
    return ""


def suv_factor(ds: Dataset) -> float:
    """Return what multiplies a PET image's rescaled values to give SUV by body weight, in g/ml.

    Raises:
        DataError: Units, correction, weight, dose, half-life or times are missing or cannot be.
    """
    units = str(ds.get("Units", "") or "")
    if units == "GML":
        if str(ds.get("SUVType", None) or "BW") != "BW":
            raise DataError("The PET values are SUV, but not by body weight.", _HINT)
        return 1.0
    if units == "CNTS":
        factor = _philips(ds, 0x00)
        if factor:
            return factor
        activity = _philips(ds, 0x09)
        if not activity:
            raise DataError("The PET values are counts, and no scale factor to activity is in the header.", _HINT)
        return activity * _from_activity(ds)
    if units == "BQML":
        return _from_activity(ds)
    raise DataError("The PET values are neither SUV, activity nor counts.", _HINT)


def _from_activity(ds: Dataset) -> float:
    """Return SUV for 1 Bq/ml: body weight in grams over the dose that is left when values are stated."""
    corrected = {str(v) for v in _list(ds.get("CorrectedImage", None))}
    if not {"ATTN", "DECY"} <= corrected:
        raise DataError("The PET values are not corrected for attenuation and decay.", _HINT)
    items = ds.get("RadiopharmaceuticalInformationSequence", None) or []
    if len(items) != 1:
        raise DataError("The PET header does not state one radiopharmaceutical.", _HINT)
    weight = _positive(ds, "PatientWeight", "the patient's weight")
    dose = _positive(items[0], "RadionuclideTotalDose", "the injected dose")
    half_life = _positive(items[0], "RadionuclideHalfLife", "the half-life")
    if weight > 500 or not 1e5 <= dose <= 1e10:
        raise DataError("The patient's weight or the injected dose in the PET header cannot be.", _HINT)
    reference = str(ds.get("DecayCorrection", "") or "")
    if reference == "ADMIN":
        return weight * 1000 / dose
    if reference != "START":
        raise DataError("The PET header does not say to which time decay is corrected.", _HINT)
    scan = _scan_start(ds, half_life)
    delay = scan - _injected(items[0], scan)
    if not timedelta(0) <= delay <= _MAX_DELAY:
        raise DataError("The injection is not within the day before the PET scan.", _HINT)
    return weight * 1000 / (dose * 2 ** (-delay.total_seconds() / half_life))


def _scan_start(ds: Dataset, half_life: float) -> datetime:
    """Return the moment to which START decay correction refers."""
    acquired = _moment(ds, "AcquisitionDate", "AcquisitionTime")
    try:
        series = _moment(ds, "SeriesDate", "SeriesTime")
    except DataError:
        series = None
    if series is not None and series <= acquired:
        return series
    stated = _private(ds, 0x0009, _GE, 0x0D)
    if stated:
        return _parse(str(stated))
    offset, duration = ds.get("FrameReferenceTime", None), ds.get("ActualFrameDuration", None)
    if not offset or not duration or float(offset) <= 0 or float(duration) <= 0:
        raise DataError("The start of the PET scan cannot be told from its header.", _HINT)
    decay = math.log(2) / half_life
    within = decay * float(duration) / 1000
    mean = math.log(within / -math.expm1(-within)) / decay
    return acquired - timedelta(seconds=float(offset) / 1000 - mean)


def _injected(item: Dataset, scan: datetime) -> datetime:
    stated = str(item.get("RadiopharmaceuticalStartDateTime", "") or "")
    if stated:
        return _parse(stated)
    time = str(item.get("RadiopharmaceuticalStartTime", "") or "")
    if not time:
        raise DataError("The PET header does not state when the dose was injected.", _HINT)
    injected = _parse(scan.strftime("%Y%m%d") + time)
    return injected if injected <= scan else injected - timedelta(days=1)


def _moment(ds: Dataset, date: str, time: str) -> datetime:
    day, hour = str(ds.get(date, "") or ""), str(ds.get(time, "") or "")
    if not day or not hour:
        raise DataError("The PET header does not state when the scan was taken.", _HINT)
    return _parse(day + hour)


def _parse(text: str) -> datetime:
    """Read YYYYMMDDHHMMSS with or without a fraction; an offset from UTC is left out, all times being local."""
    digits, _, fraction = text.split("+")[0].split("-")[0].strip().partition(".")
    try:
        if len(digits) != 14:
            raise ValueError
        return datetime.strptime(digits, "%Y%m%d%H%M%S") + timedelta(seconds=float(f"0.{fraction or 0}"))
    except ValueError:
        raise DataError("A time in the PET header cannot be read.", _HINT) from None


def _positive(ds: Dataset, keyword: str, name: str) -> float:
    try:
        value = float(ds.get(keyword, None) or 0)
    except (TypeError, ValueError):
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"The PET header does not state {name}.", _HINT)
    return value


def _philips(ds: Dataset, element: int) -> float:
    value: Any = _private(ds, 0x7053, _PHILIPS, element)
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


def _private(ds: Dataset, group: int, creator: str, element: int) -> Any:
    """Return a private value, decoded where the file gives it as bytes (implicit VR)."""
    try:
        value = ds.private_block(group, creator)[element].value
    except KeyError:
        return None
    return value.decode("ascii", "replace").strip(" \0") if isinstance(value, bytes) else value


def _list(value: Any) -> list[Any]:
    return [] if value is None or value == "" else [value] if isinstance(value, str) else list(value)
