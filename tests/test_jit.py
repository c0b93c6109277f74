"""JiT's network, objective, sampler and settings against its paper's formulas, and against misuse."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from jit_models import SMALL, TINY, make, randomized, wave

from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.maths import flow
from pixlat.common.seeds import Noise, image_seeds
from pixlat.common.training.optim import build_optimizers
from pixlat.methods import get_spec
from pixlat.methods.jit.config import SPEC, JiTConfig, JiTSample
from pixlat.methods.jit.method import in_interval, time_grid

# -- the network -------------------------------------------------------------------------------------------------------


def test_untrained_output_is_zero():
    output = make(**TINY).network(wave(0.13), torch.rand(2), torch.tensor([1, 1000]))
    assert torch.count_nonzero(output) == 0


def test_initialization():
    network = make(**TINY).network
    block, embed = network.blocks[1], network.patch_embed
    for matrix in (block.attn.qkv.weight, block.mlp.w12.weight, embed.down.weight.flatten(1), embed.up.weight):
        bound = math.sqrt(6 / sum(matrix.shape))  # Xavier uniform over the whole, also the fused, matrix
        assert 0.95 * bound < matrix.abs().max() <= bound
    for normal in (network.class_embed.weight, network.time_embed.mlp[0].weight, network.time_embed.mlp[2].weight):
        assert normal.std().item() == pytest.approx(0.02, rel=0.03)
    assert network.context.std().item() == pytest.approx(0.02, rel=0.15)
    assert network.patch_embed.down.bias is None
    biases = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")]
    assert len(biases) == 5 + 5 * 4 and all(torch.count_nonzero(bias) == 0 for bias in biases)


def test_fused_attention_equals_reference():
    fused, reference = (randomized(make(**TINY, attention=attention)) for attention in ("fused", "reference"))
    reference.load_state_dict(fused.state_dict())
    inputs = wave(0.13), torch.tensor([0.2, 0.7]), torch.tensor([3, 1000])
    torch.testing.assert_close(fused.network(*inputs), reference.network(*inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_residual_stream_under_autocast(attention):
    """bf16 until the float32 context tokens join; the loss is float32 and close to full precision."""
    method = randomized(make(**TINY, attention=attention))
    dtypes = []
    for block in method.network.blocks:
        block.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    draws = wave(0.13), torch.tensor([1, 7]), torch.tensor([0.3, 0.8]), wave(0.29)
    exact = method.objective(*draws).item()
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.objective(*draws)
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=2e-3) and loss.item() != exact


@pytest.mark.parametrize("depth", [2, 8, 12, 15])
def test_dropout_is_in_the_middle_half_only(depth):
    blocks = make(**{**SMALL, "depth": depth}, dropout=0.25, attn_dropout=0.125).network.blocks
    middle = [depth // 4 <= i < 3 * (depth // 4) for i in range(depth)]
    assert [block.attn.dropout.p for block in blocks] == [0.25 * inside for inside in middle]
    assert [block.mlp.dropout.p for block in blocks] == [0.25 * inside for inside in middle]
    assert [block.attn.attn_dropout for block in blocks] == [0.125 * inside for inside in middle]


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize("config", [{"dropout": 0.5}, {"attn_dropout": 0.5}])
def test_dropout_acts_in_training_only(config, attention):
    method = randomized(make(**{**SMALL, "depth": 8}, attention=attention, **config))
    x, condition = torch.randn(3, 66, 24), torch.randn(3, 24)

    def repeats(block):
        return torch.equal(block(x, condition, method.network.rope), block(x, condition, method.network.rope))

    assert all(repeats(block) for block in method.network.blocks)
    method.train()
    assert [repeats(block) for block in method.network.blocks] == [True] * 2 + [False] * 4 + [True] * 2


def test_dropout_positions_in_the_block():
    """After the attention projection and on SwiGLU's hidden vector:
    with everything dropped a block adds the last bias alone.
    """
    method = randomized(make(**{**SMALL, "depth": 4}, dropout=1.0)).train()
    block = method.network.blocks[1]
    torch.nn.init.normal_(block.mlp.w3.bias)
    x, condition = torch.randn(3, 66, 24), torch.randn(3, 24)
    gate2 = block.modulation(condition).chunk(6, dim=-1)[5]
    torch.testing.assert_close(
        block(x, condition, method.network.rope), x + gate2[:, None] * block.mlp.w3.bias, atol=1e-6, rtol=0
    )


def test_context_tokens_are_not_rotated():
    """Without an absolute position of its own, a context token sees the same whatever its place in the prefix."""
    method = randomized(make(**SMALL))
    block = method.network.blocks[1]
    x, condition = torch.randn(1, 66, 24), torch.randn(1, 24)
    swapped = torch.cat((x[:, [1, 0]], x[:, 2:]), dim=1)
    output, output_swapped = (block(tokens, condition, method.network.rope) for tokens in (x, swapped))
    torch.testing.assert_close(output[:, [1, 0]], output_swapped[:, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[:, 2:], output_swapped[:, 2:], atol=1e-5, rtol=1e-5)
    swapped_image = torch.cat((x[:, :2], x[:, [3, 2]], x[:, 4:]), dim=1)
    assert (block(swapped_image, condition, method.network.rope)[:, :2] - output[:, :2]).abs().max() > 1e-4


def test_context_tokens_carry_the_class_and_not_the_time():
    method = randomized(make(**TINY))
    seen = []
    method.network.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :5]))
    z = torch.cat((wave(0.13)[:1], wave(0.29)[:1]))
    for times, labels in (([0.1, 0.9], [3, 3]), ([0.1, 0.9], [3, 1000])):
        method.network(z, torch.tensor(times), torch.tensor(labels))
    assert torch.equal(seen[0][0], seen[0][1])
    assert torch.equal(seen[1][1], (method.network.class_embed.weight[1000] + method.network.context)[0])


def test_gradients_match_finite_differences():
    method = randomized(make(size=8, classes=3, **SMALL, attention="reference")).double()
    torch.manual_seed(1)
    x, noise = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    draws = x, torch.tensor([0, 3]), torch.tensor([0.3, 0.8], dtype=torch.float64), noise
    parameters = dict(method.named_parameters())
    gradients = torch.autograd.grad(method.objective(*draws), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(method.objective(*draws).item())
                parameter.sub_(direction, alpha=step)
        numeric, analytic = (losses[0] - losses[1]) / 2e-5, (gradient * direction).sum().item()
        assert numeric == pytest.approx(analytic, rel=1e-5, abs=1e-7), name
        assert analytic != 0, name


def test_forward_mode_derivative():
    """`torch.func.jvp`, which pMF needs of the shared blocks, agrees with a difference quotient."""
    method = randomized(make(size=8, classes=3, **SMALL, attention="reference")).double()
    torch.manual_seed(1)
    z, dz = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    time, dtime, labels = torch.tensor([0.3, 0.8]).double(), torch.ones(2).double(), torch.tensor([0, 3])

    def f(z, time):
        return method.network(z, time, labels)

    _, derivative = torch.func.jvp(f, (z, time), (dz, dtime))
    quotient = (f(z + 1e-5 * dz, time + 1e-5 * dtime) - f(z - 1e-5 * dz, time - 1e-5 * dtime)) / 2e-5
    torch.testing.assert_close(derivative, quotient, atol=1e-7, rtol=1e-6)
    assert derivative.abs().max() > 0.1


# -- the objective -----------------------------------------------------------------------------------------------------

NINE = [(prediction, loss) for prediction in flow.SPACES for loss in flow.SPACES]


def paper_conversion(q, prediction, o, z, tau, clip):
    """Table 1 of the paper in its own time (1 = data) and direction of velocity (towards the data),
    with clipped denominators.
    """
    t, s = max(tau, clip), max(1 - tau, clip)
    table = {
        "x": {"x": o, "eps": (z - (1 - tau) * o) / t, "v": (1 - tau) * o + z},
        "eps": {"x": (z - tau * o) / s, "eps": o, "v": z - tau * o},
        "v": {"x": (o - z) / s, "eps": (z - o) / t, "v": o},
    }
    return table[q][prediction]


@pytest.mark.parametrize(("prediction", "loss_space"), NINE)
def test_nine_combinations_follow_table_1(prediction, loss_space):
    method = make(size=8, classes=3, **SMALL, prediction=prediction, loss_space=loss_space)
    torch.manual_seed(0)
    x, e, output = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    taus = [0.02, 0.3, 0.7, 0.99]
    sign = -1 if prediction == "v" else 1  # our velocity points to the noise
    method.predict = lambda z, t, labels: sign * output
    expected = []
    for i, tau in enumerate(taus):
        z = tau * x[i] + (1 - tau) * e[i]
        truth = {"x": x[i], "eps": e[i], "v": x[i] - e[i]}[prediction]
        pair = (paper_conversion(loss_space, prediction, o, z, tau, 0.05) for o in (output[i], truth))
        expected.append((next(pair) - next(pair)).square().mean().item())
    loss = method.objective(x, torch.zeros(4, dtype=torch.int64), 1 - torch.tensor(taus, dtype=torch.float64), e)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize(("prediction", "loss_space"), NINE)
def test_perfect_prediction_costs_nothing(prediction, loss_space):
    method = make(size=8, classes=3, **SMALL, prediction=prediction, loss_space=loss_space)
    x, n = torch.randn(2, 4, 3, 8, 8)
    method.predict = lambda z, t, labels: flow.target(prediction, x, n)
    assert method.objective(x, torch.zeros(4, dtype=torch.int64), torch.tensor([0.01, 0.3, 0.7, 0.99]), n).item() == 0


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9])
def test_x_prediction_weights(tau):
    """1, t^2 / (1 - t)^2 and 1 / (1 - t)^2 times the x-loss in the paper's time (its footnote)."""
    x, n = torch.randn(2, 4, 3, 8, 8)
    losses = {}
    for space in flow.SPACES:
        method = make(size=8, classes=3, **SMALL, loss_space=space)
        method.predict = lambda z, t, labels: torch.zeros_like(z)
        losses[space] = method.objective(x, torch.zeros(4, dtype=torch.int64), torch.full((4,), 1 - tau), n).item()
    assert losses["eps"] / losses["x"] == pytest.approx(tau**2 / (1 - tau) ** 2, rel=1e-5)
    assert losses["v"] / losses["x"] == pytest.approx(1 / (1 - tau) ** 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["edm", "linear"])
def test_preconditioners(kind):
    method = make(size=8, classes=3, **SMALL, preconditioner=kind)
    output, z = torch.randn(2, 4, 3, 8, 8)
    method.network.forward = lambda z, time, labels: output
    taus = torch.tensor([0.1, 0.5, 0.9, 0.99])
    x_hat = method.predict(z, 1 - taus, torch.zeros(4, dtype=torch.int64))
    for i, tau in enumerate(taus.tolist()):
        sigma = (1 - tau) / tau
        skip, out = tau, 1 - tau
        if kind == "edm":
            skip, out = 0.25 / (0.25 + sigma**2) / tau, 0.5 * sigma / math.sqrt(0.25 + sigma**2)
        torch.testing.assert_close(x_hat[i], skip * z[i] + out * output[i], atol=1e-5, rtol=1e-5)
    assert method.predict(z, torch.ones(4), torch.zeros(4, dtype=torch.int64)).isfinite().all()  # where sampling begins


def test_draws():
    """Label drop 0.1, logit-normal time of the paper, noise of the given scale; kept labels stay."""
    method = make(size=8, classes=10, **SMALL, noise_scale=2.0, label_drop=0.1)
    count = 20_000
    torch.manual_seed(0)
    batch = {"image": torch.zeros(count, 3, 8, 8), "label": torch.arange(count) % 10}
    labels, t, noise = method.draw(batch)
    dropped = labels == 10
    assert abs(dropped.sum().item() - 0.1 * count) < 5 * math.sqrt(0.09 * count)
    assert torch.equal(labels[~dropped], batch["label"][~dropped])
    logit = torch.logit((1 - t).double())
    assert logit.mean().item() == pytest.approx(-0.8, abs=5 * 0.8 / math.sqrt(count))
    assert logit.std().item() == pytest.approx(0.8, abs=5 * 0.8 / math.sqrt(2 * count))
    assert noise.std().item() == pytest.approx(2.0, rel=5e-3) and noise.mean().item() == pytest.approx(0.0, abs=1e-2)
    assert abs(torch.corrcoef(torch.stack((dropped.double(), t.double())))[0, 1].item()) < 5 / math.sqrt(count)


def test_label_drop_extremes():
    labels = torch.arange(64) % 10
    batch = {"image": torch.zeros(64, 3, 8, 8), "label": labels}
    assert torch.equal(make(size=8, classes=10, **SMALL, label_drop=0.0).draw(batch)[0], labels)
    assert (make(size=8, classes=10, **SMALL, label_drop=1.0).draw(batch)[0] == 10).all()


def test_noise_scale_follows_the_image_size():
    assert make(size=512, **{**SMALL, "patch": 128}).noise_scale == 2.0
    assert make(size=32, **SMALL).noise_scale == 0.125
    assert make(size=32, **SMALL, noise_scale=1.0).noise_scale == 1.0


def test_forward_is_the_objective_of_its_draws():
    method = randomized(make(size=8, classes=3, **SMALL))
    batch = {"image": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 1, 2, 0])}
    torch.manual_seed(3)
    losses = method("main", batch, 0)
    torch.manual_seed(3)
    assert set(losses) == {"loss"} and torch.equal(
        losses["loss"], method.objective(batch["image"], *method.draw(batch))
    )
    assert losses["loss"].requires_grad


def test_weight_decay_leaves_out_vectors_and_biases():
    """The authors' groups: one-dimensional parameters and biases, then the rest,
    which has tables and context tokens in it (spec/jit.md 4).
    """
    method = make(**SMALL)
    names = {p: name for name, p in method.named_parameters()}
    without, decayed = method.parameters_of("main")
    assert without.weight_decay == 0.0 and decayed.weight_decay is None  # the run's
    assert {names[p] for p in without.params} == {
        name for name, p in method.named_parameters() if p.ndim == 1 or name.endswith(".bias")
    }
    assert {"network.context", "network.class_embed.weight", "network.patch_embed.down.weight"} <= {
        names[p] for p in decayed.params
    }
    with torch.no_grad():
        for p in method.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    (optimizer,) = build_optimizers([without, decayed], TrainConfig(weight_decay=0.1, lr=0.1))
    optimizer.step()
    assert all((p == 1.0).all() for p in without.params) and all(
        torch.allclose(p, torch.tensor(0.99)) for p in decayed.params
    )


# -- the sampler -------------------------------------------------------------------------------------------------------


def released_sampler(method, z, labels, steps, scale, low, high):
    """The released loop in the paper's time: both branches always run."""
    grid = torch.linspace(0, 1, steps + 1)
    null = torch.full_like(labels, method.data.num_classes)

    def velocity(z, tau):
        times = tau.expand(len(z))
        branches = [(method.network(z, times, y) - z) / (1 - tau).clamp(min=0.05) for y in (labels, null)]
        inside = bool((tau < high) & ((tau > low) | (low == 0)))
        return branches[1] + (scale if inside else 1.0) * (branches[0] - branches[1])

    for i in range(steps):
        dt = grid[i + 1] - grid[i]
        v = velocity(z, grid[i])
        if i < steps - 1:
            v = (v + velocity(z + dt * v, grid[i + 1])) / 2
        z = z + dt * v
    return z


def images_through(method, run):
    """The result of `run` and how many images went through the network meanwhile."""
    counted = []
    hook = method.network.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    try:
        with torch.no_grad():
            return run(), sum(counted)
    finally:
        hook.remove()


@pytest.mark.parametrize(("interval", "forwards"), [((0.1, 1.0), 187), ((0.0, 1.0), 198), ((0.3, 0.6), 99 + 2 * 14)])
def test_null_branch_is_skipped_where_it_has_no_effect(interval, forwards):
    method = randomized(make(size=8, classes=3, **SMALL, noise_scale=1.0))
    labels, seeds = torch.tensor([0, 2]), image_seeds(0, [0, 1])
    config = JiTSample(guidance=2.5, interval=interval)
    images, executed = images_through(method, lambda: method.sample(labels, Noise(seeds), config))
    z = Noise(seeds).normal(3, 8, 8)
    expected, always = images_through(method, lambda: released_sampler(method, z, labels, 50, 2.5, *interval))
    torch.testing.assert_close(images, expected, atol=2e-5, rtol=2e-5)
    assert always == 198 * 2
    assert executed == forwards * 2


def test_no_guidance_runs_one_branch():
    method = randomized(make(size=8, classes=3, **SMALL))
    _, executed = images_through(method, lambda: method.sample(torch.tensor([0]), Noise([0]), JiTSample(guidance=1.0)))
    assert executed == 99 == method.evaluations(JiTSample(guidance=1.0))
    _, executed = images_through(
        method, lambda: method.sample(torch.tensor([0]), Noise([0]), JiTSample(guidance=1.0, solver="euler", steps=7))
    )
    assert executed == 7 == method.evaluations(JiTSample(solver="euler", steps=7))


def test_guidance_interval_is_tested_in_float32():
    """Point 5 of the grid is 0.09999999 in float32, so with low = 0.1 guidance begins at point 6: on at 44 of 50."""
    times = time_grid(50)
    assert [1.0 - t for t in times] == torch.linspace(0, 1, 51).tolist()
    assert [i for i, t in enumerate(times) if in_interval(t, 0.1, 1.0)] == list(range(6, 50))
    assert [i for i, t in enumerate(times) if in_interval(t, 0.0, 1.0)] == list(range(50))
    assert [i for i, t in enumerate(times) if in_interval(t, 0.5, 0.6)] == [
        i for i, tau in enumerate(torch.linspace(0, 1, 51)) if 0.5 < tau < 0.6
    ]


@pytest.mark.parametrize(
    ("prediction", "solver", "ending", "left"),
    [
        ("x", "heun", "official", 0.017136),
        ("x", "euler", "official", 0.04 * 0.6 * 0.6),
        ("x", "heun", "clean", 0.0),
        ("x", "euler", "clean", 0.0),
        ("v", "heun", "official", 0.0),
        ("eps", "heun", "official", 0.0),
        ("eps", "heun", "clean", 0.0),
    ],
)
def test_noise_left_by_the_endings(prediction, solver, ending, left):
    """With a network that always knows the image, the clip leaves 1.7 % of the noise;
    Heun's figure follows from its last four slopes by hand.
    """
    method = make(size=8, classes=3, **SMALL, noise_scale=1.0, prediction=prediction)
    x, n = torch.rand(1, 3, 8, 8) * 2 - 1, Noise([0]).normal(3, 8, 8)
    knows = {"x": lambda z, t: x, "eps": lambda z, t: (z - (1 - t) * x) / t, "v": lambda z, t: (z - x) / t}
    method.predict = lambda z, t, labels: knows[prediction](z, t)
    images = method.sample(torch.tensor([0]), Noise([0]), JiTSample(guidance=1.0, ending=ending, solver=solver))
    torch.testing.assert_close(images, x + left * (n - x), atol=5e-6, rtol=0)


def test_an_image_depends_on_its_own_seed_only():
    method = randomized(make(size=8, classes=3, **SMALL))
    labels, seeds, config = torch.tensor([0, 1, 2]), image_seeds(5, [0, 1, 2]), JiTSample(steps=5)
    together = method.sample(labels, Noise(seeds), config)
    alone = torch.cat([method.sample(labels[i : i + 1], Noise(seeds[i : i + 1]), config) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


def test_sampling_is_deterministic_and_leaves_the_global_generator_alone():
    method = randomized(make(size=8, classes=3, **SMALL))
    state = torch.get_rng_state()
    first, second = (method.sample(torch.tensor([1]), Noise([7]), JiTSample(steps=3)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 0}, {"heads": 5}, {"width": 90, "heads": 9}, {"width": 96, "heads": 16}, {"patch": 0},
        {"bottleneck": -1}, {"context_tokens": -1},
        {"context_start": 12}, {"dropout": 1.5}, {"label_drop": -0.1}, {"time_std": 0.0}, {"clip": 0.0},
        {"noise_scale": 0.0}, {"attention": "flash"},
        {"prediction": "epsilon"}, {"loss_space": "z"}, {"preconditioner": "vp"},
    ],
)  # fmt: skip
def test_wrong_settings_name_the_key(wrong):
    key = list(wrong)[-1] if "width" not in wrong or wrong["width"] != 90 else "width"
    with pytest.raises(UserError, match=rf"^model\.{key}={wrong[key]!r}"):
        JiTConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"guidance": 0.5}, {"interval": (0.5, 0.5)}, {"interval": (-0.1, 1.0)}, {"interval": (0.1, 1.1)},
        {"solver": "rk4"}, {"ending": "pretty"},
    ],
)  # fmt: skip
def test_wrong_sampler_settings_name_the_key(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=rf"^sample\.{key}="):
        JiTSample(**wrong)


def test_settings_that_exclude_one_another():
    with pytest.raises(UserError, match=r"model\.prediction=x"):
        JiTConfig(preconditioner="edm", prediction="v")
    with pytest.raises(UserError, match=r"model\.patch=5: must divide the image size 32"):
        make(**{**SMALL, "patch": 5})


@pytest.mark.parametrize("switch", [{"bottleneck": 0}, {"context_tokens": 0}, {"rope": False}, {"qk_norm": False}])
def test_ablation_switches(switch):
    """Each part of the paper's Table 4 can be left out, and its absence changes the result."""
    full, less = randomized(make(**TINY)), randomized(make(**{**TINY, **switch}))
    shapes = {name: tensor.shape for name, tensor in less.state_dict().items()}
    less.load_state_dict(
        {name: tensor for name, tensor in full.state_dict().items() if shapes.get(name) == tensor.shape}, strict=False
    )
    inputs = wave(0.13), torch.tensor([0.2, 0.7]), torch.tensor([3, 1000])
    assert (full.network(*inputs) - less.network(*inputs)).abs().max() > 1e-3


def test_presets_resolve():
    presets = load_presets(SPEC.presets)
    for name, preset in presets.items():
        path = {"data.path": "/data"} if preset["data"]["name"] == "folder" else {}
        run = resolve(get_spec("jit"), {"preset": name, **path})
        assert isinstance(run.model, JiTConfig) and isinstance(run.sample, JiTSample) and preset["about"]
    grids = {
        name: preset["data"]["image_size"] / preset["model"]["patch"]
        for name, preset in presets.items()
        if name.startswith("imagenet")
    }
    assert set(grids.values()) == {16.0} and len(grids) == 19
    scores = {
        name: preset["expected"]["fid"]
        for name, preset in presets.items()
        if name.startswith(("imagenet256", "imagenet512")) and "200" not in name
    }
    assert scores == {
        "imagenet256-b": 3.66, "imagenet256-l": 2.36, "imagenet256-h": 1.86,
        "imagenet256-g": 1.82, "imagenet256-b-plain": 8.62,
        "imagenet512-b": 4.02, "imagenet512-l": 2.53, "imagenet512-h": 1.94, "imagenet512-g": 1.78,
    }  # fmt: skip
    assert presets["imagenet256-b"]["train"]["images"] == 600 * 1_281_167


def test_settings_do_not_import_torch():
    script = "import sys, pixlat.methods.jit.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
