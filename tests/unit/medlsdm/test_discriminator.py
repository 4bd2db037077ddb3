from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.config import AdversarialConfig
from medlsdm.models.discriminator import Discriminators, PatchDiscriminator, random_slices, with_high_pass
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.training.adversary import Adversary, build_adversary, feature_distance
from medlsdm.training.loop import make_optimiser
from medlsdm.training.stage1 import train_stage1

NOW = AdversarialConfig(weight=0.1, start=0.0, warmup=0, channels=8)


def grainy(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("shape", [(28, 40, 28), (4, 4, 4), (5, 9, 7)])
def test_discriminators_judge_patches_of_any_volume(shape):
    verdicts = Discriminators(AdversarialConfig(slices=3))(torch.randn(2, 1, *shape))
    volume, *planes = verdicts
    assert volume.logits.shape == (2, 1, *(n // 4 for n in shape))
    assert [v.logits.shape[0] for v in planes] == [6, 6, 6]
    assert planes[1].logits.shape[2:] == (shape[0] // 4, shape[2] // 4)
    assert [len(v.features) for v in verdicts] == [3] * 4


def test_a_volume_is_judged_alike_whatever_shares_its_batch():
    torch.manual_seed(0)
    judge, volumes = PatchDiscriminator(3, 8), grainy(3, 0)
    torch.testing.assert_close(judge(volumes).logits[1:2], judge(volumes[1:2]).logits)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in judge.modules())


def test_a_judgement_looks_no_further_than_its_patch():
    layers = PatchDiscriminator(3, 4)
    for module in layers.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda input: input  # its statistics span the volume
    volume = torch.randn(1, 1, 64, 8, 8).requires_grad_()
    layers(volume).logits[0, 0, 8].sum().backward()
    assert volume.grad is not None
    seen = volume.grad[0, 0].abs().sum(dim=(1, 2)).nonzero()
    assert seen.max() - seen.min() + 1 <= 28


def test_high_pass_is_loud_on_grain_and_silent_on_flat_ground():
    assert not with_high_pass(torch.full((1, 1, 5, 5, 5), 0.7))[:, 1].abs().max() > 1e-5
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 2, 2] = 0.9
    assert with_high_pass(dot)[0, 1, 2, 2].item() == pytest.approx(8 * 0.8)


def test_slices_of_a_batch_lie_at_the_same_places():
    volumes = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(2, 1, 6, 5, 4) + torch.tensor([0.0, 10]).view(2, 1, 1, 1, 1)
    cut = random_slices(volumes, 0, 3)
    assert cut.shape == (6, 1, 5, 4)
    assert torch.equal(cut[3:], cut[:3] + 10)


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_discriminators_learn_to_tell_blurred_from_grainy(kind):
    torch.manual_seed(0)
    adversary = Adversary(NOW.model_copy(update={"discriminators": (kind,), "slices": 1, "channels": 4}))
    seen = []
    for step in range(40):
        real = functional.avg_pool3d(grainy(2, step), 3, 1, 1)
        fake = functional.avg_pool3d(functional.avg_pool3d(grainy(2, 1000 + step), 3, 1, 1), 3, 1, 1) * 1.4
        adversary._learn(fake, real)
        seen.append(adversary.hinge)
    assert sum(seen[:5]) / 5 > 1.6
    assert sum(seen[-10:]) / 10 < 1.0


class Decoder(nn.Module):
    """Blur, with one weight to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


def pushed(config: AdversarialConfig, *, step: int = 0, total: int = 100) -> tuple[Tensor, Tensor, Adversary]:
    torch.manual_seed(0)
    adversary, decoder = Adversary(config), Decoder()
    volumes = grainy(2, 0)
    rebuilt = decoder(volumes)
    loss = (rebuilt - volumes).abs().mean()
    weight = decoder.out.weight
    extra = adversary.push(rebuilt, volumes, loss, weight, step=step, total=total)
    (given,) = torch.autograd.grad(loss, weight, retain_graph=True)
    if not extra.requires_grad:
        return given, torch.zeros_like(given), adversary
    (push,) = torch.autograd.grad(extra, weight)
    return given, push, adversary


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_the_push_is_a_share_of_the_other_losses_gradient(weight):
    given, push, _ = pushed(NOW.model_copy(update={"weight": weight, "limit": 1e9}))
    assert (push.norm() / given.norm()).item() == pytest.approx(weight, rel=1e-3)


def test_the_push_of_a_flat_discriminator_stays_bounded():
    given, push, _ = pushed(NOW.model_copy(update={"limit": 0.01}))
    assert push.norm() < 0.01 * given.norm()


def test_discriminators_start_late_and_push_later():
    config = NOW.model_copy(update={"start": 0.25, "warmup": 10})
    learnt, pushes = [], []
    for step in (24, 25, 34, 35):
        _, push, adversary = pushed(config, step=step)
        learnt.append(adversary.hinge == adversary.hinge)
        pushes.append(bool(push.any()))
    assert learnt == [False, True, True, True]
    assert pushes == [False, False, False, True]


def test_the_push_leaves_no_gradient_on_the_discriminators():
    torch.manual_seed(0)
    adversary, decoder = Adversary(NOW.model_copy(update={"feature_matching": 1.0})), Decoder()
    rebuilt = decoder(grainy(1, 0))
    loss = rebuilt.square().mean()
    extra = adversary.push(rebuilt, grainy(1, 0), loss, decoder.out.weight, step=0, total=1)
    before = [p.grad.clone() for p in adversary.discriminators.parameters() if p.grad is not None]
    (loss + extra).backward()
    after = [p.grad for p in adversary.discriminators.parameters() if p.grad is not None]
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert decoder.out.weight.grad is not None


def test_feature_matching_is_zero_for_equals():
    torch.manual_seed(0)
    discriminators, volumes = Discriminators(NOW), grainy(1, 0)
    torch.manual_seed(1)
    reals = discriminators(volumes)
    torch.manual_seed(1)
    assert feature_distance(discriminators(volumes), reals).item() == 0
    torch.manual_seed(1)
    assert feature_distance(discriminators(volumes * 2), reals).item() > 0.01


def test_r1_keeps_discriminators_flat_at_real_volumes():
    def steepness(r1: float) -> float:
        torch.manual_seed(0)
        adversary = Adversary(NOW.model_copy(update={"r1": r1, "discriminators": ("3d",)}))
        for step in range(15):
            real = functional.avg_pool3d(grainy(1, step), 3, 1, 1)
            adversary._learn(functional.avg_pool3d(real, 3, 1, 1), real)
        return adversary._steepness(grainy(1, 50)).item()

    assert steepness(10.0) < 0.5 * steepness(0.0)


def test_no_adversary_unless_asked_for():
    assert build_adversary(AdversarialConfig()) is None
    assert build_adversary(AdversarialConfig(feature_matching=1.0)) is not None


def test_adversarial_training_in_slices_equals_training_at_once(preset, data):
    losses = preset.stage1.losses.model_copy(update={"ssim": 0.2, "perceptual": 0.1})
    stage = preset.stage1.model_copy(update={"losses": losses})
    torch.manual_seed(0)
    whole = build_autoencoder(preset, len(data.schema.classes))
    config = NOW.model_copy(update={"start": 0.2, "warmup": 1, "feature_matching": 0.1})
    sliced, adversaries = copy.deepcopy(whole), [Adversary(config) for _ in range(3)]
    kept = make_optimiser(whole, stage)
    train_stage1(whole, data, stage, steps=4, total_steps=6, seed=3, optimiser=kept, adversary=adversaries[0])
    kept = make_optimiser(sliced, stage)
    train_stage1(sliced, data, stage, steps=2, total_steps=6, seed=3, optimiser=kept, adversary=adversaries[1])
    adversaries[2].load_state_dict(copy.deepcopy(adversaries[1].state_dict()))
    train_stage1(
        sliced, data, stage, steps=2, first_step=2, total_steps=6, seed=3, optimiser=kept, adversary=adversaries[2]
    )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(sliced.state_dict()[name], value, msg=name)
    assert adversaries[0].hinge == pytest.approx(adversaries[2].hinge)
