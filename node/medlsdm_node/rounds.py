"""One federated round at one hospital: ask policy and ledger, train, hand back weights. No Flower here."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from medlsdm.errors import ConfigError
from medlsdm.federation.arrays import Arrays, check_like
from medlsdm.federation.plan import RoundPlan, RoundReply, Stage
from medlsdm.privacy.ledger import PrivacyLedger
from medlsdm_node.auditing import check_ledger
from medlsdm_node.home import NodeHome
from medlsdm_node.plans import check_approved, check_roster
from medlsdm_node.policy import SitePolicy, load_policy
from medlsdm_node.status import write_activity
from medlsdm_node.vault import LATENTS, PAIR, Vault

if TYPE_CHECKING:
    from medlsdm.config import Preset
    from medlsdm.training.loop import Progress
    from medlsdm.training.patients import TrainingSet
    from medlsdm.training.stage2 import LatentSet

REPORT_SECONDS = 1.0


def run_round(home: NodeHome, plan: RoundPlan, arrays: Arrays) -> tuple[Arrays, RoundReply]:
    """Train as the plan asks, if policy and ledger allow it.

    Returns:
        The trained weights, and what the site says about the round.

    Raises:
        MedlsdmError: Policy, ledger, data or weights do not allow the round; nothing was trained.
    """
    vault, policy = Vault(home), load_policy(home.policy_file)
    policy.check_hours()
    policy.check_plan(plan, vault.schema)
    check_roster(home, plan, policy)
    check_approved(home, plan, policy)
    subjects = vault.subjects()
    policy.check_patients(len(subjects))
    ledger = PrivacyLedger(home.root / "ledger.jsonl")
    check_ledger(home, home.audit.records())
    ledger.check(policy.max_epsilon)
    patients = hashlib.sha256("|".join(sorted(subjects)).encode() + home.derive("ledger")).hexdigest()
    charge = ledger.charge(run=plan.model, round=plan.round, mechanism=plan.privacy, patients_digest=patients)
    home.audit.append("round", model=plan.model, stage=plan.stage, round=plan.round, steps=plan.steps, ledger=charge)
    started = time.monotonic()
    trainer = _stage1 if plan.stage is Stage.STAGE1 else _stage2
    trained, loss = trainer(home, vault, plan.model_copy(update={"seed": _seed(home, plan, policy)}), arrays)
    seconds = time.monotonic() - started
    write_activity(home, "sending", model=plan.model, stage=plan.stage, round=plan.round, rounds=plan.rounds)
    reply = RoundReply(
        weight=policy.declared_weight(len(subjects)),
        loss=round(loss, 5) if policy.share_loss else None,
        training_seconds=round(seconds, 2),
    )
    return trained, reply


def _seed(home: NodeHome, plan: RoundPlan, policy: SitePolicy) -> int:
    """Return the seed of the training's order: drawn here from a key that nobody else has, unless policy says not."""
    if policy.seed == "coordinator":
        return plan.seed
    drawn = hashlib.sha256(home.derive("seed") + f"{plan.model}|{plan.stage}|{plan.round}".encode()).digest()
    return int.from_bytes(drawn[:4], "big")


def _preset(plan: RoundPlan) -> Preset:
    from pydantic import ValidationError

    from medlsdm.config import Preset

    try:
        return Preset.model_validate(plan.preset)
    except ValidationError as error:
        raise ConfigError(
            "The round's model settings cannot be read.", "Install the same release on both sides."
        ) from error


def _data(vault: Vault, preset: Preset) -> TrainingSet:
    from medlsdm.training.patients import prepare

    return prepare(vault.pairs(), preset)


def _load(module: Any, arrays: Arrays) -> None:
    import torch

    check_like(arrays, module.state_dict())
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})


def _pull_back(module: Any, mu: float) -> None:
    """Add to every gradient that of ``mu / 2`` times the squared distance from the weights that were sent.

    Source: FedProx (arXiv 1812.06127), equation 2.
    """
    for parameter in module.parameters() if mu else ():
        sent = parameter.detach().clone()
        parameter.register_hook(lambda gradient, p=parameter, s=sent: gradient + mu * (p.detach() - s))


def _unload(module: Any) -> Arrays:
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def _stage1(home: NodeHome, vault: Vault, plan: RoundPlan, arrays: Arrays) -> tuple[Arrays, float]:
    from medlsdm.models.vqgan import build_autoencoder
    from medlsdm.training.texture import train_first_stage

    preset = _preset(plan)
    model = build_autoencoder(preset, len(vault.schema.ids))
    _load(model, arrays)
    _pull_back(model, plan.proximal_mu)
    loss = train_first_stage(
        model, _data(vault, preset), preset, steps=plan.steps, first_step=plan.first_step,
        total_steps=plan.total_steps, seed=plan.seed, progress=_reporter(home, plan),
    )  # fmt: skip
    return _unload(model), loss


def _stage2(home: NodeHome, vault: Vault, plan: RoundPlan, arrays: Arrays) -> tuple[Arrays, float]:
    from medlsdm.models.unet import build_denoiser
    from medlsdm.training.stage2 import train_stage2

    preset = _preset(plan)
    model = build_denoiser(preset, len(vault.schema.ids))
    _load(model, arrays)
    _pull_back(model, plan.proximal_mu)
    latents = _latents(home, vault, plan, preset)
    loss = train_stage2(
        model, latents, preset.stage2, steps=plan.steps, first_step=plan.first_step,
        total_steps=plan.total_steps, seed=plan.seed, progress=_reporter(home, plan),
    )  # fmt: skip
    return _unload(model), loss


def _latents(home: NodeHome, vault: Vault, plan: RoundPlan, preset: Preset) -> LatentSet:
    """Return the latents under the frozen autoencoder: from the vault, else encoded once and kept there."""
    from dataclasses import fields

    from safetensors.numpy import load, save

    from medlsdm.checkpoints import load_checkpoint
    from medlsdm.training.stage2 import LatentSet, encode_latents
    from medlsdm_node.coordinator import Coordinator

    names = "|".join([plan.autoencoder, *vault.names(PAIR)])
    name = hashlib.sha256(names.encode()).hexdigest()[:32]
    if name in vault.names(LATENTS):
        return LatentSet(**load(vault.get(LATENTS, name)))
    write_activity(home, "encoding", model=plan.model, stage=plan.stage, round=plan.round, rounds=plan.rounds)
    folder = Coordinator.joined(home).fetch_model(plan.autoencoder)
    autoencoder = load_checkpoint(folder).build_autoencoder()
    latents = encode_latents(autoencoder, _data(vault, preset))
    for old in vault.names(LATENTS):
        vault.delete(LATENTS, old)
    arrays = {f.name: np.ascontiguousarray(getattr(latents, f.name)) for f in fields(LatentSet)}
    vault.put(LATENTS, name, save(arrays))
    return latents


def _reporter(home: NodeHome, plan: RoundPlan) -> Callable[[Progress], None]:
    """Return what writes step and loss to this node's own files, about once a second."""
    last = started = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        now, done = time.monotonic(), progress.step - plan.first_step
        if now - last < REPORT_SECONDS and done < plan.steps:
            return
        last = now
        row = {"stage": plan.stage, "round": plan.round, "step": progress.step, "loss": round(progress.loss, 5)}
        with home.losses.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"model": plan.model} | row) + "\n")
        left = (now - started) / max(done, 1) * (plan.steps - done)
        write_activity(
            home,
            "training",
            model=plan.model,
            **row,
            rounds=plan.rounds,
            steps=plan.steps,
            done=done,
            seconds_left=round(left, 1),
        )

    return report
