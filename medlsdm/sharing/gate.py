"""The export gate: judge a batch of synthetic volumes against the site's own patients, and say why not.

Each batch is checked for copies of patients, sane intensities and adherence to its label maps, with
copies planted on purpose to measure what the copy check misses. Blocked volumes are dropped and
counted, never made again until they pass: that would hide memorisation.

Limits: those of ``medlsdm.privacy.audit``. In particular, a volume made from a training patient's
own label map shares that patient's shape by design; the copy check takes out what the map explains
by its label means and judges the rest, so a copy of the *shape* is neither caught nor meant to be.
Whoever exports such pairs exports real anatomy.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from medlsdm.errors import DataError, GateError, NotSyntheticError
from medlsdm.privacy.audit import CopyDetector, CopyVerdict, PlantResult, plant_recall
from medlsdm.sharing.gate_policy import GatePolicy
from medlsdm.sharing.sanity import RealRange, intensity_faults, label_faults
from medlsdm.types import Scan, SemanticMap, SyntheticVolume

log = logging.getLogger(__name__)

COPY = "it is too close to one of the site's patients"
_LABELS = "it does not follow its labels"

References = Callable[[], Iterator[tuple[Scan, SemanticMap]]]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VolumeVerdict(_Frozen):
    """Judge one volume, named by the digest of its content. The distances stay on the node."""

    volume_digest: str
    passed: bool
    reasons: tuple[str, ...]
    similarity: float | None
    gap: float | None


class AuditReport(_Frozen):
    """Judge a batch: a verdict for each volume, how the plants fared, and whether anything may leave."""

    policy: GatePolicy
    verdicts: tuple[VolumeVerdict, ...]
    planted: int
    caught: int
    recall_bound: float
    kinds: dict[str, tuple[int, int]]
    refusal: str | None

    @property
    def made(self) -> int:
        """Return how many volumes were judged."""
        return len(self.verdicts)

    @property
    def passed(self) -> int:
        """Return how many volumes may leave, were the batch not refused as a whole."""
        return sum(v.passed for v in self.verdicts)

    @property
    def blocked(self) -> int:
        """Return how many volumes were blocked."""
        return self.made - self.passed

    @property
    def reasons(self) -> dict[str, int]:
        """Count the reasons for blocking, in words without values."""
        return dict(Counter(reason for v in self.verdicts for reason in v.reasons))

    def raise_if_refused(self) -> Self:
        """Raise GateError with the reason if the whole batch is refused; else return the report."""
        if self.refusal:
            raise GateError(
                self.refusal, "Nothing was written. Train on more patients, or for fewer steps, and synthesise again."
            )
        return self

    def to_public_json(self) -> dict[str, Any]:
        """Return what may leave with the volumes: counts, words and plant recall, no distance.

        The distance to the nearest private patient is itself a release; so is the number of patients.
        """
        words = Counter(_LABELS if r.startswith(_LABELS) else r for v in self.verdicts for r in v.reasons)
        return {
            "made": self.made,
            "passed": self.passed,
            "blocked": self.blocked,
            "reasons": dict(sorted(words.items())),
            "plants": {
                "planted": self.planted,
                "caught": self.caught,
                "recall_lower_bound_95": round(self.recall_bound, 3),
            },
            "policy": self.policy.model_dump(),
            "refused": self.refusal is not None,
            "statement": "A copy check with a measured recall on planted copies. No formal privacy guarantee.",
        }

    def to_local_json(self) -> dict[str, Any]:
        """Return everything, distances included. For the node's own audit log; never leaves the site."""
        return {**self.to_public_json(), "refusal": self.refusal, **self.model_dump(mode="json")}


def volume_digest(volume: SyntheticVolume) -> str:
    """Return the SHA-256 of a volume's voxels, grid and provenance: what ties a verdict to it."""
    p = volume.provenance
    facts = [volume.geometry.shape, volume.modality, p.checkpoint_digest, p.card_digest, p.labels_digest, p.seed]
    sha = hashlib.sha256(json.dumps(facts).encode())
    sha.update(np.round(volume.geometry.affine, 4).astype("<f8").tobytes())
    sha.update(np.ascontiguousarray(volume.array, dtype="<f4").tobytes())
    return sha.hexdigest()


def check_synthetic(volumes: Sequence[SyntheticVolume], labels: Sequence[SemanticMap]) -> None:
    """Refuse anything but exactly SyntheticVolume, each with its own SemanticMap.

    Raises:
        NotSyntheticError: An item is of another type, a subclass included.
        DataError: The label maps are not as many as the volumes.
    """
    for number, volume in enumerate(volumes, 1):
        if type(volume) is not SyntheticVolume:
            raise NotSyntheticError(
                f"Item {number} of the export is a {type(volume).__name__}, not a SyntheticVolume.",
                "Only what synthesis made can leave the node.",
            )
    if len(volumes) != len(labels) or any(type(m) is not SemanticMap for m in labels):
        raise DataError("Each synthetic volume needs the label map that it was made from.", "Give as many maps.")


def audit(
    volumes: Sequence[SyntheticVolume],
    labels: Sequence[SemanticMap],
    references: References,
    policy: GatePolicy | None = None,
    *,
    seed: int = 0,
) -> AuditReport:
    """Judge a batch of synthetic volumes against the site's training pairs.

    Args:
        volumes: What synthesis made.
        labels: The map each volume was made from.
        references: Opens a stream over the training pairs; it is called twice.
        policy: The site's policy.
        seed: Chooses the plants.

    Raises:
        NotSyntheticError: An item is not a SyntheticVolume.
        GateError: There are too few patients to judge by. A refused batch is a report, not an error.
    """
    policy = policy or GatePolicy()
    check_synthetic(volumes, labels)
    if not volumes:
        raise DataError("There is nothing to audit.", "Synthesise volumes first.")
    real, subjects = RealRange(), set[str]()

    def watched() -> Iterator[tuple[Scan, SemanticMap]]:
        for scan, semantic in real.watch(references(), policy.min_label_voxels):
            subjects.add(scan.subject)
            yield scan, semantic

    detector = CopyDetector.fit(watched())
    if len(subjects) < policy.min_patients:
        raise GateError("The site has too few patients for an export.", f"Its policy asks for {policy.min_patients}.")
    copies = _copy_verdicts(detector, volumes, labels)
    verdicts = tuple(
        _verdict(volume, semantic, copy, real, policy)
        for volume, semantic, copy in zip(volumes, labels, copies, strict=True)
    )
    plants = plant_recall(detector, references(), seed, planted=policy.plants)
    report = AuditReport(
        policy=policy,
        verdicts=verdicts,
        planted=plants.planted,
        caught=plants.caught,
        recall_bound=plants.recall_bound,
        kinds=dict(plants.kinds),
        refusal=_refusal(verdicts, plants, policy),
    )
    log.info("gate: %d of %d volumes passed, refused: %s", report.passed, report.made, report.refusal is not None)
    return report


def _copy_verdicts(
    detector: CopyDetector, volumes: Sequence[SyntheticVolume], labels: Sequence[SemanticMap]
) -> list[CopyVerdict | None]:
    """Return a copy verdict for each volume that can be compared at all, else None: it is blocked."""
    verdicts: list[CopyVerdict | None] = []
    for volume, semantic in zip(volumes, labels, strict=True):
        try:
            fits = volume.geometry.matches(semantic.geometry)
            found = detector.check(volume.array, volume.geometry, volume.modality, semantic.array) if fits else None
        except DataError:
            found = None
        verdicts.append(found)
    return verdicts


def _verdict(
    volume: SyntheticVolume, labels: SemanticMap, copy: CopyVerdict | None, real: RealRange, policy: GatePolicy
) -> VolumeVerdict:
    reasons = intensity_faults(volume.array, volume.modality, real)
    if labels.digest != volume.provenance.labels_digest or not volume.geometry.matches(labels.geometry):
        reasons.append("its label map is not the one it was made from")
    else:
        reasons += label_faults(volume.array, labels, volume.modality, real, policy.min_label_voxels, policy.label_room)
    if copy is None:
        reasons = reasons or ["it could not be compared with the site's patients"]
    elif copy.is_copy:
        reasons.append(COPY)
    return VolumeVerdict(
        volume_digest=volume_digest(volume),
        passed=not reasons,
        reasons=tuple(reasons),
        similarity=copy.similarity if copy else None,
        gap=copy.gap if copy else None,
    )


def _refusal(verdicts: Sequence[VolumeVerdict], plants: PlantResult, policy: GatePolicy) -> str | None:
    if plants.recall_bound < policy.min_plant_recall:
        return "The copy check missed too many of the copies that were planted to test it."
    blocked = sum(not v.passed for v in verdicts) / len(verdicts)
    if blocked > policy.max_blocked_fraction:
        return "Too many volumes were blocked: the model may have memorised patients or is not good enough."
    return None
