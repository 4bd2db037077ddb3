"""Averaged weights: what a network remembers of its way, smoother than where it is now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

COUNT = "count"


class Ema:
    """Keep an exponential moving average of a network's weights and float buffers.

    The memory grows with the number of updates, up to ``longest``, so that the average forgets the
    random beginning soon: decay = min(longest, (1 + n) / (10 + n)).

    Source: Karras et al. (arXiv 2312.02696), section 3, on why the memory should grow with training.
    """

    def __init__(self, module: nn.Module, longest: float) -> None:
        if not 0 <= longest < 1:
            raise ValueError(f"an average with decay {longest} never settles: it must be at least 0 and below 1")
        self.longest = longest
        self._module = module
        self._count = 0
        self._average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's present weights: to be called after each training step."""
        self._count += 1
        decay = min(self.longest, (1 + self._count) / (10 + self._count))
        now = self._module.state_dict()
        names = [name for name, value in now.items() if value.is_floating_point()]
        for name in names:
            self._average[name].lerp_(now[name], 1 - decay)
        for name in now.keys() - names:
            self._average[name].copy_(now[name])

    def weights(self) -> dict[str, Tensor]:
        """Return the average under the names of the network's own state."""
        return dict(self._average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lend the network the average inside the context, and give its own weights back afterwards."""
        own = {name: value.detach().clone() for name, value in self._module.state_dict().items()}
        self._module.load_state_dict(self._average)
        try:
            yield
        finally:
            self._module.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs."""
        return self.weights() | {COUNT: torch.tensor(self._count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict``.

        Raises:
            KeyError: A weight is missing.
        """
        self._count = int(state[COUNT])
        for name, value in self._average.items():
            value.copy_(state[name])
