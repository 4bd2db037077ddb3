"""Label map in, synthetic volume out. The only place that makes a SyntheticVolume."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medlsdm.checkpoints import Checkpoint, State
from medlsdm.diffusion.objectives import Objective
from medlsdm.diffusion.samplers import guided, sample, seeded_noise
from medlsdm.drawing import (
    Conditions,
    LabelSource,
    WindowedNetwork,
    decode_tiles,
    read_labels,
    tile_decoder,
)
from medlsdm.errors import DataError, MedlsdmError, SchemaError, UsageError
from medlsdm.memory import (
    DEFAULT_SHARE,
    Grid,
    Needs,
    Plan,
    free_bytes,
    make_plan,
    measured_footprint,
    resident_bytes,
)
from medlsdm.models.spade import SLAB_BYTES
from medlsdm.models.unet import MODALITIES
from medlsdm.training.devices import choose_device, memory_advice
from medlsdm.training.loop import autocast, bfloat16_pays, sampling_precision, sums_depend_on_shape
from medlsdm.training.patients import denormalise
from medlsdm.types import SYNTHESIS_SEAL, Geometry, Modality, Provenance, SemanticMap, SyntheticVolume
from medlsdm.volumes import to_ras
from medlsdm.windows import Slices, Triple, windows

LARGEST_BATCH = 8
BATCH_VOXELS = 2**14
"""Latent voxels up to which a batch is filled: beyond, drawing several at once saves no time."""

SMALL_GRID = 2**13
"""Latent voxels up to which a single volume is drawn whole without asking what memory there is."""

STATES = 6
"""Copies of the latents that a sampler holds at most: state, slopes and what is being computed."""

OVERLAP_REACH = 8
"""How far windows read into their neighbours, in latent voxels, where the denoiser has no finite receptive field."""

LARGEST_SEED = 2**63 - 1
LARGEST_GUIDANCE = 100.0

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Order:
    """Say how to draw: sampling steps, guidance (1 is none), modality, and the memory allowed or the plan itself."""

    steps: int
    guidance: float
    modality: Modality
    memory: int | Plan | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Draft:
    """Hold a label map that waits to be drawn."""

    labels: SemanticMap
    source: LabelSource
    seed: int

    def fits(self, other: Draft) -> bool:
        """Tell whether both can be drawn in one batch: of one size, and with one spacing."""
        mine, theirs = self.source, other.source
        return mine.padded == theirs.padded and mine.geometry.spacing == theirs.geometry.spacing


class Synthesiser:
    """Turn label maps into volumes with one checkpoint.

    Volumes of any size: what does not fit the memory at once is sampled in windows and decoded in
    tiles. The networks are built at their first use and kept.

    Args:
        checkpoint: Both stages trained.
        threads: CPU threads to use; all that torch would take, by default.
        device: ``auto`` (the GPU where torch can use one), ``cpu`` or ``cuda``.
        smooth: Leave out the texture that a trained texture decoder adds.
        unknown: Label values that say nothing: what lies there is left to the model.

    Raises:
        DataError: Stage 2 has not been trained.
        SchemaError: A value of ``unknown`` is not in the checkpoint's label schema.
        ConfigError: The weights are of another architecture, or there is no such device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        device: str = "auto",
        *,
        smooth: bool = False,
        unknown: Collection[int] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.last_plan: Plan | None = None
        strange = sorted(set(unknown) - set(checkpoint.schema.ids))
        if strange:
            known = ", ".join(map(str, checkpoint.schema.ids))
            raise SchemaError(f"The model has no label {strange[0]}.", f"Its labels are {known}.")
        self._threads, self._unknown = threads, unknown
        self._device = choose_device(device)
        self._denoiser = self._ready(checkpoint.build_denoiser(), checkpoint.denoiser)
        self._autoencoder = self._ready(checkpoint.build_autoencoder(), checkpoint.autoencoder)
        self._strides, self._sampling = checkpoint.preset.autoencoder.strides, checkpoint.preset.sampling
        self._decoder = tile_decoder(self._autoencoder, smooth=smooth)

    def _ready(self, network: Network, state: State | None) -> Network:
        """Move a network to the device; channels-last pays where bfloat16 does.

        On a CPU the checkpoint then holds the network's own tensors: one copy of the weights is enough.
        """
        network.to(self._device)
        if self._device.type == "cuda" or bfloat16_pays():
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if self._device.type == "cpu" and state is not None:
            state.update(network.state_dict())
        return network.eval()

    def synthesise(
        self,
        labels: SemanticMap,
        *,
        seed: int,
        steps: int | None = None,
        guidance: float | None = None,
        modality: Modality | None = None,
        memory: int | Plan | None = None,
    ) -> SyntheticVolume:
        """Draw one volume on the label map's own grid: any orientation, any size.

        Args:
            labels: Under the checkpoint's label schema.
            seed: The same seed, map and checkpoint give the same volume.
            steps: Sampling steps; the preset's by default.
            guidance: 1 means none; the preset's by default.
            modality: One that the checkpoint was trained on; its first by default.
            memory: Bytes that this process may hold at its peak (on a GPU: of its memory), by default
                a share of what is free; or the plan itself.

        Raises:
            SchemaError: The map is under another schema.
            DataError: The checkpoint does not know the modality, or what it draws is not finite.
            UsageError: The seed or the guidance is out of range.
            ResourceError: The volume does not fit the memory, however small the windows.
        """
        drawn = self.synthesise_many(
            [labels], seeds=[seed], steps=steps, guidance=guidance, modality=modality, memory=memory
        )
        return next(iter(drawn))

    def synthesise_many(
        self,
        maps: Iterable[SemanticMap],
        *,
        seeds: Iterable[int],
        steps: int | None = None,
        guidance: float | None = None,
        modality: Modality | None = None,
        memory: int | Plan | None = None,
    ) -> Iterator[SyntheticVolume]:
        """Draw one volume for each map, in order; neighbours of equal size are drawn together.

        A volume does not depend on what it is drawn with. Maps and seeds are read as they are needed,
        and volumes are not kept. A map that cannot be read or used ends it, after those before it are drawn.
        Arguments and errors as in ``synthesise``.
        """
        sampling, kind = self._sampling, modality or self.checkpoint.modalities[0]
        if kind not in self.checkpoint.modalities:
            known = ", ".join(self.checkpoint.modalities)
            raise DataError(f"The checkpoint was not trained on {kind}.", f"It knows {known}.")
        strength = sampling.guidance if guidance is None else guidance
        if not 0 <= strength <= LARGEST_GUIDANCE:
            hint = f"Give a number from 0 to {LARGEST_GUIDANCE:g}; 1 is none."
            raise UsageError(f"A guidance of {strength:g} makes no sense.", hint)
        order = Order(steps or sampling.steps, strength, kind, memory)
        return self._batches(zip(maps, seeds, strict=True), order)

    def _batches(self, wanted: Iterable[tuple[SemanticMap, int]], order: Order) -> Iterator[SyntheticVolume]:
        waiting: list[Draft] = []
        plan, failure = Plan(), None
        drafts = (self._draft(labels, seed) for labels, seed in wanted)
        while True:
            try:
                draft = next(drafts, None)
            except MedlsdmError as error:
                draft, failure = None, error
            if draft is None:
                break
            if waiting and (len(waiting) == plan.batch or not draft.fits(waiting[0])):
                yield from self._draw(waiting, order, plan)
                waiting = []
            if not waiting:
                plan = self._plan(draft.source, order)
            waiting.append(draft)
        if waiting:
            yield from self._draw(waiting, order, plan)
        if failure is not None:
            raise failure

    def _draft(self, labels: SemanticMap, seed: int) -> Draft:
        if not 0 <= seed <= LARGEST_SEED:
            raise UsageError(f"The seed {seed} is out of range.", f"Give one from 0 to {LARGEST_SEED}.")
        if labels.schema.digest != self.checkpoint.schema.digest:
            raise SchemaError("The label map is under another schema than the checkpoint.", "Use the model's schema.")
        return Draft(labels, LabelSource(labels, self._strides, self._unknown), seed)

    def _draw(self, drafts: Sequence[Draft], order: Order, plan: Plan) -> Iterator[SyntheticVolume]:
        self.last_plan = plan
        arrays: list[NDArray[np.float32]] = []
        views: list[NDArray[np.float32]] = []
        broken: set[int] = set()

        def write(index: int, box: Slices, values: NDArray[np.float32]) -> None:
            if not np.isfinite(values).all():  # before values are clipped, which would hide it
                broken.add(index)
            views[index][box] = denormalise(values, order.modality)

        with (
            torch.inference_mode(),
            _threads(self._threads),
            memory_advice("synthesis", "Give less memory by --memory (smaller windows), or use --device cpu."),
            autocast(self._device),
        ):
            with sampling_precision(self._device):
                latents = self._autoencoder.unstandardise(self._latents(drafts, order, plan))
            for draft in drafts:
                arrays.append(np.empty(draft.labels.geometry.shape, dtype=np.float32))
                views.append(to_ras(arrays[-1], draft.labels.geometry)[0])
            sources, seeds = [draft.source for draft in drafts], [draft.seed for draft in drafts]
            decode_tiles(self._decoder, latents, sources, seeds, self._strides, plan.decoding_parts, write)
            del latents
        card = self.checkpoint.card
        for index, (draft, array) in enumerate(zip(drafts, arrays, strict=True)):
            if index in broken:
                raise DataError(
                    f"What the model drew from seed {draft.seed} is not finite.",
                    "Try another seed or less guidance; if that does not help, train the model longer, or anew.",
                )
            origin = Provenance(card.checkpoint_digest, card.digest, draft.labels.digest, draft.seed)
            yield SyntheticVolume(array, draft.labels.geometry, order.modality, origin, seal=SYNTHESIS_SEAL)

    def _latents(self, drafts: Sequence[Draft], order: Order, plan: Plan) -> Tensor:
        """Return standardised latents [B, C, x, y, z]."""
        sources, seeds = [draft.source for draft in drafts], [draft.seed for draft in drafts]
        shape, (halo, align, _) = self._latent_shape(sources[0]), self._reach()
        conditions = self._conditions(sources[0].geometry, order.modality)
        cut = windows(shape, plan.sampling_parts, halo, align)
        whole = slice(0, sources[0].padded[0]), slice(0, sources[0].padded[1]), slice(0, sources[0].padded[2])
        pyramid = self._denoiser.labels(read_labels(sources, whole, self._device))
        network = WindowedNetwork(self._denoiser, pyramid, conditions, cut, plan)
        if order.guidance != 1:
            null = self._denoiser.labels.null(len(drafts), sources[0].padded)
            plain = WindowedNetwork(self._denoiser, null, conditions, cut, plan)
            network = guided(network, plain, order.guidance, self._sampling.guidance_interval)
        noise = seeded_noise(seeds, (self.checkpoint.preset.autoencoder.latent_channels, *shape)).to(self._device)
        return sample(
            network, noise, steps=order.steps, method=self._sampling.sampler, seeds=seeds, shift=self._sampling.shift,
            objective=Objective(self.checkpoint.preset.denoiser.objective),
        )  # fmt: skip

    def _conditions(self, grid: Geometry, modality: Modality) -> Conditions:
        spacing = torch.tensor([grid.spacing], dtype=torch.float32, device=self._device)
        return spacing, torch.tensor([MODALITIES.index(modality)], device=self._device)

    def _latent_shape(self, source: LabelSource) -> Triple:
        x, y, z = (n // s for n, s in zip(source.padded, self._strides, strict=True))
        return x, y, z

    def _reach(self) -> tuple[int, int, bool]:
        """Return how far sampling windows read beyond what they keep, their alignment, and whether that is exact."""
        align = 2 ** (len(self.checkpoint.preset.denoiser.channels) - 1)
        field = self._denoiser.receptive_field
        return (max(OVERLAP_REACH, align), align, False) if field is None else (field, align, True)

    def _plan(self, source: LabelSource, order: Order) -> Plan:
        """Choose how to draw maps of this size; see ``medlsdm.memory.make_plan``."""
        if isinstance(order.memory, Plan):
            return order.memory
        (halo, align, exact), kind = self._reach(), self._device.type
        planes = align * self._strides[0]
        grid = Grid(
            shape=self._latent_shape(source),
            halo=halo,
            align=align,
            decoder_halo=self._decoder.halo,
            exact=exact,
            halves=1 if order.guidance == 1 else 2,
            calls=order.steps * (2 if self._sampling.sampler == "heun" else 1),
            slab_bytes=max(SLAB_BYTES, 4 * self._denoiser.n_classes * planes * math.prod(source.padded[1:])),
        )
        batch = self._batch(grid)
        if order.memory is None and grid.voxels <= SMALL_GRID:
            return Plan(batch=batch)
        needs, used = self._needs, self._used_bytes()  # in this order: the first call loads libraries
        budget = order.memory or used + int(DEFAULT_SHARE[kind] * free_bytes(self._device))
        return make_plan(grid, needs, budget, used, batch)

    def _batch(self, grid: Grid) -> int:
        """Return how many to draw at once, at most.

        A volume must not depend on its batch. GPUs choose their ways of convolving by the batch, and so
        do CPUs where an axis is shorter than a kernel or with AMX; in bfloat16 the last bits then grow visible.
        """
        chosen_by_batch = bfloat16_pays() and sums_depend_on_shape()
        if self._device.type != "cpu" or chosen_by_batch or any(-(-n // grid.align) < 3 for n in grid.shape):
            return 1
        return max(1, min(LARGEST_BATCH, BATCH_VOXELS // grid.voxels))

    def _used_bytes(self) -> int:
        """Return what is held before drawing, with the bfloat16 copies of the weights that drawing adds."""
        on_gpu = self._device.type == "cuda"
        weights = sum(p.numel() for net in (self._autoencoder, self._denoiser) for p in net.parameters())
        return 2 * weights + (torch.cuda.memory_allocated(self._device) if on_gpu else resident_bytes())

    @cached_property
    def _needs(self) -> Needs:
        """Measure the networks on a small cube."""
        config, size = self.checkpoint.preset.autoencoder, 2 * max(8, self._reach()[1])
        sides = [size * s for s in self._strides]
        labels = torch.zeros((1, *sides), dtype=torch.uint8, device=self._device)
        latents = torch.zeros((1, config.latent_channels, size, size, size), device=self._device)
        noise = torch.zeros((1, 1, *sides), device=self._device) if self._decoder.noisy else None
        conditions = torch.ones(1, 3, device=self._device), torch.zeros(1, dtype=torch.long, device=self._device)
        with torch.no_grad(), _threads(self._threads):
            with sampling_precision(self._device):
                pyramid = self._denoiser.labels(labels)
                guidance = self._denoiser.guide(pyramid)
                calls: dict[str, Callable[[], object]] = {
                    "pyramid": lambda: self._denoiser.labels(labels),
                    "guide": lambda: self._denoiser.guide(pyramid),
                    "network": lambda: self._denoiser(latents, latents.new_zeros(1), guidance, *conditions),
                }
                prints = {name: measured_footprint(call, size**3, self._device) for name, call in calls.items()}
            with autocast(self._device):
                prints["decode"] = measured_footprint(
                    lambda: self._decoder.decode(latents, labels, noise, None), size**3, self._device
                )
            return Needs(
                **prints,
                state=STATES * 4.0 * config.latent_channels,
                labels=math.prod(self._strides),
                output=0.0 if self._device.type == "cuda" else 4.0 * math.prod(self._strides),
            )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads for a while; None leaves it as it is."""
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
