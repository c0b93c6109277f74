"""Muon and Nesterov Adam: the reference's numbers, orthogonality, fused matrices, resume, and torch's Muon beside ours."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from common import checkpoint, muon, optim
from common.config import TrainConfig
from common.errors import UserError
from common.muon import Muon, NesterovAdam, newton_schulz
from methods.base import ParamGroup


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(rows, columns, low):
    """A random matrix whose singular values run from `low` to 1."""
    u, _, vt = torch.linalg.svd(random(rows, columns), full_matrices=False)
    return u @ torch.diag(torch.linspace(low, 1, min(rows, columns))) @ vt


def run(optimizer, gradients):
    """One step for each entry of `gradients`, which holds a gradient a parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = gradient
        optimizer.step()


def zeros(*shapes):
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


# The official optimizer's numbers (optax 0.2.5, float32), spec/pmf.md section 16; printed to seven digits.
MUON = [
    [3.513071e-04, 8.223303e-05, -1.979574e-04, -4.513763e-04, -6.436994e-04],
    [1.764143e-04, -4.663210e-05, -4.938275e-04, -1.109011e-03, -1.700148e-03],
]
ADAM = [[-1.473684e-03] * 3, [-5.507560e-04, -1.061170e-03, -1.650200e-03]]


def test_muon_gives_the_references_numbers():
    (p,) = zeros((5, 3))
    gradient = torch.sin(0.37 * torch.arange(15.0)).view(3, 5).T  # the reference has its kernels (in, out)
    optimizer = Muon([p], lr=1e-3)
    for g, expected in zip((gradient, gradient * gradient), MUON, strict=True):
        run(optimizer, [[g]])
        # The first gradient has rank 2: the third direction is rounding noise that the iteration raises 500-fold, to 5e-5 of the update.
        assert p[:, 0].tolist() == pytest.approx(expected, abs=5e-8)


def test_nesterov_adam_gives_the_references_numbers():
    (p,) = zeros(3)
    optimizer = NesterovAdam([p], lr=1e-3)
    for g, expected in zip((torch.sin(0.37 * torch.arange(1.0, 4)), -torch.sin(0.37 * torch.arange(6.0, 9))), ADAM, strict=True):
        run(optimizer, [[g]])
        assert p.tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("shape", [(48, 48), (24, 80), (80, 24), (1, 9), (9, 1)])
def test_newton_schulz_orthogonalises_and_keeps_directions(shape):
    matrix = with_singular_values(*shape, low=0.1)
    orthogonal = newton_schulz(matrix[None])[0]
    values = torch.linalg.svdvals(orthogonal)
    assert values.min() > 0.65 and values.max() < 1.25
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonal @ vt.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert torch.equal(newton_schulz(torch.zeros(2, *shape)), torch.zeros(2, *shape))
    assert torch.allclose(newton_schulz(1e3 * matrix[None]), orthogonal, atol=1e-4)


def test_the_update_of_a_tall_matrix_is_scaled_by_its_shape():
    for shape, factor in {(64, 16): 2.0, (16, 64): 1.0, (32, 32): 1.0}.items():
        (p,) = zeros(shape)
        run(Muon([p], lr=0.1), [[with_singular_values(*shape, low=0.2)]])
        assert 0.65 < torch.linalg.svdvals(p.detach() / (0.1 * factor)).min() < torch.linalg.svdvals(p.detach() / (0.1 * factor)).max() < 1.25


def test_a_fused_matrix_is_stepped_as_the_matrices_it_consists_of():
    gradients = [random(36, 20, seed=k) for k in range(3)]
    (fused,) = zeros((36, 20))
    apart = zeros((12, 20), (12, 20), (12, 20))
    run(Muon([{"params": [fused], "split": 3}]), [[g] for g in gradients])
    run(Muon(apart), [g.chunk(3) for g in gradients])
    assert torch.allclose(fused, torch.cat([p.detach() for p in apart]), atol=1e-8)
    (whole,) = zeros((36, 20))
    run(Muon([whole]), [[g] for g in gradients])
    assert (whole - fused).abs().max() > 1e-5  # the split is not a formality


def test_batches_change_nothing(monkeypatch):
    shapes = [(8, 6)] * 5 + [(6, 8)] * 2
    gradients = [[random(*shape, seed=10 * k + j) for j, shape in enumerate(shapes)] for k in range(3)]
    together = zeros(*shapes)
    run(Muon(together), gradients)
    monkeypatch.setattr(muon, "MAX_STACKED", 100)  # two matrices at a time
    in_parts = zeros(*shapes)
    run(Muon(in_parts), gradients)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(together, in_parts, strict=True))


def test_torchs_muon_is_near_ours():
    """No bias correction and a bfloat16 iteration: the spec measured 3.8 % of the update after four steps."""
    gradients = [[random(32, 48, seed=k) + 2 * random(32, 48, seed=9)] for k in range(4)]
    (ours,), (theirs,) = zeros((32, 48)), zeros((32, 48))
    run(Muon([ours]), gradients)
    run(torch.optim.Muon([theirs], lr=1e-3, weight_decay=0.0), gradients)
    assert 1e-4 < (ours - theirs).norm() / ours.norm() < 0.038


def test_nesterov_adam_follows_its_formula():
    gradients = [random(7, seed=k).double() for k in range(5)]
    p = nn.Parameter(random(7, seed=9).double())
    expected, m, v = p.detach().clone(), 0.0, 0.0
    for n, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        u = 0.9 * m / (1 - 0.9 ** (n + 1)) + 0.1 * g / (1 - 0.9**n)
        expected = expected - 0.01 * (u / (torch.sqrt(v / (1 - 0.95**n)) + 1e-2) + 0.3 * expected)
    run(NesterovAdam([p], lr=0.01, eps=1e-2, weight_decay=0.3), [[g] for g in gradients])
    assert torch.allclose(p, expected, atol=1e-14)


@pytest.mark.parametrize("make", [Muon, NesterovAdam])
def test_weight_decay_is_decoupled(make):
    p = nn.Parameter(torch.ones(4, 3))
    run(make([p], lr=0.1, weight_decay=0.5), [[torch.zeros(4, 3)]])
    assert torch.allclose(p, torch.full((4, 3), 0.95))


@pytest.mark.parametrize("make", [Muon, NesterovAdam])
def test_a_parameter_without_gradient_waits_and_counts_for_itself(make):
    late, always = zeros((4, 3), (4, 3))
    optimizer = make([late, always])
    gradients = [random(4, 3, seed=k) for k in range(3)]
    run(optimizer, [[None, g] for g in gradients[:2]])
    assert not late.any() and late not in optimizer.state
    run(optimizer, [[gradients[0], gradients[2]]])
    (alone,) = zeros((4, 3))
    run(make([alone]), [[gradients[0]]])
    assert torch.allclose(late, alone, atol=1e-9)
    assert [float(optimizer.state[p]["step"]) for p in (late, always)] == [1, 3]


def groups_of(module):
    return [
        ParamGroup([module.qkv], kind="muon", split=3),
        ParamGroup([module.out], kind="muon", lr_scale=0.5, weight_decay=0.1),
        ParamGroup([module.bias], kind="nesterov_adam"),
    ]


def fused_module():
    module = nn.Module()
    module.qkv, module.out, module.bias = (nn.Parameter(random(*shape, seed=4)) for shape in ((24, 8), (8, 8), (8,)))
    return module


def step_module(module, optimizers, seeds):
    for seed in seeds:
        for j, p in enumerate(module.parameters()):
            p.grad = random(*p.shape, seed=100 * seed + j)
        for optimizer in optimizers:
            optimizer.step()


def test_resume_is_exact():
    whole, cut = fused_module(), fused_module()
    settings = TrainConfig(lr=0.01)
    step_module(whole, optim.build_optimizers(groups_of(whole), settings), range(6))

    optimizers = optim.build_optimizers(groups_of(cut), settings)
    step_module(cut, optimizers, range(3))
    names = {p: name for name, p in cut.named_parameters()}
    saved = [save(checkpoint.optimizer_state(optimizer, names)) for optimizer in optimizers]
    resumed = optim.build_optimizers(groups_of(cut), settings)
    for optimizer, state in zip(resumed, saved, strict=True):
        checkpoint.load_optimizer_state(optimizer, load(state), names)
    step_module(cut, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_builders_hand_on_what_the_groups_say():
    first, second = optim.build_optimizers(groups_of(fused_module()), TrainConfig(lr=0.2, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.01))
    assert isinstance(first, Muon) and isinstance(second, NesterovAdam)
    assert [group["split"] for group in first.param_groups] == [3, 1]
    assert [group["weight_decay"] for group in first.param_groups] == [0.01, 0.1]
    assert (second.defaults["betas"], second.defaults["eps"]) == ((0.8, 0.9), 1e-6)
    optim.set_learning_rate(first, 0.02)
    assert [group["lr"] for group in first.param_groups] == [0.02, 0.01]


def test_torch_muon_is_built_for_plain_matrices_only():
    module = fused_module()
    (optimizer,) = optim.build_optimizers([ParamGroup([module.out], kind="torch_muon", lr_scale=0.5)], TrainConfig())
    assert type(optimizer) is torch.optim.Muon and optimizer.param_groups[0]["weight_decay"] == 0
    with pytest.raises(UserError, match=r"cannot split.*\(24, 8\).*Use muon"):
        optim.build_optimizers([ParamGroup([module.qkv], kind="torch_muon", split=3)], TrainConfig())


def test_wrong_shapes_and_kinds_are_refused():
    with pytest.raises(ValueError, match=r"split=1, not \(3,\)"):
        Muon(zeros(3))
    with pytest.raises(ValueError, match=r"split=3, not \(4, 3\)"):
        Muon(zeros((4, 3)), split=3)
    with pytest.raises(UserError, match="kinds \\['sgd'\\] are not known"):
        optim.build_optimizers([ParamGroup(zeros(3), kind="sgd")], TrainConfig())


def test_a_quadratic_is_minimised():
    goal, p = random(16, 8), nn.Parameter(torch.zeros(16, 8))
    optimizer = Muon([p], lr=0.2)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        p.grad = 2 * (p.detach() - goal)
        optimizer.step()
    assert (p - goal).norm() < 0.02 * goal.norm()


def test_a_group_may_have_betas_of_its_own():
    groups = [ParamGroup(zeros((2, 2)), betas=(0.5, 0.9)), ParamGroup(zeros((2, 2)))]
    (optimizer,) = optim.build_optimizers(groups, TrainConfig(betas=[0.9, 0.95]))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.9), (0.9, 0.95)]
