"""Checkpoints: weights as safetensors with a model card, digests checked on the way in."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file as save_tensors_to
from torch import Tensor

from medlsdm.checks import file_digest, write_atomic, writing
from medlsdm.config import Preset
from medlsdm.errors import ConfigError, DataError, IntegrityError
from medlsdm.model_card import NO_GUARANTEE, ModelCard
from medlsdm.models.unet import SemanticUNet, build_denoiser
from medlsdm.models.vqgan import VQGAN, build_autoencoder
from medlsdm.types import LabelSchema, Modality

AUTOENCODER, DENOISER, CARD = "autoencoder.safetensors", "denoiser.safetensors", "card.json"
State = dict[str, Tensor]
Module = TypeVar("Module", VQGAN, SemanticUNet)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Checkpoint:
    """Hold the weights of both stages and their card; ``denoiser`` is None before stage 2."""

    preset: Preset
    schema: LabelSchema
    modalities: tuple[Modality, ...]
    autoencoder: State
    denoiser: State | None
    card: ModelCard

    def __repr__(self) -> str:
        return f"Checkpoint({self.card.model_id})"

    def build_autoencoder(self) -> VQGAN:
        """Return the trained VQ-GAN, ready to use.

        Raises:
            ConfigError: The weights are of another architecture or label schema.
        """
        model = build_autoencoder(self.preset, len(self.schema.classes))
        return _filled(model, self.autoencoder, "autoencoder")

    def build_denoiser(self) -> SemanticUNet:
        """Return the trained denoiser.

        Raises:
            DataError: Stage 2 has not been trained.
            ConfigError: The weights are of another architecture or label schema.
        """
        if self.denoiser is None:
            raise DataError("The checkpoint ends after stage 1.", "Train stage 2 before synthesising.")
        return _filled(build_denoiser(self.preset, len(self.schema.classes)), self.denoiser, "denoiser")


def _filled(model: Module, state: State, what: str) -> Module:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"The {what}'s weights do not fit the preset and label schema of their card.",
            "They were trained with another architecture or schema.",
        ) from error
    return model.eval()


def make_checkpoint(
    *,
    preset: Preset,
    schema: LabelSchema,
    modalities: Sequence[Modality],
    autoencoder: State,
    denoiser: State | None = None,
    model_id: str | None = None,
    rounds: int = 0,
    sites: Sequence[str] = (),
    steps: dict[str, int] | None = None,
    training_data: str = "Not stated.",
    privacy: str = NO_GUARANTEE,
) -> tuple[Checkpoint, dict[str, bytes]]:
    """Build a checkpoint and the bytes of its files, with their digests in the card."""
    states = _states(autoencoder, denoiser)
    contents = {name: save_tensors(_plain(state)) for name, state in states.items()}
    card = _card(
        {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        preset=preset, schema=schema, modalities=modalities, model_id=model_id, rounds=rounds, sites=sites,
        steps=steps, training_data=training_data, privacy=privacy,
    )  # fmt: skip
    checkpoint = Checkpoint(preset, schema, card.modalities, autoencoder, denoiser, card)
    return checkpoint, contents | {CARD: card.to_json_bytes(), "card.md": card.to_markdown().encode()}


def _states(autoencoder: State, denoiser: State | None) -> dict[str, State]:
    return {AUTOENCODER: autoencoder} | ({DENOISER: denoiser} if denoiser is not None else {})


def _plain(state: State) -> State:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _card(
    digests: dict[str, str], *, preset: Preset, schema: LabelSchema, modalities: Sequence[Modality],
    model_id: str | None, rounds: int, sites: Sequence[str], steps: dict[str, int] | None, training_data: str,
    privacy: str,
) -> ModelCard:  # fmt: skip
    return ModelCard(
        model_id=model_id or f"medlsdm-{preset.name}-{uuid.uuid4().hex[:8]}",
        preset=preset,
        label_schema=schema.agreed().to_json(),
        modalities=tuple(modalities),
        rounds=rounds,
        sites=tuple(sites),
        steps=steps or {},
        config_digest=preset.digest,
        files=digests,
        training_data=training_data,
        privacy=privacy,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def save_checkpoint(
    folder: Path,
    *,
    preset: Preset,
    schema: LabelSchema,
    modalities: Sequence[Modality],
    autoencoder: State,
    denoiser: State | None = None,
    model_id: str | None = None,
    rounds: int = 0,
    sites: Sequence[str] = (),
    steps: dict[str, int] | None = None,
    training_data: str = "Not stated.",
    privacy: str = NO_GUARANTEE,
) -> ModelCard:
    """Write weights and card into ``folder``, each file atomically, the card last; weights go straight to disk.

    Raises:
        ResourceError: There is no room.
    """
    digests = {}
    for name, state in _states(autoencoder, denoiser).items():
        with writing(folder / name) as draft:
            save_tensors_to(_plain(state), draft)
        digests[name] = file_digest(folder / name)
    card = _card(
        digests, preset=preset, schema=schema, modalities=modalities, model_id=model_id, rounds=rounds, sites=sites,
        steps=steps, training_data=training_data, privacy=privacy,
    )  # fmt: skip
    write_atomic(folder / "card.md", card.to_markdown().encode())
    write_atomic(folder / CARD, card.to_json_bytes())
    return card


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check every file against the card.

    Raises:
        DataError: The folder or one of its files is missing.
        IntegrityError: A file was changed after it was written.
        ConfigError: The card's preset is not one that this version knows.
    """
    card = ModelCard.from_json_bytes(_content(folder, CARD))
    states = {name: _state(folder, name, digest) for name, digest in card.files.items()}
    if AUTOENCODER not in states:
        raise DataError(f"The checkpoint {folder.name!r} holds no autoencoder.", "Train stage 1 first.")
    return Checkpoint(card.preset, card.schema, card.modalities, states[AUTOENCODER], states.get(DENOISER), card)


def _content(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise DataError(f"There is no checkpoint in {str(folder)!r}: {name} is missing.", "Check the path.")
    return path.read_bytes()


def _state(folder: Path, name: str, digest: str) -> State:
    if name not in (AUTOENCODER, DENOISER):
        raise IntegrityError("The model card names a file that no checkpoint holds.", "Restore the checkpoint.")
    content = _content(folder, name)
    if hashlib.sha256(content).hexdigest() != digest:
        raise IntegrityError(f"{name} does not match the digest in its card.", "Restore it from a good copy.")
    try:
        return load_tensors(content)
    except SafetensorError as error:
        raise IntegrityError(f"{name} is not a safetensors file.", "Restore it from a good copy.") from error
