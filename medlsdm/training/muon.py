"""Muon: steps of equal strength in every direction of a weight matrix. Takes fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that brings every singular value of a matrix near 1 within five rounds."""

ROUNDS = 5
UPDATE_RMS = 0.2
"""Root mean square of an orthogonal update before the rate: that of AdamW's updates, so that rates mean the same."""


class Muon(torch.optim.Optimizer):
    """Orthogonalise the averaged gradient of matrices and convolutions; treat all else as AdamW does.

    Convolutions count as matrices [outputs, inputs x kernel]. A group with ``orthogonal: False`` holds what is
    no matrix inside the network: norms, biases, embeddings, the last layer.

    Source: Jordan et al., Muon (kellerjordan.github.io/posts/muon, 2024); scale of updates: Liu et al.
    (arXiv 2502.16982), equation 4; AdamW: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "orthogonal": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step by the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    update = self._orthogonal if group["orthogonal"] else self._adam
                    weight.add_(update(weight.grad, self.state[weight], group), alpha=-group["lr"])
        return loss

    @staticmethod
    def _orthogonal(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["average"] = torch.zeros_like(gradient)
        average = state["average"].lerp_(gradient, 1 - group["momentum"])
        matrix = orthogonalised(gradient.lerp(average, group["momentum"]).flatten(1))
        return matrix.view(gradient.shape) * (UPDATE_RMS * max(matrix.shape) ** 0.5)

    @staticmethod
    def _adam(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state |= {"step": 0, "average": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
        state["step"] += 1
        first, second = group["betas"]
        average = state["average"].lerp_(gradient, 1 - first) / (1 - first ** state["step"])
        square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["step"])
        return average / (square.sqrt() + 1e-8)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return nearly U V^T for a matrix U S V^T: singular values between about 0.7 and 1.2.

    The rounds run on the small Gram matrix, and the product of their polynomials is applied once.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.float() if wide else matrix.float().T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    identity = torch.eye(len(gram), device=x.device)
    product, (a, b, c) = identity, COEFFICIENTS
    for _ in range(ROUNDS):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return (x if wide else x.T).to(matrix.dtype)


def muon_groups(module: nn.Module, weight_decay: float, last: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Sort a network's weights into groups for ``Muon``; ``last`` names output layers, which it leaves to AdamW."""
    apart = {id(p) for p in last}
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in apart]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in apart]
    return [
        {"params": matrices, "weight_decay": weight_decay, "orthogonal": True},
        {"params": others, "weight_decay": 0.0, "orthogonal": False},
    ]
