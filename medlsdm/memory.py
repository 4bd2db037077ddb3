"""Memory: what there is, what a network call takes, and the largest windows that fit a budget."""

from __future__ import annotations

import ctypes
import math
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medlsdm.errors import ResourceError, UsageError
from medlsdm.windows import Triple, cuts

MIB = 2**20
DEFAULT_SHARE = {"cpu": 0.6, "cuda": 0.85}
"""How much of the free memory to use when no budget is given."""

HEADROOM = 1.15
"""What larger windows take beyond what a small one took, for each voxel."""

UNSEEN = 1.6
"""Real bytes for each byte of the tensors that torch counts, where the system does not tell a peak.

Convolution libraries lay inputs out anew and pad channels to the width of their registers: 1.0 to 1.6 was
measured on CPUs that have the instructions, up to 2.6 where they emulate bfloat16.
"""

RESERVE_BYTES = 80 * MIB
"""Thread stacks and what the allocator keeps."""


def parse_bytes(text: str) -> int:
    """Read a size such as ``4GB``, ``512 MiB`` or ``1.5g``; GB and GiB both mean 2**30 bytes.

    Raises:
        UsageError: It is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(?:i?b)?\s*", text.lower())
    size_bytes = float(found[1]) * 1024 ** (1 + "kmgt".index(found[2])) if found else 0
    if size_bytes < 1:
        raise UsageError(f"{text!r} is not an amount of memory.", "Write for example 4GB or 512MB.")
    return int(size_bytes)


def give_back() -> None:
    """Give free heap back to the system, where the allocator can.

    What one window leaves in pieces the next may not be able to use: kept, a peak would depend on the order of
    all that was allotted before.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Return how much memory this process holds, free heap given back; a guess where the system does not tell."""
    give_back()
    return _kilobytes("/proc/self/status", "VmRSS") or 300 * MIB


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held.

    On Linux ``getrusage`` would count the process that started this one, whose peak a program inherits.
    """
    told = _kilobytes("/proc/self/status", "VmHWM")
    return told or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kilobytes(path: str, key: str) -> int | None:
    """Return a figure of ``/proc`` in bytes, or None where there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def free_bytes(device: torch.device) -> int:
    """Return the memory that could still be taken on a device, inside the container's limit if it has one."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = [_kilobytes("/proc/meminfo", "MemAvailable"), *_group_limits()]
    return min((n for n in found if n is not None), default=4 * 1024 * MIB)


def _group_limits() -> Iterator[int]:
    """Yield what is left under the limits of the control group, versions 2 and 1; file caches can be given up."""
    root = Path("/sys/fs/cgroup")
    version1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    for names in (("memory.max", "memory.current", "memory.stat"), version1):
        try:
            most, now, stat = ((root / name).read_text(encoding="ascii") for name in names)
        except OSError:
            continue
        cached = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
        if most.strip().isdigit() and now.strip().isdigit():
            yield max(0, int(most) - int(now) + cached)


class _Live(TorchDispatchMode):
    """Count the bytes of the tensors that live at once while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size_bytes = storage.nbytes()
        self._seen.add(key)
        self.now += size_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size_bytes)

    def _drop(self, key: int, size_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= size_bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Say what a call takes for each voxel of its input, in bytes: at its peak, and in what it returns."""

    peak: float
    kept: float


def footprint(call: Callable[[], object], voxels: int) -> Footprint:
    """Measure a call on a small input of ``voxels``: the tensors that live at once, as torch allots them."""
    with torch.no_grad(), _Live() as live:
        result = call()
        kept = live.now
        del result
    return Footprint(live.peak / voxels, kept / voxels)


def measured_footprint(call: Callable[[], object], voxels: int, device: torch.device) -> Footprint:
    """Measure a call as ``footprint`` does, its peak with what the convolution libraries take beside tensors.

    What the first call loads and keeps from then on (kernels, casts of weights) is not counted.
    """
    footprint(call, voxels)
    before = _start_peak(device)
    counted = footprint(call, voxels)
    real = UNSEEN * counted.peak if before is None else (_peak(device) - before) / voxels
    return Footprint(max(counted.peak, real), counted.kept)


def _start_peak(device: torch.device) -> int | None:
    """Forget earlier peaks and return what is held now; None where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    held = resident_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return held


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes("/proc/self/status", "VmHWM") or 0


@dataclass(frozen=True, slots=True)
class Needs:
    """Hold what drawing takes, in bytes for each latent voxel.

    ``pyramid``: label activations of the whole; ``guide``: label guidance of a window; ``network``: one
    call of the denoiser; ``decode``: one call of the decoder; ``state``: what the sampler holds;
    ``labels``: class indices; ``output``: the volume.
    """

    pyramid: Footprint
    guide: Footprint
    network: Footprint
    decode: Footprint
    state: float
    labels: float
    output: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Say how a grid is drawn: parts for each axis, in sampling and in decoding, and what that takes.

    ``blended``: windows overlap and their velocities are blended, because the denoiser sees the whole.
    ``cached``: label guidance is computed once and kept, not anew at every call.
    """

    sampling_parts: Triple = (1, 1, 1)
    decoding_parts: Triple = (1, 1, 1)
    blended: bool = False
    cached: bool = True
    batch: int = 1
    budget_bytes: int | None = None
    estimate_bytes: int | None = None

    @property
    def whole(self) -> bool:
        """Tell whether nothing is cut."""
        return self.sampling_parts == self.decoding_parts == (1, 1, 1)

    @property
    def summary(self) -> str:
        """Return the plan in words."""
        parts = []
        for what, of in (("sampled", self.sampling_parts), ("decoded", self.decoding_parts)):
            parts.append(f"{what} whole" if of == (1, 1, 1) else f"{what} in {' x '.join(map(str, of))} windows")
        size = f", about {self.estimate_bytes / 2**30:.1f} GB" if self.estimate_bytes else ""
        return ", ".join(parts) + (", blended" if self.blended else "") + size

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Grid:
    """Describe the latent grid to be drawn: its shape, and how windows over it must be cut.

    ``halo`` is the denoiser's receptive field, or half the overlap where it has none; ``align`` is by
    how much it shrinks latents. ``decoder_halo`` is the decoder's receptive field, in latent voxels.
    ``halves`` is 2 with guidance; ``calls`` of the denoiser are made for each. ``slab_bytes`` is how large
    the one-hot of a slab of labels becomes.
    """

    shape: Triple
    halo: int
    align: int
    decoder_halo: int
    exact: bool
    halves: int
    calls: int
    slab_bytes: int

    @property
    def voxels(self) -> int:
        """Return the number of latent voxels."""
        return math.prod(self.shape)


GUIDE_COST = 0.2
"""What computing a window's label guidance costs, in calls of the denoiser (measured at tiny widths)."""

Option = tuple[float, float, Plan]
"""Cost in voxels times calls, bytes, and the choice."""


def make_plan(grid: Grid, needs: Needs, budget_bytes: int, used_bytes: int, batch: int = 1) -> Plan:
    """Choose the cheapest way to draw a grid within a budget.

    Args:
        grid: What to draw.
        needs: What its networks take.
        budget_bytes: For the whole process.
        used_bytes: What the process holds before it starts.
        batch: How many to draw at once at most; more than one only where all of them fit whole.

    Raises:
        ResourceError: Not even the smallest windows fit.
    """
    room = (budget_bytes - used_bytes - RESERVE_BYTES) / HEADROOM
    pyramid = _pyramid_bytes(grid, needs)
    sampling = min_cost(_sampling(grid, needs), room)
    decoding = min_cost(_decoding(grid, needs), room)
    peak = max(pyramid, sampling[1], decoding[1])
    if peak > room:
        least = used_bytes + RESERVE_BYTES + HEADROOM * peak
        raise ResourceError(
            f"This volume needs {least / MIB:.0f} MB at least, and {budget_bytes / MIB:.0f} MB are allowed.",
            "Raise --memory, or use smaller label maps or a smaller preset.",
        )
    plan = replace(sampling[2], decoding_parts=decoding[2].decoding_parts)
    batch = max(1, min(batch, int(room // peak))) if plan.whole else 1
    estimate = int(used_bytes + RESERVE_BYTES + HEADROOM * batch * peak)
    return replace(plan, batch=batch, budget_bytes=budget_bytes, estimate_bytes=estimate)


def min_cost(options: Iterable[Option], room: float) -> Option:
    """Return the cheapest option that fits into ``room`` bytes; the smallest where none fits."""
    return min(options, key=lambda option: (option[1] > room, option[0] if option[1] <= room else option[1], option[1]))


def _pyramid_bytes(grid: Grid, needs: Needs) -> float:
    """Return the peak of computing label activations: slab by slab, then one convolution over all."""
    transient = needs.pyramid.peak - needs.pyramid.kept
    slabs = min(grid.voxels * transient, grid.voxels * 3 * needs.pyramid.kept + 4 * grid.slab_bytes)
    return grid.voxels * (needs.labels + needs.pyramid.kept * grid.halves) + slabs


def _sampling(grid: Grid, needs: Needs) -> Iterator[Option]:
    fixed = grid.voxels * (needs.state + needs.pyramid.kept * grid.halves)
    for cut in cuts(grid.shape, grid.halo, grid.align):
        for cached in (True, False):
            held = needs.guide.kept * (cut.total * grid.halves if cached else cut.largest)
            peak = fixed + held + cut.largest * max(needs.network.peak, needs.guide.peak)
            calls = grid.calls + GUIDE_COST if cached else grid.calls * (1 + GUIDE_COST)
            blended = not grid.exact and cut.parts != (1, 1, 1)
            yield cut.total * calls, peak, Plan(cut.parts, blended=blended, cached=cached)


def _decoding(grid: Grid, needs: Needs) -> Iterator[Option]:
    fixed = grid.voxels * (needs.output + needs.state / 4)
    for cut in cuts(grid.shape, grid.decoder_halo):
        yield cut.total, fixed + cut.largest * needs.decode.peak, Plan(decoding_parts=cut.parts)
