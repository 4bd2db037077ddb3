"""Where training runs, and what it says when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from medlsdm.errors import ConfigError, ResourceError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of that name: ``auto`` is the GPU where torch can use one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"There is no device {name!r}.", "Use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "There is no GPU that torch can use here.", "Use --device cpu, or install torch for CUDA and its driver."
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def join_processes(name: str = "auto") -> torch.device:
    """Return the device of this process, after meeting the others that ``accelerate launch`` started, if any.

    Raises:
        ConfigError: There is no such device, or several processes were started without accelerate installed.
    """
    device = choose_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    try:
        from accelerate import PartialState  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        raise ConfigError(
            "Several processes train together by accelerate, which is not installed.", "pip install 'medlsdm[gpu]'."
        ) from None
    return torch.device(PartialState(cpu=device.type == "cpu").device)


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether Python, torch on the CPU or torch on a GPU could not get memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def memory_advice(what: str, hint: str) -> Iterator[None]:
    """Turn running out of memory into one line that says what to change.

    Raises:
        ResourceError: Memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise ResourceError(f"Memory ran out in {what}.", hint) from error


@contextmanager
def recomputed_blocks(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep no activations inside the module's blocks: the backward pass computes them again."""
    blocks = [part for part in module.modules() if type(part).__name__.endswith("Block")] if enabled else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many processes train together: (0, 1) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients; nothing to do alone.

    Together, n processes with batch b then take the step of one process with batch n x b.
    """
    size = rank_and_size()[1]
    if size == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:  # settings and step, equal in all processes, decide who has one
            distributed.all_reduce(parameter.grad)
            parameter.grad /= size


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first, such as a codebook that follows what it saw; nothing to do alone."""
    for buffer in module.buffers() if rank_and_size()[1] > 1 else ():
        distributed.broadcast(buffer, 0)
