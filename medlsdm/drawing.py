"""Draw latents and volumes window by window, so that memory bounds no volume's size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medlsdm.config import AutoencoderConfig
from medlsdm.memory import Plan, give_back
from medlsdm.models.spade import cut_activations
from medlsdm.models.unet import LabelGuidance, SemanticUNet
from medlsdm.models.vqgan import VQGAN
from medlsdm.noise import NoiseField, grain_of
from medlsdm.training.patients import round_up
from medlsdm.types import SemanticMap
from medlsdm.volumes import to_ras
from medlsdm.windows import Slices, Triple, Window, total_weights, windows

_PLANES = 32

Conditions = tuple[Tensor, Tensor]
"""Spacing [1, 3] in mm and index of the modality [1], of the whole batch."""


class LabelSource:
    """Read a label map's class indices in RAS, box by box, mirrored beyond its end. Copies no more than a box.

    ``shape`` is the map's own, ``padded`` the next multiple of the autoencoder's strides. Values that are
    ``unknown`` become an index outside the classes, which counts as unlabelled.
    """

    def __init__(self, labels: SemanticMap, strides: Triple, unknown: Collection[int] = ()) -> None:
        self._ids, self.geometry = to_ras(labels.array, labels.geometry)
        ids = labels.schema.ids
        self._places = np.zeros(ids[-1] + 1, dtype=np.uint8 if len(ids) < 256 else np.int32)
        self._places[list(ids)] = np.arange(len(ids))
        self._places[list(unknown)] = len(ids)
        self.shape = self.geometry.shape
        self.padded = round_up(self.shape, strides)

    def read(self, box: Slices) -> NDArray[Any]:
        """Return class indices [X, Y, Z] of a box inside ``padded``."""
        if all(part.stop <= size for part, size in zip(box, self.shape, strict=True)):
            return self._places[self._ids[box]]
        rows = [_mirrored(part, size) for part, size in zip(box, self.shape, strict=True)]
        return self._places[self._ids[np.ix_(*rows)]]


def _mirrored(part: slice, size: int) -> NDArray[np.int64]:
    places = np.arange(part.start, part.stop) % (2 * size)
    return np.where(places < size, places, 2 * size - 1 - places)


def scaled(box: Slices, factor: Triple) -> Slices:
    """Turn a box of latents into a box of voxels."""
    x, y, z = (slice(part.start * f, part.stop * f) for part, f in zip(box, factor, strict=True))
    return x, y, z


def _cut(tensor: Tensor, box: Slices) -> Tensor:
    return tensor[(slice(None), slice(None), *box)]


class WindowedNetwork:
    """Call the denoiser on one window after the other and put the results together.

    With a finite receptive field inside the halo the result is that of one call on the whole. Else
    the windows overlap, each is told where it lies, and each result counts by its window's weights.

    Args:
        denoiser: Called on each window.
        activations: The label pyramid's, of the whole grid.
        conditions: What the denoiser is told besides labels and time.
        cut: The windows over the latents.
        plan: Says whether to blend, and whether to keep label guidance between calls.
    """

    def __init__(
        self, denoiser: SemanticUNet, activations: list[Tensor], conditions: Conditions,
        cut: Sequence[Window], plan: Plan,
    ) -> None:  # fmt: skip
        self._denoiser, self._activations, self._conditions, self._cut = denoiser, activations, conditions, cut
        self._kept = [self._guide(window) for window in cut] if plan.cached else None
        x, y, z = activations[0].shape[2:]
        self._shape = (x, y, z)
        total = total_weights(cut, self._shape) if plan.blended else None
        self._total = None if total is None else torch.from_numpy(total).to(conditions[0].device)

    def __call__(self, latents: Tensor, times: Tensor) -> Tensor:
        """Return the denoiser's output [B, C, X, Y, Z] for the whole."""
        if len(self._cut) == 1:
            return self._call(0, latents, times)
        out = torch.zeros_like(latents)
        for index, window in enumerate(self._cut):
            part = self._call(index, _cut(latents, window.read), times)
            if self._total is None:
                _cut(out, window.keep).copy_(_cut(part, window.inside))
            else:
                _cut(out, window.read).addcmul_(part, torch.from_numpy(window.weights()).to(out.device))
        return out if self._total is None else out.div_(self._total)

    def _call(self, index: int, latents: Tensor, times: Tensor) -> Tensor:
        window = self._cut[index]
        guidance = self._kept[index] if self._kept is not None else self._guide(window)
        place = None
        if self._total is not None:
            starts = [span.start / size for span, size in zip(window.spans, self._shape, strict=True)]
            extents = [own / size for own, size in zip(window.shape, self._shape, strict=True)]
            place = torch.tensor([starts + extents], device=latents.device)
        # One row of conditions for all: a matrix product of several rows rounds otherwise than one alone.
        return self._denoiser(latents, times[:1].to(latents.device), guidance, *self._conditions, place)

    def _guide(self, window: Window) -> LabelGuidance:
        x, y, z = (span.start for span in window.spans)
        return self._denoiser.guide(cut_activations(self._activations, (x, y, z), window.shape))


def read_labels(sources: Sequence[LabelSource], box: Slices, device: torch.device) -> Tensor:
    """Return class indices [B, X, Y, Z] of a box of every source."""
    x, y, z = box
    first = sources[0].read((slice(x.start, x.start), y, z))
    out = np.empty((len(sources), x.stop - x.start, *first.shape[1:]), dtype=first.dtype)
    for row, source in zip(out, sources, strict=True):
        for start in range(x.start, x.stop, _PLANES):  # what lies beyond the map costs a copy of what is read
            stop = min(x.stop, start + _PLANES)
            row[start - x.start : stop - x.start] = source.read((slice(start, stop), y, z))
    return torch.from_numpy(out).to(device)


@dataclass(frozen=True, slots=True)
class TileDecoder:
    """Hold a function that decodes any box of latents, and how far it looks.

    ``decode``: latents [B, C, x, y, z], class indices [B, X, Y, Z], noise (as the indices) and grain [B], both
    of which may be None, to volumes [B, 1, X, Y, Z]. ``halo``: its receptive field in latent voxels.
    ``noisy``: whether it takes noise and grain.
    """

    decode: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    halo: int
    noisy: bool


def tile_decoder(autoencoder: VQGAN, *, smooth: bool = False) -> TileDecoder:
    """Return the autoencoder's decoder; ``smooth`` leaves its texture out."""
    config, texture = autoencoder.config, autoencoder.texture if autoencoder.draws_texture and not smooth else None
    beyond = texture.halo if texture is not None else 0
    halo = max(_decoder_reach(config, axis, beyond) for axis in range(3))
    return TileDecoder(autoencoder.decode, halo, texture is not None)


def _decoder_reach(config: AutoencoderConfig, axis: int, beyond: int) -> int:
    """Return how many latent voxels can matter to each side, where ``beyond`` cells of the finest scale do."""
    reach = beyond + 1 + 2 * config.decoder_blocks[0]
    for blocks, down in zip(config.decoder_blocks[1:], config.down, strict=True):
        reach = -(-reach // down[axis]) + 2 * blocks
    return reach + 1


def decode_tiles(
    decoder: TileDecoder, latents: Tensor, sources: Sequence[LabelSource], seeds: Sequence[int], strides: Triple,
    parts: Triple, write: Callable[[int, Slices, NDArray[np.float32]], None],
) -> None:  # fmt: skip
    """Decode latents tile by tile.

    Args:
        decoder: Decodes a tile.
        latents: [B, C, x, y, z], as the decoder takes them.
        sources: One for each sample.
        seeds: Of the texture noise, one for each sample.
        strides: Voxels in a latent voxel.
        parts: Into how many parts each axis is cut.
        write: Takes the sample's number, a box of the volume and its values there.
    """
    x, y, z = latents.shape[2:]
    fields = [NoiseField(seed, sources[0].padded) for seed in seeds] if decoder.noisy else []
    grain = torch.tensor([grain_of(seed) for seed in seeds], device=latents.device) if decoder.noisy else None
    for tile in windows((x, y, z), parts, decoder.halo):
        give_back()
        box = scaled(tile.read, strides)
        labels = read_labels(sources, box, latents.device)
        noise = torch.from_numpy(np.stack([f.read(box) for f in fields])).to(latents.device) if fields else None
        volumes = _cut(decoder.decode(_cut(latents, tile.read), labels, noise, grain), scaled(tile.inside, strides))
        for index, source in enumerate(sources):
            u, v, w = (
                slice(part.start, max(part.start, min(part.stop, size)))
                for part, size in zip(scaled(tile.keep, strides), source.shape, strict=True)
            )
            own = tuple(slice(part.stop - part.start) for part in (u, v, w))
            write(index, (u, v, w), volumes[index, 0][own].float().cpu().numpy())
