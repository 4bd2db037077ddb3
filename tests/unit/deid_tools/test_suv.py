from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from deid_tools.suv import suv_factor, to_suv
from medlsdm.errors import DataError

HALF_LIFE = 6586.2


def pet(**changes: object) -> Dataset:
    ds, dose = Dataset(), Dataset()
    dose.RadionuclideTotalDose, dose.RadionuclideHalfLife = 400e6, HALF_LIFE
    dose.RadiopharmaceuticalStartTime = "090000.00"
    ds.Units, ds.CorrectedImage, ds.DecayCorrection = "BQML", ["ATTN", "DECY", "SCAT"], "START"
    ds.PatientWeight, ds.RescaleSlope, ds.RescaleIntercept = 80, 2, 0
    ds.SeriesDate = ds.AcquisitionDate = "20200102"
    ds.SeriesTime, ds.AcquisitionTime = "100000", "101000"
    ds.FrameReferenceTime, ds.ActualFrameDuration = 600_000 + 90_000, 180_000
    ds.RadiopharmaceuticalInformationSequence = [dose]
    for keyword, value in changes.items():
        setattr(dose if keyword.startswith("Radio") else ds, keyword, value)
    return ds


def test_a_kilobecquerel_becomes_suv_by_hand():
    left = 400e6 * 0.5 ** (3600 / HALF_LIFE)
    assert suv_factor(pet()) == pytest.approx(80_000 / left)
    assert suv_factor(pet(DecayCorrection="ADMIN")) == pytest.approx(80_000 / 400e6)


def test_the_scan_start_comes_from_the_frame_where_the_series_time_is_later():
    assert suv_factor(pet(SeriesTime="180000")) == pytest.approx(suv_factor(pet()), rel=1e-3)
    with pytest.raises(DataError, match="start of the PET scan"):
        suv_factor(pet(SeriesTime="180000", FrameReferenceTime=0))


def test_ge_states_the_scan_start_in_a_private_element():
    ds = pet(SeriesTime="180000", FrameReferenceTime=0)
    ds.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20200102100000.00")
    assert suv_factor(ds) == pytest.approx(suv_factor(pet()))


def test_an_injection_before_midnight_counts():
    late = pet(SeriesTime="003000", AcquisitionTime="003500", RadiopharmaceuticalStartTime="233000")
    assert suv_factor(late) == pytest.approx(suv_factor(pet()))
    dated = pet(RadiopharmaceuticalStartDateTime="20200102090000")
    assert suv_factor(dated) == pytest.approx(suv_factor(pet()))


def test_philips_counts_need_the_private_factor():
    ds = pet(Units="CNTS")
    with pytest.raises(DataError, match="no scale factor"):
        suv_factor(ds)
    block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x09, "DS", "3.0")
    assert suv_factor(ds) == pytest.approx(3 * suv_factor(pet()))
    block.add_new(0x00, "UN", b"0.0005 ")
    assert suv_factor(ds) == pytest.approx(0.0005)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("PatientWeight", None, "weight"),
        ("PatientWeight", 8000, "cannot be"),
        ("RadionuclideTotalDose", None, "dose"),
        ("RadionuclideTotalDose", 400, "cannot be"),  # MBq where Bq belong
        ("RadionuclideHalfLife", 0, "half-life"),
        ("RadiopharmaceuticalStartTime", "", "injected"),
        ("RadiopharmaceuticalStartTime", "9 am", "cannot be read"),
        ("RadiopharmaceuticalStartDateTime", "20191201090000", "day before"),
        ("DecayCorrection", "NONE", "decay is corrected"),
        ("CorrectedImage", ["ATTN"], "not corrected"),
        ("Units", "PROPCPS", "neither"),
        ("AcquisitionTime", "", "when the scan"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_missing_or_cannot_be_is_refused(keyword, value, reason):
    with pytest.raises(DataError, match=reason):
        suv_factor(pet(**{keyword: value}))


def test_the_clean_image_says_suv_and_keeps_nothing_else():
    clean = Dataset()
    clean.RescaleSlope, clean.RescaleIntercept, clean.Units = 2, 0, "BQML"
    assert to_suv(pet(), clean) == ""
    assert (clean.Units, clean.SUVType) == ("GML", "BW")
    assert float(clean.RescaleSlope) == pytest.approx(2 * suv_factor(pet()), rel=1e-9)
    untouched = Dataset()
    untouched.Units = "BQML"
    assert "weight" in to_suv(pet(PatientWeight=None), untouched)
    assert untouched.Units == "BQML"
    lean = pet(Units="GML", SUVType="LBM")
    assert "body weight" in to_suv(lean, untouched)
