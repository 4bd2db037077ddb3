"""Quantisers: how stage 1 turns encoder outputs into codes."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from medlsdm.config import AutoencoderConfig

DISTANCES_AT_ONCE = 2**22
"""How many vector-to-code distances are in memory at a time (16 MiB)."""


class Quantiser(nn.Module):
    """Say what quantisers of latents [B, C, X, Y, Z] do; those below override what they change."""

    def bound(self, latents: Tensor) -> Tensor:
        """Bring encoder outputs, as float32, to the range that rounding expects. Smooth, and one to one."""
        return latents.float()

    def forward(self, bounded: Tensor) -> Tensor:
        """Round to the nearest code; the gradient passes straight through."""
        return bounded

    def indices(self, bounded: Tensor) -> Tensor:
        """Return the number of each voxel's code, [B, X, Y, Z]."""
        raise NotImplementedError("continuous latents have no codes")

    def take_commitment(self) -> Tensor | None:
        """Return the commitment loss of the last forward in training, once; None where there is none."""
        return None


class Continuous(Quantiser):
    """Leave latents as they are. Their commitment is their power, so that noise on them cannot be outgrown.

    A channel of limited power under Gaussian noise is best used by Gaussian latents, which are what
    diffusion models most easily; rounding squeezes latents towards the ends of their range.
    """

    def __init__(self) -> None:
        super().__init__()
        self._power: Tensor | None = None

    def forward(self, bounded: Tensor) -> Tensor:
        """Return the latents unchanged."""
        if self.training:
            self._power = bounded.square().mean()
        return bounded

    def take_commitment(self) -> Tensor | None:
        """Return the mean square of the last latents in training, once."""
        power, self._power = self._power, None
        return power


class FiniteScalar(Quantiser):
    """Round each channel to its own number of levels; there is no codebook to collapse or to leak.

    Source: Mentzer et al., Finite Scalar Quantization (arXiv 2309.15505), appendix A.1.
    """

    reach: Tensor
    offset: Tensor
    shift: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        count = torch.tensor(levels, dtype=torch.float32).view(1, -1, 1, 1, 1)
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        half = (count - 1) * 0.5005
        basis = torch.tensor(levels).cumprod(0).roll(1)
        basis[0] = 1
        self.register_buffer("reach", half, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.atanh(offset / half), persistent=False)
        self.register_buffer("scale", torch.floor(count / 2), persistent=False)
        self.register_buffer("basis", basis.view(1, -1, 1, 1, 1), persistent=False)

    def bound(self, latents: Tensor) -> Tensor:
        """Squeeze encoder outputs smoothly into about -1..1, before rounding."""
        latents = latents.float()
        return (torch.tanh(latents + self.shift) * self.reach - self.offset) / self.scale

    def forward(self, bounded: Tensor) -> Tensor:
        """Round to the nearest level; the gradient passes straight through."""
        steps = bounded.float() * self.scale
        return (steps + (self._nearest(steps) - steps).detach()) / self.scale

    def indices(self, bounded: Tensor) -> Tensor:
        """Return the number of each voxel's code, [B, X, Y, Z]; the first channel counts fastest."""
        codes = self._nearest(bounded.float() * self.scale)
        return ((codes + self.scale).long() * self.basis).sum(dim=1)

    def _nearest(self, steps: Tensor) -> Tensor:
        lowest, highest = -self.reach.floor() - 2 * self.offset, self.reach.floor()
        return torch.maximum(torch.minimum(steps.round(), highest), lowest)


class MovingAverage(Quantiser):
    """Round each voxel's vector to the nearest of ``size`` codes, which follow the mean of what they stand for.

    Codes, their counts and the flag that says they were drawn are buffers and are saved. They change in
    ``forward`` in training mode only: the first batch fills the codebook, later ones move it, and codes
    that hardly any voxel uses are drawn anew from the batch. Loading, ``eval`` and sampling change nothing.
    Processes that train together keep one codebook.

    Not for differentially private training: codes are statistics of patients that no noise covers. Averaging
    over sites is right only for a codebook that all of them started from; two codebooks drawn apart have no
    order in common.

    Source: van den Oord et al., Neural Discrete Representation Learning (arXiv 1711.00937), appendix A.1;
    restart of dead codes from Dhariwal et al., Jukebox (arXiv 2005.00341), section 3.1.
    """

    codebook: Tensor
    sums: Tensor
    counts: Tensor
    drawn: Tensor

    def __init__(self, size: int, width: int, *, decay: float = 0.99, dead_below: float = 0.1) -> None:
        """Say how fast codes move, and below which share of the mean count a code is dead."""
        super().__init__()
        self.decay, self.dead_below = decay, dead_below
        self.register_buffer("codebook", torch.randn(size, width))
        self.register_buffer("sums", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("drawn", torch.zeros(1))  # float, so that sites can average it like any weight
        self._commitment: Tensor | None = None

    def forward(self, bounded: Tensor) -> Tensor:
        """Round to the nearest code; the gradient passes straight through. In training, codes move afterwards."""
        bounded = bounded.float()
        vectors = _vectors(bounded.detach())
        if self.training and not self.drawn:
            self._draw(vectors)
        nearest = self._nearest(vectors)
        codes = self.codebook[nearest].view(bounded.movedim(1, -1).shape).movedim(-1, 1)
        if self.training:
            self._commitment = (bounded - codes).square().mean()
            self._move(vectors, nearest)
        return bounded + (codes - bounded).detach()

    def indices(self, bounded: Tensor) -> Tensor:
        """Return the number of each voxel's code, [B, X, Y, Z]."""
        return self._nearest(_vectors(bounded.float())).view(len(bounded), *bounded.shape[2:])

    def take_commitment(self) -> Tensor | None:
        """Return the commitment loss of the last forward in training, once."""
        commitment, self._commitment = self._commitment, None
        return commitment

    @torch.no_grad()
    def _nearest(self, vectors: Tensor) -> Tensor:
        """Return the nearest code of each vector [N, C], a chunk of vectors at a time."""
        rows = max(1, DISTANCES_AT_ONCE // len(self.codebook))
        with torch.autocast(vectors.device.type, enabled=False):
            lengths = self.codebook.square().sum(1)
            # |v - c|^2 without |v|^2, which is the same for every code.
            found = [(lengths - 2 * chunk @ self.codebook.T).argmin(1) for chunk in vectors.split(rows)]
        return torch.cat(found)

    @torch.no_grad()
    def _draw(self, vectors: Tensor) -> None:
        """Fill the codebook from a batch; each code starts with its fair share of voxels."""
        fair = len(vectors) * _processes() / len(self.counts)
        self.codebook.copy_(_sample(vectors, len(self.codebook)))
        self.counts.fill_(fair)
        self.sums.copy_(self.codebook * fair)
        self.drawn.fill_(1)

    @torch.no_grad()
    def _move(self, vectors: Tensor, nearest: Tensor) -> None:
        """Move codes towards the mean of their vectors, and draw dead ones anew from the batch."""
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        counts.index_add_(0, nearest, torch.ones_like(vectors[:, 0]))
        sums.index_add_(0, nearest, vectors)
        if _processes() > 1:
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        fair = self.counts.mean()
        dead = self.counts < self.dead_below * fair
        fresh = _sample(vectors, len(self.codebook))
        self.counts.copy_(torch.where(dead, fair, self.counts))
        self.sums.copy_(torch.where(dead[:, None], fresh * fair, self.sums))
        self.codebook.copy_(self.sums / self.counts[:, None])


def _vectors(latents: Tensor) -> Tensor:
    """Return [B, C, X, Y, Z] as one vector a voxel, [N, C]."""
    return latents.movedim(1, -1).reshape(-1, latents.shape[1])


def _sample(vectors: Tensor, count: int) -> Tensor:
    """Draw ``count`` vectors, each at most once where there are enough; all processes take the first one's."""
    if len(vectors) >= count:
        drawn = vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
    else:
        drawn = vectors[torch.randint(len(vectors), (count,), device=vectors.device)]
    if _processes() > 1:
        distributed.broadcast(drawn, 0)
    return drawn


def _processes() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def build_quantiser(config: AutoencoderConfig) -> Quantiser:
    """Return the quantiser that a preset names."""
    if config.quantiser == "fsq":
        return FiniteScalar(config.levels)
    if config.quantiser == "ema":
        return MovingAverage(config.codebook, config.latent_channels)
    return Continuous()
