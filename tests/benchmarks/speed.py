"""Time our networks against the published ones, MONAI's and our own slow sampler. ``make bench-speed``.

One thread, process CPU time. The arms of one comparison take turns in one process, so that whatever else the
machine does weighs on all of them alike; the median counts. Weights are random: a step costs what it costs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from paper_networks import PaperAutoencoder, PaperUNet
from pydantic import ValidationError
from torch import Tensor, nn

from medlsdm.checkpoints import Checkpoint, make_checkpoint
from medlsdm.config import Preset, StageConfig, load_preset, load_schema, parse_preset
from medlsdm.models.spade import one_hot
from medlsdm.models.unet import SemanticUNet, build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.synthesis import Synthesiser
from medlsdm.training.loop import make_optimiser
from medlsdm.types import Geometry, Modality, SemanticMap

CLASSES = 3
LABEL_CHANNELS = 8
"""What the publication used for a map of three classes."""

LATENT, VOLUME = (10, 16, 16), (40, 64, 64)
"""The published U-Net asks for planes that divide by 8 in latents."""

CROP = (40, 56, 40)
PRECISIONS = ("fp32", "bf16")
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """Compare two arms: ours and another, median CPU milliseconds. ``value`` is what the bars speak of."""

    name: str
    ours_ms: float
    other_ms: float
    value: float
    must: float | None = None
    goal: float | None = None
    higher: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return goal, must, missed, or nothing where there is no bar."""
        for bar, word in ((self.goal, "goal"), (self.must, "must")):
            if bar is not None and (self.value >= bar if self.higher else self.value <= bar):
                return word
        return "missed" if self.must is not None else ""


def alternate(arms: dict[str, Work], repeats: int) -> dict[str, float]:
    """Return each arm's median CPU milliseconds; arms take turns, after one unmeasured turn each."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, work in arms.items():
            started = time.process_time()
            work()
            if turn:
                taken[name].append(1000 * (time.process_time() - started))
    return {name: median(values) for name, values in taken.items()}


def precision(name: str) -> torch.autocast | nullcontext[None]:
    """Return the context of one precision."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if name == "bf16" else nullcontext()


def filled(module: nn.Module) -> nn.Module:
    """Fill what starts at zero, so that no product is of zeros."""
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return module


def millions(module: nn.Module) -> float:
    """Return the number of parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def labels_of(shape: tuple[int, int, int], batch: int = 1) -> Tensor:
    """Return a one-hot map of blocks."""
    axes = np.indices(shape) // 8
    return one_hot(torch.from_numpy(axes.sum(0) % CLASSES).expand(batch, *shape), CLASSES)


def training_step(loss: Callable[[], Tensor], module: nn.Module, optimiser: torch.optim.Optimizer, kind: str) -> None:
    """Take one step: forward, backward, clip, update."""
    with precision(kind):
        value = loss()
    optimiser.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()


def backward(loss: Callable[[], Tensor], module: nn.Module, kind: str) -> None:
    """Go forward and backward once."""
    module.zero_grad(set_to_none=True)
    with precision(kind):
        value = loss()
    value.backward()


@torch.inference_mode()
def forward(call: Callable[[], object], kind: str) -> None:
    """Go forward once, without gradients."""
    with precision(kind):
        call()


def our_pass(unet: SemanticUNet, labels: Tensor, latents: Tensor) -> Tensor:
    """Return our U-Net's answer, the label path included."""
    spacing, modality = torch.ones(len(latents), 3), torch.ones(len(latents), dtype=torch.long)
    return unet(latents, torch.full((len(latents),), 0.5), unet.prepare_labels(labels), spacing, modality)


def published_rows(preset: Preset, repeats: int) -> Iterator[Row]:
    """Compare training steps of both stages with the published networks, batch 1."""
    ours, paper = filled(build_denoiser(preset, CLASSES)), PaperUNet(CLASSES, LABEL_CHANNELS)
    latents, labels = torch.randn(1, preset.autoencoder.latent_channels, *LATENT), labels_of(VOLUME)
    other, steps = torch.randn(1, 8, *LATENT), torch.tensor([250])
    losses = (
        lambda: (our_pass(ours, labels, latents).float() - latents).square().mean(),  # type: ignore[arg-type]
        lambda: (paper(other, steps, labels).float() - other).abs().mean(),
    )
    sizes = f"{millions(ours):.2f} M against {millions(paper):.1f} M"
    bars = {"fp32": (3.0, 5.0), "bf16": (8.0, 15.0)}
    name = "stage-2 training step against paper, {}"
    yield from _against_paper(name, (ours, paper), losses, preset.stage2, bars, sizes, repeats)

    ours, paper = filled(build_autoencoder(preset, CLASSES)), PaperAutoencoder()
    volumes, labels = torch.rand(1, 1, *CROP) * 2 - 1, labels_of(CROP)

    def paper_loss() -> Tensor:
        rebuilt, commitment = paper(volumes)
        return 4 * (rebuilt.float() - volumes).abs().mean() + commitment

    losses = (lambda: (ours(volumes, labels) - volumes).abs().mean(), paper_loss)
    sizes = f"{millions(ours):.2f} M against {millions(paper):.2f} M and 16384 codes; no discriminators"
    name = "stage-1 training step against paper, {}"
    yield from _against_paper(name, (ours, paper), losses, preset.stage1, {}, sizes, max(2, repeats // 2))


def _against_paper(
    name: str, modules: tuple[nn.Module, nn.Module], losses: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    stage: StageConfig, bars: dict[str, tuple[float, float]], note: str, repeats: int,
) -> Iterator[Row]:  # fmt: skip
    ours, paper = modules
    optimisers = make_optimiser(ours, stage), torch.optim.Adam(paper.parameters(), lr=1e-5)
    for kind in PRECISIONS:
        arms = {
            "ours": partial(training_step, losses[0], ours, optimisers[0], kind),
            "paper": partial(training_step, losses[1], paper, optimisers[1], kind),
        }
        took = alternate(arms, repeats)
        must, goal = bars.get(kind, (None, None))
        yield Row(name.format(kind), took["ours"], took["paper"], took["paper"] / took["ours"], must, goal, note=note)


def monai_rows(preset: Preset, repeats: int) -> Iterator[Row]:
    """Compare forward and forward with backward against MONAI's networks of equal parameter count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets import VQVAE, SPADEAutoencoderKL, SPADEDiffusionModelUNet

    def vqvae(width: int) -> nn.Module:
        return VQVAE(
            3, 1, 1, channels=(width, 2 * width), num_res_layers=1, num_res_channels=(width, 2 * width),
            downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            num_embeddings=512, embedding_dim=8,
        )  # fmt: skip

    def spade_autoencoder(width: int) -> nn.Module:
        return SPADEAutoencoderKL(
            3, CLASSES, in_channels=1, out_channels=1, num_res_blocks=(1, 1, 1), channels=(width, 2 * width, 4 * width),
            attention_levels=(False,) * 3, latent_channels=8, norm_num_groups=4, with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False, spade_intermediate_channels=preset.autoencoder.label_width,
        )  # fmt: skip

    def spade_unet(label_width: int, channels: int, width: int) -> nn.Module:
        return SPADEDiffusionModelUNet(
            3, channels, channels, CLASSES, num_res_blocks=1, channels=(width, 2 * width),
            attention_levels=(False, False), norm_num_groups=8, num_head_channels=8,
            spade_intermediate_channels=label_width,
        )  # fmt: skip

    untextured = preset.autoencoder.model_copy(update={"texture_channels": 0})  # these calls do not draw texture
    ours = filled(build_autoencoder(preset.model_copy(update={"autoencoder": untextured}), CLASSES))
    volumes, labels = torch.rand(2, 1, *CROP) * 2 - 1, labels_of(CROP, 2)
    for name, build in (("VQVAE (no labels)", vqvae), ("SPADEAutoencoderKL", spade_autoencoder)):
        theirs = matched(build, millions(ours), range(8, 129, 4))
        given = (volumes, labels) if build is spade_autoencoder else (volumes,)
        calls = (partial(ours, volumes, labels), partial(_first, theirs, *given))
        yield from _against_monai(f"autoencoder against MONAI {name}", (ours, theirs), calls, volumes, repeats)

    big = preset.denoiser.model_copy(update={"channels": tuple(4 * c for c in preset.denoiser.channels)})
    for size, denoiser, label_width in (("tiny", preset.denoiser, preset.denoiser.label_width), ("x4 wide", big, 128)):
        settings = preset.model_copy(update={"denoiser": denoiser})
        unet = filled(build_denoiser(settings, CLASSES))
        channels = preset.autoencoder.latent_channels
        other = matched(partial(spade_unet, label_width, channels), millions(unet), range(8, 257, 8))
        latents, labels = torch.randn(1, channels, *LATENT), labels_of(VOLUME)
        time = torch.tensor([500])
        calls = (partial(our_pass, unet, labels, latents), partial(other, latents, time, labels))  # type: ignore[arg-type]
        yield from _against_monai(f"U-Net ({size}) against MONAI SPADE U-Net", (unet, other), calls, latents, repeats)


def _first(network: nn.Module, *given: Tensor) -> Tensor:
    """Return the reconstruction, the first of what MONAI's autoencoders return."""
    return network(*given)[0]


def _against_monai(
    name: str, modules: tuple[nn.Module, nn.Module], calls: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    target: Tensor, repeats: int,
) -> Iterator[Row]:  # fmt: skip
    note = f"{millions(modules[0]):.2f} M against {millions(modules[1]):.2f} M; share of MONAI's time"
    losses = [lambda call=call: (call().float() - target).square().mean() for call in calls]
    for kind in PRECISIONS:
        passes = {
            "forward": [partial(forward, call, kind) for call in calls],
            "forward + backward": [partial(backward, *pair, kind) for pair in zip(losses, modules, strict=True)],
        }
        for what, works in passes.items():
            took = alternate(dict(zip(("ours", "monai"), works, strict=True)), repeats)
            value = took["ours"] / took["monai"]
            yield Row(f"{name}, {what}, {kind}", took["ours"], took["monai"], value, 1.0, 0.7, False, note)


def matched(build: Callable[[int], nn.Module], size: float, widths: range) -> nn.Module:
    """Return the network whose width brings its parameters nearest to ``size`` million."""
    with torch.device("meta"):
        best = min(widths, key=lambda width: abs(millions(build(width)) - size))
    return build(best)


def sampling_rows(preset: Preset, repeats: int) -> Iterator[Row]:
    """Time a label map's way to a volume: 8 network calls, and 300 ancestral steps of the same network."""
    schema = load_schema("hippocampus")
    blocks = (np.indices((36, 52, 36)) // 8).sum(0) % len(schema.ids)
    labels = SemanticMap(np.array(schema.ids)[blocks], Geometry(np.eye(4), blocks.shape), schema)
    fast = Synthesiser(_untrained(_sampled(preset, "euler", 8)), 1)
    draw = partial(fast.synthesise, labels, seed=1, guidance=1.0)
    took = alternate({"ours": draw}, repeats)["ours"] / 1000
    yield Row("label map to volume, 8 calls, CPU-s", 1000 * took, 0, took, 0.25, 0.1, False, "36 x 52 x 36")
    try:
        slow = Synthesiser(_untrained(_sampled(preset, "ancestral", 300)), 1)
    except ValidationError:
        return
    arms = {"ours": draw, "slow": partial(slow.synthesise, labels, seed=1, guidance=1.0)}
    both = alternate(arms, max(1, repeats // 3))
    ratio = both["slow"] / both["ours"]
    note = "same network; quality is make bench-model's to judge"
    yield Row("8 calls against 300 ancestral steps", both["ours"], both["slow"], ratio, 25, 60, note=note)


def _sampled(preset: Preset, sampler: str, steps: int) -> Preset:
    data = preset.model_dump(mode="json")
    data["sampling"] |= {"sampler": sampler, "steps": steps}
    return Preset.model_validate(data)


def _untrained(preset: Preset) -> Checkpoint:
    schema = load_schema("hippocampus")
    parts = [filled(build(preset, len(schema.classes))).state_dict() for build in (build_autoencoder, build_denoiser)]
    made, _ = make_checkpoint(
        preset=preset, schema=schema, modalities=[Modality.MR], autoencoder=parts[0], denoiser=parts[1]
    )
    return made


def render(rows: list[Row]) -> str:
    """Return the table as text."""
    lines = [f"{'':68} {'ours ms':>9} {'other ms':>9} {'value':>8} {'must':>6} {'goal':>6}"]
    for r in rows:
        bars = [f"{bar:6g}" if bar is not None else " " * 6 for bar in (r.must, r.goal)]
        other = f"{r.other_ms:9.1f}" if r.other_ms else " " * 9
        lines.append(f"{r.name:68} {r.ours_ms:9.1f} {other} {r.value:8.3g} {' '.join(bars)}  {r.verdict:7} {r.note}")
    return "\n".join(lines)


def processor() -> str:
    """Say what the figures depend on: the processor and its bfloat16 units."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="ascii", errors="ignore") if path.is_file() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    units = [name for name in ("avx512_bf16", "amx_bf16") if name in text]
    return f"{model or platform.processor()}; bfloat16: {', '.join(units) or 'no unit'}"


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description="Time our networks against the published ones and MONAI's.")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("paper", "monai", "sampling"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    preset = parse_preset(load_preset(chosen.preset).model_dump(mode="json"))
    rows: list[Row] = []
    for name, part in (("paper", published_rows), ("monai", monai_rows), ("sampling", sampling_rows)):
        if chosen.only not in (None, name):
            continue
        try:
            rows.extend(part(preset, chosen.repeats))
        except ModuleNotFoundError as error:
            if error.name != "monai":
                raise
            print("MONAI is not installed: no comparison with it (pip install 'medlsdm[bench]').")
    head = f"preset {preset.name}, torch {torch.__version__}, one thread, {processor()}"
    print(head, render(rows), sep="\n")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        table = [{**asdict(row), "verdict": row.verdict} for row in rows]
        chosen.json.write_text(json.dumps({"run": head, "rows": table}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
