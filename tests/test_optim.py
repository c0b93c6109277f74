"""Muon and Nesterov Adam: the reference's numbers, orthogonality, fused matrices, resume,
and torch's Muon beside ours.
"""

import muon_processes
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim._muon import _zeropower_via_newtonschulz as torchs_newton_schulz
from torch.utils.flop_counter import FlopCounterMode

from pixlat.common.accounting.macs import on_meta
from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.training import muon, optim
from pixlat.common.training.muon import Muon, NesterovAdam, newton_schulz
from pixlat.common.training.optim import load_optimizer_state, optimizer_state
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo, ParamGroup


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
        # The first gradient has rank 2: the third direction is rounding noise that the iteration raises 500-fold,
        # to 5e-5 of the update.
        assert p[:, 0].tolist() == pytest.approx(expected, abs=5e-8)


def test_nesterov_adam_gives_the_references_numbers():
    (p,) = zeros(3)
    optimizer = NesterovAdam([p], lr=1e-3)
    for g, expected in zip(
        (torch.sin(0.37 * torch.arange(1.0, 4)), -torch.sin(0.37 * torch.arange(6.0, 9))), ADAM, strict=True
    ):
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
        assert (
            0.65
            < torch.linalg.svdvals(p.detach() / (0.1 * factor)).min()
            < torch.linalg.svdvals(p.detach() / (0.1 * factor)).max()
            < 1.25
        )


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


# -- precision and processes -------------------------------------------------------------------------------------------

SPECTRA = {
    "even": lambda n: torch.ones(n),
    "to a hundredth": lambda n: torch.logspace(0, -2, n),
    "of low rank": lambda n: torch.cat((torch.ones(8), torch.full((n - 8,), 1e-3))),
}


def spectrum(name, rows, columns, seed):
    """A random matrix; "even" leaves a Gaussian one as it is, the others give it their singular values."""
    matrix = random(rows, columns, seed=seed)
    if name == "even":
        return matrix
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u * SPECTRA[name](min(rows, columns)) @ vt


@pytest.mark.parametrize("name", SPECTRA)
def test_bf16_is_no_further_from_the_exact_factor_than_torchs_muon(name):
    """Root mean squares over shapes and seeds of relative distances: to the exact iteration (float64),
    and to the orthogonal factor itself (SVD).
    """
    apart = []
    for shape in ((64, 64), (64, 192), (192, 64), (160, 320)):
        for seed in range(4):
            matrix = spectrum(name, *shape, seed)
            exact = newton_schulz(matrix.double()[None])[0]
            u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
            factor = u @ vt
            results = (
                newton_schulz(matrix[None], bf16=True)[0],
                torchs_newton_schulz(matrix, muon.NEWTON_SCHULZ, 5, 1e-7),
            )
            assert results[0].dtype == torch.bfloat16
            apart.append(
                [(found.double() - goal).norm() / goal.norm() for found in results for goal in (exact, factor)]
            )
    ours_exact, ours_factor, theirs_exact, theirs_factor = torch.tensor(apart).square().mean(0).sqrt().tolist()
    assert ours_exact <= theirs_exact * 1.02 and ours_factor <= theirs_factor * 1.002
    # the rounding noise of empty directions is raised up to 3.4445^5 = 485 times
    assert ours_exact < (0.4 if name == "of low rank" else 0.04)


def test_bf16_keeps_zero_and_changes_nothing_in_float32():
    assert torch.equal(newton_schulz(torch.zeros(2, 6, 4), bf16=True), torch.zeros(2, 6, 4, dtype=torch.bfloat16))
    (p,), (q,) = zeros((48, 32)), zeros((48, 32))
    gradients = [[random(48, 32, seed=k)] for k in range(3)]
    run(Muon([p], bf16=True), gradients)
    run(Muon([q]), gradients)
    assert p.dtype == torch.float32 and 1e-4 < (p - q).norm() / q.norm() < 0.03
    (optimizer,) = optim.build_optimizers([ParamGroup([q], kind="muon")], TrainConfig(), bf16=True)
    assert optimizer.param_groups[0]["bf16"]


def test_on_cuda_the_factors_are_bf16_and_the_sums_float32():
    """By shapes and types alone: this machine has no GPU."""
    with FakeTensorMode():
        a = torch.empty(3, 8, 16, device="cuda", dtype=torch.bfloat16)
        assert muon._product(a, a.mT).dtype == torch.float32
        assert newton_schulz(torch.empty(3, 8, 16, device="cuda"), bf16=True).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return muon_processes.together(tmp_path_factory.mktemp("muon"))


@pytest.mark.parametrize(("spread", "bf16"), muon_processes.CASES)
def test_two_processes_share_the_work_and_agree_to_the_bit(two_processes, spread, bf16):
    first, second = (found[spread, bf16] for found in two_processes)
    assert all(torch.equal(a, b) for a, b in zip(first["params"], second["params"], strict=True))
    # Rounding is raised at most 3.4445^5 = 485 times by an update: 485 x 2^-24 = 3e-5 of it;
    # in bf16 the distance to the exact one is the bound.
    alone, start = (
        muon_processes.steps(False, bf16),
        [random(*shape, seed=k) for k, shape in enumerate(muon_processes.SHAPES)],
    )
    for found, expected, before in zip(first["params"], alone, start, strict=True):
        assert (found - expected).norm() <= (0.03 if bf16 else 3e-5) * (expected - before).norm()
        assert (expected - before).norm() > 0.01
    for brought in (first["brought"], second["brought"]):
        exchanges, numbers = (
            ("all_to_all_single", "all_gather_into_tensor")[:: 1 if spread else -1],
            sum(r * c for r, c in muon_processes.SHAPES),
        )
        assert brought[exchanges[0]] and not brought[exchanges[1]]
        if spread:  # there and back, of each a half and at most a matrix and its padding more
            assert sum(brought["all_to_all_single"]) / muon_processes.STEPS < 1.4 * numbers


def test_processes_of_which_one_has_nothing_to_do(monkeypatch):
    (p,) = zeros((4, 3))
    monkeypatch.setattr(muon.Team, "of", classmethod(lambda cls, params: cls(rank=1, size=2)))
    monkeypatch.setattr(
        muon.dist, "all_gather_into_tensor", lambda output, mine, group: output.view(2, -1).copy_(torch.ones(12))
    )
    run(Muon([p], lr=0.1), [[random(4, 3)]])
    assert torch.allclose(p, torch.full((4, 3), -0.1 * (4 / 3) ** 0.5))


def test_parts_bound_what_is_held_at_once():
    hands, sizes = muon.deal((5, 9, 1, 7, 7, 3), 2), [50, 90, 10, 70, 70, 30]
    assert hands == [[1, 0, 5], [3, 4, 2]]  # 17 and 15 of 32
    assert list(muon.rounds(hands, sizes, 160)) == [[[1, 0], [3, 4]], [[5], [2]]]
    assert list(muon.rounds(hands, sizes, 1)) == [[[1], [3]], [[0], [4]], [[5], [2]]]
    assert list(muon.rounds([[0], []], [5], 9)) == [[[0], []]]


# TFLOP of Newton-Schulz a step: of one process, of the busiest of 8 and of 64. Before the work was divided,
# every process executed the first number.
NEWTON_SCHULZ_TFLOP = {
    "imagenet256-b": (3.456, 0.435, 0.0574),
    "imagenet256-l": (13.48, 1.696, 0.2326),
    "imagenet256-h": (36.72, 4.616, 0.5875),
}


@pytest.mark.parametrize("preset", NEWTON_SCHULZ_TFLOP)
def test_each_process_executes_its_share(preset, monkeypatch):
    """Counted while the step of pMF's matrices runs on the meta device."""
    info = DataInfo("imagenet", num_classes=1000, image_size=256, num_train=1_281_167)
    method = on_meta(get_class("pmf"), resolve(get_spec("pmf"), {"preset": preset}).model, info)
    (group,) = (group for group in method.parameters_of("main") if group.kind == "muon")
    costs = tuple(muon.newton_schulz_macs(1, *p.shape) for p in group.params)
    monkeypatch.setattr(muon.dist, "all_gather_into_tensor", lambda output, mine, group: None)

    def executed(size):
        hands = muon.deal(costs, size)
        assert sorted(position for hand in hands for position in hand) == list(range(len(costs)))
        work = [sum(costs[position] for position in hand) for hand in hands]
        busiest = work.index(max(work))
        monkeypatch.setattr(muon.Team, "of", classmethod(lambda cls, params: cls(busiest, size)))
        (optimizer,) = optim.build_optimizers([group], TrainConfig())
        for p in group.params:
            p.grad = p.detach()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert counter.get_total_flops() == 2 * max(work)
        return counter.get_total_flops() / 1e12

    assert [executed(size) for size in (1, 8, 64)] == pytest.approx(NEWTON_SCHULZ_TFLOP[preset], rel=2e-3)


# -- the rest ----------------------------------------------------------------------------------------------------------


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
    saved = [save(optimizer_state(optimizer, names)) for optimizer in optimizers]
    resumed = optim.build_optimizers(groups_of(cut), settings)
    for optimizer, state in zip(resumed, saved, strict=True):
        load_optimizer_state(optimizer, load(state).items(), names)
    step_module(cut, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_builders_hand_on_what_the_groups_say():
    first, second = optim.build_optimizers(
        groups_of(fused_module()), TrainConfig(lr=0.2, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.01)
    )
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
