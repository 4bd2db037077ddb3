from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medlsdm.training.muon import Muon, muon_groups, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16), (1, 7)])
def test_updates_have_equal_strength_in_every_direction(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    strengths = torch.linalg.svdvals(found)
    assert strengths.min() > 0.6
    assert strengths.max() < 1.3
    # The directions stay those of the matrix itself.
    inner = left.T @ found @ right.T
    torch.testing.assert_close(inner, torch.diag(inner.diag()), atol=2e-2, rtol=0)


def test_the_rounds_equal_those_on_the_whole_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(6, 20, dtype=torch.float32)
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalised(matrix), x, atol=1e-4, rtol=1e-3)


def test_what_is_no_matrix_is_treated_as_adamw_does():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    muon = Muon([{"params": ours.parameters(), "orthogonal": False}], lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(4, 5)
        for layer, optimiser in ((ours, muon), (theirs, adamw)):
            optimiser.zero_grad()
            layer(x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_groups_hold_every_weight_once():
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3))
    matrices, others = muon_groups(network, 0.1, network[2].parameters())
    assert [p.ndim for p in matrices["params"]] == [5]
    assert len(others["params"]) == 5
    assert {id(p) for p in matrices["params"] + others["params"]} == {id(p) for p in network.parameters()}


def test_going_on_from_a_saved_state_is_exact():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv3d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
    sliced, data = copy.deepcopy(whole), torch.randn(4, 3, 1, 2, 2, 2)
    first = Muon(muon_groups(whole, 0.1), lr=0.02)
    second = Muon(muon_groups(sliced, 0.1), lr=0.02)
    for step, x in enumerate(data):
        if step == 2:
            state = copy.deepcopy(second.state_dict())
            second = Muon(muon_groups(sliced, 0.1), lr=0.02)
            second.load_state_dict(state)
        for network, optimiser in ((whole, first), (sliced, second)):
            optimiser.zero_grad()
            network(x).square().sum().backward()
            optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sliced.parameters(), strict=True))
