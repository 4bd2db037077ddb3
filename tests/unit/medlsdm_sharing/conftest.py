import json
from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import ndimage

from medlsdm.config import load_preset
from medlsdm.model_card import ModelCard
from medlsdm.types import (
    SYNTHESIS_SEAL,
    Geometry,
    LabelClass,
    LabelSchema,
    Modality,
    Provenance,
    Scan,
    SemanticMap,
    SyntheticVolume,
)

SHAPE = (26, 28, 24)
SCHEMA = LabelSchema("test", (LabelClass(0, "background"), LabelClass(1, "dark"), LabelClass(2, "bright")))
GEOMETRY = Geometry(np.array([[-1.0, 0.1, 0, 31.7], [0.1, -1.0, 0, 12.3], [0, 0, 1.2, -88.1], [0, 0, 0, 1]]), SHAPE)


def texture(seed: int) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 1.8)
    return (noise / noise.std()).astype(np.float32)


def semantic(seed: int) -> SemanticMap:
    return SemanticMap(np.digitize(texture(seed), [-0.5, 0.5]).astype(np.uint8), GEOMETRY, SCHEMA)


def painted(labels: SemanticMap, seed: int) -> np.ndarray:
    return (100 * ndimage.gaussian_filter(labels.array.astype(np.float32), 0.7) + 30 * texture(seed)).astype(np.float32)


def reference_pairs(count: int = 12, modality: Modality = Modality.MR) -> Iterator[tuple[Scan, SemanticMap]]:
    for n in range(count):
        labels = semantic(n)
        yield Scan(painted(labels, n + 1000), GEOMETRY, modality, f"p{n}"), labels


def synthetic(
    labels: SemanticMap, array: np.ndarray, *, modality: Modality = Modality.MR, card: str = "c" * 64, seed: int = 5
) -> SyntheticVolume:
    origin = Provenance("k" * 64, card, labels.digest, seed)
    return SyntheticVolume(array.astype(np.float32), labels.geometry, modality, origin, seal=SYNTHESIS_SEAL)


def batch(count: int, card: str = "c" * 64) -> tuple[list[SyntheticVolume], list[SemanticMap]]:
    labels = [semantic(n + 50) for n in range(count)]
    return [synthetic(m, painted(m, 2000 + n), card=card, seed=n) for n, m in enumerate(labels)], labels


@pytest.fixture(scope="session")
def card() -> ModelCard:
    return ModelCard.model_validate(
        {
            "model_id": "test",
            "preset": load_preset("tiny").model_dump(mode="json"),
            "label_schema": SCHEMA.to_json(),
            "modalities": ["MR"],
            "config_digest": "d" * 64,
            "files": {},
            "created": "2026-01-01T00:00:00+00:00",
        }
    )


@pytest.fixture(scope="session")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def keys_of(value: object) -> set[str]:
    """Collect every key of nested JSON."""
    if isinstance(value, dict):
        return set(value) | {k for v in value.values() for k in keys_of(v)}
    return {k for v in value for k in keys_of(v)} if isinstance(value, list) else set()


def as_json(content: bytes) -> dict:
    return json.loads(content)
