import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SLAB = (32, 256, 256)


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_networks", Path(__file__).with_name("paper_networks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gigaflops(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize(("label_channels", "millions"), [(64, 37.9), (8, 37.1)])
def test_the_unet_has_the_published_parameters(paper: ModuleType, label_channels: int, millions: float):
    with torch.device("meta"):
        unet = paper.PaperUNet(37, label_channels)
    assert count(unet) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_pass_costs_what_the_published_one_costs(paper: ModuleType):
    with torch.device("meta"):
        unet, labels = paper.PaperUNet(37, 64), torch.zeros(1, 37, *SLAB)
        latents, times = torch.zeros(1, 8, 8, 64, 64), torch.zeros(1)
        assert gigaflops(lambda: unet(latents, times, labels)) == pytest.approx(312.6, abs=0.1)
        assert gigaflops(lambda: unet.labels(labels)) == pytest.approx(147.5, abs=0.1)


def test_the_label_path_slips_in_depth_as_published(paper: ModuleType):
    with torch.device("meta"):
        assert paper.LabelPath(3, 8)(torch.zeros(1, 3, *SLAB)).shape == (1, 8, 11, 64, 64)


def test_the_autoencoder_has_the_published_parameters_and_cost(paper: ModuleType):
    with torch.device("meta"):
        net = paper.PaperAutoencoder()
        assert count(net.encoder) / 1e6 == pytest.approx(0.442, abs=0.001)
        assert count(net.decoder) / 1e6 == pytest.approx(0.949, abs=0.001)
        assert gigaflops(lambda: net.encoder(torch.zeros(1, 1, *SLAB))) == pytest.approx(71, abs=0.2)
        assert gigaflops(lambda: net.decoder(torch.zeros(1, 8, 8, 64, 64))) == pytest.approx(802, abs=0.2)


def test_every_weight_of_both_networks_learns(paper: ModuleType):
    torch.manual_seed(0)
    unet, net = paper.PaperUNet(2, 4, width=32, multipliers=(1, 2)), paper.PaperAutoencoder(codes=32)
    labels = torch.nn.functional.one_hot(torch.arange(512).view(1, 8, 8, 8) % 2, 2).movedim(-1, 1).float()
    unet(torch.randn(1, 8, 2, 2, 2), torch.tensor([3]), labels).square().mean().backward()
    rebuilt, commitment = net(torch.randn(1, 1, 8, 8, 8))
    (rebuilt.square().mean() + commitment).backward()
    still = [n for part in (unet, net) for n, p in part.named_parameters() if p.grad is None]
    assert still == []


def test_codes_follow_the_latents_and_dead_ones_restart(paper: ModuleType):
    torch.manual_seed(0)
    book = paper.EmaCodebook(codes=4, width=2, decay=0.5)
    book.embeddings.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [60.0, 60.0]]))
    book.sums.copy_(book.embeddings)
    latents = torch.cat([torch.full((1, 2, 1, 1, 4), 0.1), torch.full((1, 2, 1, 1, 4), 0.9)], dim=-1)
    quantised, _ = book(latents)
    assert torch.equal(quantised[0, 0, 0, 0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert torch.allclose(book.embeddings[0], torch.tensor([0.2 / 2.5, 0.2 / 2.5]), atol=1e-4)
    restarted = book.embeddings[2:]
    assert ((restarted - 0.1).abs().lt(1e-6) | (restarted - 0.9).abs().lt(1e-6)).all()
