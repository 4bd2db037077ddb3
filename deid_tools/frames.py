"""Rebuild the nested sequences that a valid object needs: geometry, frames, references, segments.

The header engine never sees a sequence. What is needed is copied here, item by item, from a tree of
keywords: numbers and the standard's terms as they are, UIDs under the site's key, codes with the
meaning that the dictionary gives them, moments made a dummy. No free text passes, and what the
tree does not name stays behind, at every depth.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from deid_tools.admit import Refusal
from deid_tools.keys import SiteKeys
from deid_tools.nested import clean_segment, code_meaning, code_of, coded
from deid_tools.numbers import may_stay, within_length
from deid_tools.recipes import NUMBERS
from deid_tools.terms import FRAME_TERMS, TERMS
from deid_tools.transforms import as_text
from deid_tools.uids import new_uid
from medlsdm.types import LabelSchema

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Tree = dict[str, "Tree | None"]
NOT_STATED = "not stated"
DUMMY_MOMENT = "19000101000000"
_STACK = re.compile(r"\d{1,4}")


def _leaves(text: str) -> Tree:
    return dict.fromkeys(text.split())


_INSTANCE = _leaves("ReferencedSOPClassUID ReferencedSOPInstanceUID ReferencedFrameNumber")
_FRAME: Tree = {
    "PixelMeasuresSequence": _leaves("PixelSpacing SliceThickness SpacingBetweenSlices"),
    "PlaneOrientationSequence": _leaves("ImageOrientationPatient"),
    "PlanePositionSequence": _leaves("ImagePositionPatient"),
    "FrameContentSequence": _leaves(
        "DimensionIndexValues StackID InStackPositionNumber TemporalPositionIndex FrameAcquisitionNumber "
        "FrameReferenceDateTime FrameAcquisitionDateTime FrameAcquisitionDuration"
    ),
    "PixelValueTransformationSequence": _leaves("RescaleSlope RescaleIntercept RescaleType"),
    "FrameVOILUTSequence": _leaves("WindowCenter WindowWidth"),
    "FrameAnatomySequence": {"FrameLaterality": None, "AnatomicRegionSequence": {}},
    "MREchoSequence": _leaves("EffectiveEchoTime"),
    "MRDiffusionSequence": _leaves("DiffusionBValue DiffusionDirectionality"),
    "MRImageFrameTypeSequence": _leaves(
        "FrameType PixelPresentation VolumetricProperties VolumeBasedCalculationTechnique ComplexImageComponent "
        "AcquisitionContrast"
    ),
    "CTImageFrameTypeSequence": _leaves("FrameType"),
    "PETFrameTypeSequence": _leaves("FrameType"),
    "MRTimingAndRelatedParametersSequence": {
        **_leaves(
            "RepetitionTime FlipAngle EchoTrainLength RFEchoTrainLength GradientEchoTrainLength GradientOutputType "
            "GradientOutput"
        ),
        "SpecificAbsorptionRateSequence": _leaves("SpecificAbsorptionRateDefinition SpecificAbsorptionRateValue"),
        "OperatingModeSequence": _leaves("OperatingModeType OperatingMode"),
    },
    "MRModifierSequence": _leaves(
        "InversionRecovery InversionTimes FlowCompensation FlowCompensationDirection Spoiling T2Preparation "
        "SpectrallySelectedExcitation SpatialPresaturation PartialFourier PartialFourierDirection ParallelAcquisition "
        "ParallelAcquisitionTechnique ParallelReductionFactorInPlane ParallelReductionFactorOutOfPlane "
        "ParallelReductionFactorSecondInPlane"
    ),
    "MRImagingModifierSequence": _leaves(
        "MagnetizationTransfer BloodSignalNulling Tagging TransmitterFrequency PixelBandwidth"
    ),
    "MRReceiveCoilSequence": {
        **_leaves("ReceiveCoilName ReceiveCoilManufacturerName ReceiveCoilType QuadratureReceiveCoil"),
        "MultiCoilDefinitionSequence": _leaves("MultiCoilElementName MultiCoilElementUsed"),
    },
    "MRTransmitCoilSequence": _leaves("TransmitCoilName TransmitCoilManufacturerName TransmitCoilType"),
    "MRAveragesSequence": _leaves("NumberOfAverages"),
    "MRFOVGeometrySequence": _leaves(
        "InPlanePhaseEncodingDirection MRAcquisitionFrequencyEncodingSteps MRAcquisitionPhaseEncodingStepsInPlane "
        "MRAcquisitionPhaseEncodingStepsOutOfPlane PercentSampling PercentPhaseFieldOfView"
    ),
    "SegmentIdentificationSequence": _leaves("ReferencedSegmentNumber"),
}
TREE: Tree = {
    "SharedFunctionalGroupsSequence": _FRAME,
    "PerFrameFunctionalGroupsSequence": _FRAME,
    "DimensionOrganizationSequence": _leaves("DimensionOrganizationUID"),
    "DimensionIndexSequence": _leaves("DimensionOrganizationUID DimensionIndexPointer FunctionalGroupPointer"),
}
_SERIES: Tree = {
    "SeriesInstanceUID": None,
    "ReferencedInstanceSequence": _leaves("ReferencedSOPClassUID ReferencedSOPInstanceUID"),
}
_SEG_FRAME: Tree = {
    **_FRAME,
    "DerivationImageSequence": {
        "DerivationCodeSequence": {},
        "SourceImageSequence": {**_INSTANCE, "PurposeOfReferenceCodeSequence": {}},
    },
}
_SEG_TREE: Tree = {
    **TREE,
    "SharedFunctionalGroupsSequence": _SEG_FRAME,
    "PerFrameFunctionalGroupsSequence": _SEG_FRAME,
    "ReferencedSeriesSequence": _SERIES,
}
_ENHANCED_MR: Tree = _leaves(
    "AcquisitionDateTime AcquisitionDuration ContentQualification ResonantNucleus KSpaceFiltering "
    "ApplicableSafetyStandardAgency MagneticFieldStrength PixelPresentation VolumetricProperties "
    "VolumeBasedCalculationTechnique ComplexImageComponent AcquisitionContrast PresentationLUTShape "
    "BurnedInAnnotation PulseSequenceName EchoPulseSequence MultipleSpinEcho MultiPlanarExcitation PhaseContrast "
    "TimeOfFlightContrast SteadyStatePulseSequence EchoPlanarPulseSequence SaturationRecovery "
    "SpectrallySelectedSuppression OversamplingPhase GeometryOfKSpaceTraversal RectilinearPhaseEncodeReordering "
    "SegmentedKSpaceTraversal CoverageOfKSpace NumberOfKSpaceTrajectories MRAcquisitionType"
)
_REFERENCES: Tree = {
    "ReferencedImageSequence": _INSTANCE,
    "SourceImageSequence": _INSTANCE,
    "ReferencedSeriesSequence": _SERIES,
}
_ENHANCED_MR_CLASSES = ("1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")


def rebuild(
    source: Dataset,
    target: Dataset,
    keys: SiteKeys,
    schema: LabelSchema | None,
    *,
    multiframe: bool,
) -> None:
    """Add to ``target`` the frames and references of a multi-frame ``source``, and its segments if it has any.

    Args:
        source: The original.
        target: What has been kept so far.
        keys: The site's keys.
        schema: The label schema that may name segments.
        multiframe: Whether there is anything to rebuild.

    Raises:
        Refusal: A value is not of its kind, or a segment cannot be named without free text.
    """
    if not multiframe:
        return
    copier = _Copier(keys)
    copier.copy(source, target, _SEG_TREE if "SegmentSequence" in source else TREE)
    if str(source.SOPClassUID) in _ENHANCED_MR_CLASSES:
        copier.copy(source, target, {k: v for k, v in _ENHANCED_MR.items() if k not in target})
    if "SegmentSequence" in source:
        target.SegmentSequence = [clean_segment(item, schema) for item in source.SegmentSequence]


def references(source: Dataset, target: Dataset, keys: SiteKeys) -> None:
    """Add the references to other objects, their UIDs under the site's key, so that they still resolve."""
    wanted = {k: below for k, below in _REFERENCES.items() if k not in target}
    _Copier(keys).copy(source, target, wanted)
    for keyword in wanted:
        items = [i for i in target.get(keyword, None) or () if len(i)]
        if keyword in target and not items:
            del target[keyword]


class _Copier:
    def __init__(self, keys: SiteKeys) -> None:
        self._keys = keys

    def copy(self, source: Dataset, target: Dataset, tree: Tree) -> None:
        from pydicom.dataset import Dataset
        from pydicom.sequence import Sequence

        for keyword, below in tree.items():
            if keyword not in source:
                continue
            element = source[keyword]
            if below == {}:
                _take_code(source, target, keyword)
            elif below is not None:
                items = []
                for item in element.value:
                    items.append(Dataset())
                    self.copy(item, items[-1], below)
                if keyword == "SpecificAbsorptionRateSequence":  # a maker's own definition is no term of the standard
                    items = [item for item in items if "SpecificAbsorptionRateDefinition" in item]
                setattr(target, keyword, Sequence(items))
            else:
                self._leaf(element, target)
        if "InStackPositionNumber" in target and "StackID" not in target:
            del target.InStackPositionNumber

    def _leaf(self, element: Any, target: Dataset) -> None:
        keyword, value = element.keyword, element.value
        if element.VR == "UI":
            setattr(target, keyword, "\\".join(new_uid(self._keys, uid) for uid in as_text(value).split("\\")))
        elif element.VR in NUMBERS:
            if may_stay(element):
                setattr(target, keyword, within_length(element.VR, value))
        elif element.VR == "AT":
            if _is_listed(value):
                setattr(target, keyword, value)
        elif element.VR == "CS":
            _take_terms(element, target)
        elif element.VR == "DT":
            setattr(target, keyword, DUMMY_MOMENT)
        elif keyword == "StackID":
            if _STACK.fullmatch(str(value)):
                target.StackID = value
        elif keyword == "RescaleType":
            target.RescaleType = value if str(value) in TERMS[keyword] else "US"
        elif element.VR in ("SH", "LO"):
            setattr(target, keyword, NOT_STATED)
        else:
            raise Refusal("a nested value is not of the type that the standard gives it")


def _is_listed(pointer: Any) -> bool:
    """Tell whether a pointer names one attribute, of the dictionary or a maker's: else its four bytes may be a text."""
    from pydicom.datadict import dictionary_has_tag

    return isinstance(pointer, int) and (dictionary_has_tag(pointer) or (pointer >> 16) % 2 == 1)


def _take_terms(element: Any, target: Dataset) -> None:
    values = element.value if element.VM > 1 else [element.value] if element.value else []
    known = FRAME_TERMS | TERMS["ImageType"]
    if element.keyword == "FrameType":
        target.FrameType = [str(v) if str(v) in known else "NONE" for v in values][:4]
    elif values and all(str(v) in known for v in values):
        setattr(target, element.keyword, [str(v) for v in values])


def _take_code(source: Dataset, target: Dataset, keyword: str) -> None:
    value, scheme = code_of(source, keyword)
    meaning = code_meaning(value, scheme) if value else ""
    if meaning:
        setattr(target, keyword, [coded(value, scheme, meaning)])


REFERENCES = frozenset(_REFERENCES)
NESTED_UIDS = frozenset({"DimensionOrganizationUID", "ReferencedSOPInstanceUID"})
NESTED_DATES = frozenset({"FrameReferenceDateTime", "FrameAcquisitionDateTime", "AcquisitionDateTime"})
"""What functional groups and references hold, under new UIDs, and as dummy moments."""
