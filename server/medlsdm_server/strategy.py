"""How replies become the next weights, as a plan says it; ``averaging`` does it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strategy(BaseModel):
    """Say how replies become the next weights. Options that a strategy does not know are ignored by it.

    ``proximal_mu`` pulls each site's training towards the weights it was sent (FedProx); ``eta`` and the betas are
    FedAdam's; ``beta`` is the share cut off at either end (trimmed mean); ``malicious`` how many sites Krum expects to
    be wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["fedavg", "fedprox", "fedadam", "fedmedian", "trimmed-mean", "krum"] = "fedavg"
    proximal_mu: float = Field(default=0.01, ge=0, le=100)
    eta: float = Field(default=0.01, gt=0, le=10)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=0.001, gt=0, le=1)
    beta: float = Field(default=0.2, ge=0, lt=0.5)
    malicious: int = Field(default=0, ge=0, le=1000)
