"""The adversarial part of stage 1: discriminators, their optimiser, and the push they give the autoencoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medlsdm.config import AdversarialConfig
from medlsdm.models.discriminator import Discriminators, Verdict
from medlsdm.training.devices import average_gradients

SEED = 20_252


class Adversary:
    """Train discriminators beside the autoencoder, and tell it how to look more real.

    They begin to learn after a share of the steps and push only after a warm-up of their own, since the
    push of a discriminator that has learnt nothing is noise. A run that goes on must keep this object's state.

    Not for differentially private training: what the discriminators learn of patients reaches the
    autoencoder by a way that no noise covers.
    """

    def __init__(self, config: AdversarialConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.discriminators = Discriminators(config).to(device)
        self.optimiser = torch.optim.AdamW(
            self.discriminators.parameters(), lr=config.learning_rate, betas=(0.5, 0.99), weight_decay=0.01
        )
        self.hinge = math.nan
        """The last step's hinge loss, for the log: 2 where nothing was told apart, 0 where everything was."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of discriminators and optimiser."""
        return {"discriminators": self.discriminators.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on from a state."""
        self.discriminators.load_state_dict(state_dict["discriminators"])
        self.optimiser.load_state_dict(state_dict["optimiser"])

    def push(
        self, rebuilt: Tensor, volumes: Tensor, loss: Tensor, last_layer: Tensor, *, step: int, total: int
    ) -> Tensor:
        """Take a discriminator step, and return what to add to the autoencoder's ``loss`` of this step.

        Args:
            rebuilt: Reconstructions [B, 1, X, Y, Z], with their graph; padding equal to that of ``volumes``.
            volumes: The real ones.
            loss: The autoencoder's other losses.
            last_layer: The decoder's last weight, where the lengths of gradients are compared.
            step: Which step of the schedule this is.
            total: How long the schedule is.
        """
        begin = self.config.start * total
        if step < begin:
            return loss.new_zeros(())
        self._learn(rebuilt.detach(), volumes)
        if step < begin + self.config.warmup:
            return loss.new_zeros(())
        fakes, reals = self._judge(rebuilt, volumes)
        wanted = -_mean([fake.logits.mean() for fake in fakes])
        extra = self._balance(loss, wanted, last_layer) * wanted
        if self.config.feature_matching:
            extra = extra + self.config.feature_matching * feature_distance(fakes, reals)
        return extra

    def _learn(self, rebuilt: Tensor, volumes: Tensor) -> None:
        """Move the discriminators one step towards telling ``rebuilt`` from ``volumes``.

        Source: Lim and Ye, Geometric GAN (arXiv 1705.02894), equation 10 (hinge); Mescheder et al.
        (arXiv 1801.04406), equation 9 (R1).
        """
        fakes, reals = _halves(self.discriminators(torch.cat([rebuilt, volumes])))
        hinge = _mean([functional.relu(1 - real.logits).mean() for real in reals])
        hinge = hinge + _mean([functional.relu(1 + fake.logits).mean() for fake in fakes])
        loss = hinge + self.config.r1 / 2 * self._steepness(volumes) if self.config.r1 else hinge
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(list(self.discriminators.parameters()))
        self.optimiser.step()
        self.hinge = float(hinge.detach())

    def _judge(self, rebuilt: Tensor, volumes: Tensor) -> tuple[list[Verdict], list[Verdict]]:
        """Judge both without a gradient for the discriminators' own weights."""
        self.discriminators.requires_grad_(False)
        try:
            return _halves(self.discriminators(torch.cat([rebuilt, volumes])))
        finally:
            self.discriminators.requires_grad_(True)

    def _balance(self, loss: Tensor, wanted: Tensor, last_layer: Tensor) -> Tensor:
        """Return the push's weight, which makes it ``weight`` times as long as the gradient of ``loss``.

        Source: Esser et al., Taming Transformers (arXiv 2012.09841), equation 7.
        """
        (given,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        (pushed,) = torch.autograd.grad(wanted, last_layer, retain_graph=True)
        ratio = given.norm() / (pushed.norm() + 1e-6)
        return self.config.weight * ratio.clamp(max=self.config.limit).detach()

    def _steepness(self, volumes: Tensor) -> Tensor:
        """Return the mean squared length of the logits' gradient at real volumes."""
        volumes = volumes.detach().requires_grad_()
        logits = torch.stack([verdict.logits.mean() for verdict in self.discriminators(volumes)]).sum() * len(volumes)
        (gradient,) = torch.autograd.grad(logits, volumes, create_graph=True)
        return gradient.flatten(1).square().sum(dim=1).mean()


def feature_distance(fakes: list[Verdict], reals: list[Verdict]) -> Tensor:
    """Return the mean absolute distance of what discriminators' layers saw in fakes and in reals.

    Source: Wang et al., pix2pixHD (arXiv 1711.11585), equation 4.
    """
    pairs = [pair for f, r in zip(fakes, reals, strict=True) for pair in zip(f.features, r.features, strict=True)]
    return _mean([(fake - real.detach()).abs().mean() for fake, real in pairs])


def _halves(verdicts: list[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Split verdicts on fakes and reals, judged in one batch, in two."""
    halves: tuple[list[Verdict], list[Verdict]] = [], []
    for verdict in verdicts:
        logits = verdict.logits.chunk(2)
        features = [layer.chunk(2) for layer in verdict.features]
        for place, half in enumerate(halves):
            half.append(Verdict(logits[place], [layer[place] for layer in features]))
    return halves


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


def build_adversary(config: AdversarialConfig, device: torch.device | str = "cpu") -> Adversary | None:
    """Return the adversary that a preset asks for, if any."""
    return Adversary(config, device) if config.weight or config.feature_matching else None
