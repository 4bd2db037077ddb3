"""The terms that a code string may hold, by attribute: those that PS3.3 defines. Any other term is dropped."""

from __future__ import annotations


def _terms(text: str) -> frozenset[str]:
    return frozenset(text.split())


_YES_NO = _terms("YES NO")

COMPONENTS = _terms(
    "M P R I MAGNITUDE PHASE REAL IMAGINARY FIELD_MAP FIELDMAP B0 M_FFE M_SE M_IR P_FFE P_SE R_FFE I_FFE WATER FAT W F "
    "IP OP IN_PHASE OUT_PHASE ADC FA TRACEW T1_MAP T2_MAP T2_STAR_MAP R2_STAR_MAP"
)
"""ImageType terms that name another kind of value on the same slices (PS3.3 C.7.6.1.1.2 and vendors' use)."""

TERMS: dict[str, frozenset[str]] = {
    "Modality": _terms("CT MR PT SEG"),
    "ImageType": _terms(
        "ORIGINAL DERIVED PRIMARY SECONDARY AXIAL M M_FFE NONE NORM DIS2D DIS3D ADD VOLUME MIXED T1 T2 "
        "PROTON_DENSITY DIFFUSION FFE SE"
    )
    | COMPONENTS,
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
    "PatientSex": _terms("M F O"),
    "PatientSexNeutered": _terms("ALTERED UNALTERED"),
    "SmokingStatus": _terms("YES NO UNKNOWN"),
    "Laterality": _terms("R L"),
    "ImageLaterality": _terms("R L U B"),
    "AnatomicalOrientationType": _terms("BIPED QUADRUPED"),
    "BodyPartExamined": _terms(
        "ABDOMEN ABDOMENPELVIS ANKLE ARM BLADDER BRAIN BREAST CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE ELBOW "
        "EXTREMITY FOOT FOREARM HAND HEAD HEADNECK HEART HIP HUMERUS IAC JAW KIDNEY KNEE LEG LIVER LSPINE LUNG "
        "NECK ORBIT PANCREAS PELVIS PROSTATE SHOULDER SKULL SPINE SSPINE THIGH TLSPINE TSPINE WHOLEBODY WRIST"
    ),
    "RotationDirection": _terms("CW CC"),
    "ExposureModulationType": _terms("NONE"),
    "ContrastBolusIngredient": _terms("IODINE GADOLINIUM BARIUM XENON") | {"CARBON DIOXIDE"},
    "InPlanePhaseEncodingDirection": _terms("ROW COL COLUMN"),
    "VariableFlipAngleFlag": _terms("Y N"),
    "AngioFlag": _terms("Y N"),
    "BeatRejectionFlag": _terms("Y N"),
    "CountsSource": _terms("EMISSION TRANSMISSION"),
    "SeriesType": _terms("STATIC DYNAMIC GATED IMAGE REPROJECTION") | {"WHOLE BODY"},
    "RandomsCorrectionMethod": _terms("NONE DLYD SING"),
    "AttenuationCorrected": _YES_NO,
    "DecayCorrected": _YES_NO,
    "DeadTimeCorrected": _YES_NO,
    "ScatterCorrected": _YES_NO,
    "CollimatorType": _terms("NONE RING"),
    "SecondaryCountsType": _terms("DLYD SCAT SING DTIM"),
    "VOILUTFunction": _terms("LINEAR LINEAR_EXACT SIGMOID"),
    "PresentationLUTShape": _terms("IDENTITY"),
    "LossyImageCompressionMethod": _terms("ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_13818_2 ISO_14496_10"),
    "QualityControlImage": _terms("YES NO BOTH"),
}

FRAME_TERMS = (
    _terms(
        "YES NO NONE UNKNOWN BOTH R L U B ORIGINAL DERIVED PRIMARY SECONDARY MIXED VOLUME SAMPLED DISTORTED COLOR "
        "MONOCHROME MAGNITUDE PHASE REAL IMAGINARY DIFFUSION FLOW_ENCODED FLUID_ATTENUATED PERFUSION "
        "PROTON_DENSITY STIR TAGGING TEMPERATURE T1 T2 T2_STAR TOF IDENTITY SPIN GRADIENT PARALLEL LINE_PARALLEL "
        "PLANE_PARALLEL HORIZONTAL VERTICAL RECTILINEAR RADIAL SPIRAL SINGLE PARTIAL FULL ELLIPSOIDAL SELECTIVE "
        "TIME_OF_FLIGHT FREE_PRECESSION TRANSVERSE LONGITUDINAL SPATIAL_SPECTRAL SPOILED SLAB SLICE FAT WATER "
        "FAT_AND_WATER SILICON_GEL BODY SURFACE EXTREMITY MULTICOIL RF RF_AND_GRADIENT ROW COLUMN OTHER FREQUENCY "
        "IEC FDA MHW NORMAL 1H 3HE 7LI 13C 19F 23NA 31P 129XE US HU RESEARCH PRODUCT SERVICE COSINE "
        "COSINE_SQUARED FERMI GAUSSIAN HAMMING HANNING LORENTZIAN LRNTZ_GSS_TRNSFM RIESZ TUKEY USER_DEFINED "
        "MAX_IP MIN_IP VOLUME_RENDER SURFACE_RENDER MPR CURVED_MPR ADDITION DIRECTIONAL ISOTROPIC IEC_WHOLE_BODY "
        "IEC_PARTIAL_BODY IEC_HEAD IEC_LOCAL DB_DT ELECTRIC_FIELD PER_NERVE_STIM IEC_NORMAL IEC_FIRST_LEVEL "
        "IEC_SECOND_LEVEL LINEAR CENTRIC SEGMENTED REVERSE_LINEAR REVERSE_CENTRIC CYLINDRICAL ELLIPTICAL WEDGE "
        "SMS PILS SENSE SMASH WHOLE_BODY STATIC STEADY_STATE TRANSVERSE_LONGITUDINAL 2D 3D"
    )
    | COMPONENTS
    | {"STATIC FIELD"}
)
"""What the code strings of multi-frame functional groups may hold (PS3.3 C.8.13, C.8.15, C.7.6.16)."""
