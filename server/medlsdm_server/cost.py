"""What a launch would cost and whether it could start: bytes, minutes on a slow line, checks, before it begins."""

from __future__ import annotations

import hashlib
import shutil
import time
from typing import Any

from medlsdm_server.contacts import Contact, read_contacts
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import FederationPlan
from medlsdm_server.registry import ADMITTED, Registry

LINE_MBIT = 10.0
HEARD_SECONDS = 60


def cost_of(home: ServerHome, plan: FederationPlan) -> dict[str, Any]:
    """Return digest, summary, bytes by stage, minutes on a line of 10 Mbit/s, and checks with their outcome."""
    import torch

    from medlsdm.config import load_preset, load_schema
    from medlsdm.models.unet import build_denoiser
    from medlsdm.models.vqgan import build_autoencoder

    preset, schema = load_preset(plan.preset), load_schema(plan.schema_)
    with torch.random.fork_rng(devices=[]):
        models = {
            "stage1": build_autoencoder(preset, len(schema.ids)),
            "stage2": build_denoiser(preset, len(schema.ids)),
        }
    stages, kept = {}, 0
    for stage, model in models.items():
        size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
        rounds, steps = getattr(plan, stage).rounds, getattr(plan, stage).steps
        stages[stage] = {"rounds": rounds, "steps": steps, "bytes": size, "sent_bytes": rounds * size}
        kept += size * (plan.keep + 3)
    moved = 2 * sum(row["sent_bytes"] for row in stages.values())
    return {
        "digest": hashlib.sha256(plan.model_dump_json(by_alias=True).encode()).hexdigest(),
        "summary": f"{plan.preset} on {plan.schema_}, {plan.sites} sites, {plan.strategy.name}",
        "stages": stages,
        "line_mbit": LINE_MBIT,
        "line_minutes": round(8 * moved / (LINE_MBIT * 1e6) / 60, 1),
        "checks": _checks(home, plan, kept),
    }


def _checks(home: ServerHome, plan: FederationPlan, kept_bytes: int) -> list[dict[str, Any]]:
    admitted = [s for s in Registry(home.registry).sites() if s.status == ADMITTED]
    contacts, now = read_contacts(home), time.time()
    here = [s for s in admitted if now - contacts.get(s.name, Contact()).at < HEARD_SECONDS]
    free = shutil.disk_usage(home.root).free
    strategy = plan.strategy
    lone = plan.sites - 2 * strategy.malicious
    checks = [
        (len(admitted) >= plan.sites, f"{len(admitted)} sites are admitted; the plan needs {plan.sites}"),
        (len(here) >= plan.sites, f"{len(here)} of them were heard of within a minute"),
        (free > 2 * kept_bytes, f"{free / 1e9:.1f} GB are free; checkpoints will take up to {kept_bytes / 1e9:.2f} GB"),
        (plan.sites >= 2, f"{plan.sites} sites take part; an average of one is that site's own update"),
    ]
    if strategy.name == "krum":
        least = 2 * strategy.malicious + 3
        checks.append((lone > 2, f"Krum with {strategy.malicious} wrong sites needs at least {least} sites"))
    return [{"ok": ok, "what": what} for ok, what in checks]
