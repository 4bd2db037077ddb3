"""Label map in, synthetic volume out. The only place that makes a SyntheticVolume."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medlsdm.checkpoints import Checkpoint
from medlsdm.diffusion.objectives import Velocity
from medlsdm.diffusion.samplers import guided, sample, seeded_noise
from medlsdm.errors import DataError, SchemaError
from medlsdm.models.spade import one_hot
from medlsdm.models.unet import MODALITIES
from medlsdm.training.loop import autocast, device_of
from medlsdm.training.patients import class_indices, denormalise, mirror_to, round_up, spacing_of
from medlsdm.types import SYNTHESIS_SEAL, Geometry, Modality, Provenance, SemanticMap, SyntheticVolume
from medlsdm.volumes import from_ras, to_ras


class Synthesiser:
    """Turn label maps into volumes with one checkpoint.

    Args:
        checkpoint: Both stages trained.
        threads: CPU threads to use; all that torch would take, by default.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.checkpoint = checkpoint
        self._threads = threads
        self._autoencoder = checkpoint.build_autoencoder()
        self._denoiser = checkpoint.build_denoiser()

    def synthesise(
        self,
        labels: SemanticMap,
        *,
        seed: int,
        steps: int | None = None,
        guidance: float | None = None,
        modality: Modality | None = None,
    ) -> SyntheticVolume:
        """Draw one volume on the label map's own grid: any orientation, any size.

        Args:
            labels: Under the checkpoint's label schema.
            seed: The same seed, map and checkpoint give the same volume.
            steps: Sampling steps; the preset's by default.
            guidance: 1 means none; the preset's by default.
            modality: One that the checkpoint was trained on; its first by default.

        Raises:
            SchemaError: The map is under another schema.
            DataError: The checkpoint does not know the modality.
        """
        kind = modality or self.checkpoint.modalities[0]
        if labels.schema.digest != self.checkpoint.schema.digest:
            raise SchemaError("The label map is under another schema than the checkpoint.", "Use the model's schema.")
        if kind not in self.checkpoint.modalities:
            known = ", ".join(self.checkpoint.modalities)
            raise DataError(f"The checkpoint was not trained on {kind}.", f"It knows {known}.")
        indices, canonical = to_ras(class_indices(labels), labels.geometry)
        with torch.inference_mode(), _threads(self._threads):
            volume = self._draw(indices, spacing_of(canonical), kind, seed, steps, guidance)
        array = from_ras(denormalise(volume, kind), labels.geometry)
        card = self.checkpoint.card
        return SyntheticVolume(
            np.ascontiguousarray(array),
            labels.geometry,
            kind,
            Provenance(card.checkpoint_digest, card.digest, labels.digest, seed),
            seal=SYNTHESIS_SEAL,
        )

    def _draw(
        self,
        indices: NDArray[np.integer],
        spacing: NDArray[np.float32],
        modality: Modality,
        seed: int,
        steps: int | None,
        guidance: float | None,
    ) -> NDArray[np.float32]:
        """Return a RAS volume in about -1..1."""
        sampling, strides = self.checkpoint.preset.sampling, self.checkpoint.preset.autoencoder.strides
        padded = mirror_to(indices, round_up(indices.shape, strides)).astype(np.int32)
        device = device_of(self._denoiser)
        labels = one_hot(torch.from_numpy(padded)[None].to(device), self._denoiser.n_classes)
        x, y, z = (n // s for n, s in zip(padded.shape, strides, strict=True))
        noise = seeded_noise([seed], (self.checkpoint.preset.autoencoder.latent_channels, x, y, z)).to(device)
        conditions = (
            torch.from_numpy(spacing).to(device),
            torch.tensor([MODALITIES.index(modality)], device=device),
        )
        with autocast(device):
            scale = sampling.guidance if guidance is None else guidance
            with_labels = self._velocity(labels, conditions)
            without = self._velocity(torch.zeros_like(labels), conditions) if scale != 1 else with_labels
            velocity = guided(with_labels, without, scale)
            latents = sample(velocity, noise, steps=steps or sampling.steps, method=sampling.sampler)
            volume = self._autoencoder.decode(self._autoencoder.unstandardise(latents), labels)
        cut = tuple(slice(n) for n in indices.shape)
        return volume[0, 0].float().cpu().numpy()[cut]

    def _velocity(self, labels: Tensor, conditions: tuple[Tensor, Tensor]) -> Velocity:
        prepared = self._denoiser.prepare_labels(labels)
        return lambda x, t: self._denoiser(x, t, prepared, *conditions)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_bytes(volume: SyntheticVolume) -> bytes:
    """Turn a synthetic volume into bytes for a vault: a JSON header and raw float32.

    The bytes prove nothing by themselves: keep them only where records are authenticated.
    """
    origin = volume.provenance
    header = {
        "affine": volume.geometry.affine.tolist(),
        "shape": list(volume.geometry.shape),
        "modality": volume.modality,
        "checkpoint_digest": origin.checkpoint_digest,
        "card_digest": origin.card_digest,
        "labels_digest": origin.labels_digest,
        "seed": origin.seed,
    }
    text = json.dumps(header, sort_keys=True).encode()
    return struct.pack("<I", len(text)) + text + np.ascontiguousarray(volume.array, dtype="<f4").tobytes()


def restore(content: bytes) -> SyntheticVolume:
    """Read ``to_bytes`` output back.

    The caller vouches that the bytes are what ``to_bytes`` wrote, as the vault does by authenticating
    its records: a real scan dressed in this form would pass for synthetic.

    Raises:
        DataError: The bytes are not of this form.
    """
    try:
        (length,) = struct.unpack_from("<I", content)
        header = json.loads(content[4 : 4 + length])
        geometry = Geometry(np.array(header["affine"]), tuple(header["shape"]))
        array = np.frombuffer(content, dtype="<f4", offset=4 + length).reshape(geometry.shape).copy()
        provenance = Provenance(
            header["checkpoint_digest"], header["card_digest"], header["labels_digest"], int(header["seed"])
        )
        modality = Modality(header["modality"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise DataError("A stored synthetic volume cannot be read.", "Synthesise it again.") from error
    return SyntheticVolume(array, geometry, modality, provenance, seal=SYNTHESIS_SEAL)
