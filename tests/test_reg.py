"""SiT, REPA and REG: the network against its tables and a second writing, the objectives,
and the samplers against closed forms.
"""

import math
from functools import cache, partial
from itertools import pairwise

import plain_reg
import pytest
import torch
import torch.nn.functional as F
from reg_models import CHANNELS, INFO, SIDE, SMALL, Impulses, batch, make, randomized

from pixlat.common.accounting.macs import count_macs, parameter_counts, sampling_cost, training_cost
from pixlat.common.errors import UserError
from pixlat.common.layers.dit import projector
from pixlat.common.layers.transformer import sincos_table
from pixlat.common.seeds import Noise, seed_step
from pixlat.methods.reg.config import RegConfig, RegSample, SitSample
from pixlat.methods.reg.method import Draws, RegMethod, is_guided, ode_times, sde_times
from pixlat.methods.reg.network import LatentTransformer, Prediction, Shape
from pixlat.methods.reg.path import draw_times, drift, mix

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
FLOWS = ("sit", "repa", "reg")


@cache
def published(size, patch=2, side=32, outputs=4, class_token=0) -> LatentTransformer:
    """A network of the papers' sizes on the meta device."""
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        return LatentTransformer(Shape(depth, width, heads, patch, side, 4, outputs, 1000, class_token))


def numel(module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def gmacs(network) -> float:
    side, token = network.shape.side, network.shape.class_token
    with torch.device("meta"):
        inputs = (
            torch.zeros(1, 4, side, side),
            torch.zeros(1),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, token) if token else None,
        )
        return count_macs(lambda: network(*inputs)) / 1e9


# -- the network -------------------------------------------------------------------------------------------------------


def released_table(depth, width, outputs, target=None, class_token=None, tokens=256):
    """Names and shapes of a released state dict."""
    table = {"pos_embed": (1, tokens + bool(class_token), width), "y_embedder.embedding_table.weight": (1001, width)}

    def add(name, *shape):
        table.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    add("x_embedder.proj", width, 4, 2, 2)
    add("t_embedder.mlp.0", width, 256)
    add("t_embedder.mlp.2", width, width)
    for i in range(depth):
        add(f"blocks.{i}.attn.qkv", 3 * width, width)
        add(f"blocks.{i}.attn.proj", width, width)
        add(f"blocks.{i}.mlp.fc1", 4 * width, width)
        add(f"blocks.{i}.mlp.fc2", width, 4 * width)
        add(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    add("final_layer.adaLN_modulation.1", 2 * width, width)
    add("final_layer.linear", 4 * outputs, width)
    if target:
        add("projectors.0.0", 2048, width)
        add("projectors.0.2", 2048, 2048)
        add("projectors.0.4", target, 2048)
    if class_token:
        add("final_layer.linear_cls", class_token, width)
        add("cls_projectors2", width, class_token)
        add("wg_norm", width)
    return table


@pytest.mark.parametrize(
    ("size", "outputs", "target", "class_token", "count"),
    [
        ("XL", 8, None, 0, 292),
        ("XL", 4, 768, 0, 298),
        ("XL", 4, 768, 768, 304),
        ("B", 4, 768, 768, 144),
        ("L", 4, 1024, 1024, 264),
    ],
)
def test_names_and_shapes_are_the_released_ones(size, outputs, target, class_token, count):
    network = published(size, outputs=outputs, class_token=class_token)
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if target:
        ours |= {
            f"projectors.0.{name}": tuple(t.shape)
            for name, t in projector(SIZES[size][1], 2048, target).state_dict().items()
        }
    assert ours == released_table(*SIZES[size][:2], outputs, target, class_token)
    assert len(ours) == count


@pytest.mark.parametrize(
    ("size", "options", "total"),
    [
        ("S", {"outputs": 8}, 32_963_360),
        ("B", {"outputs": 8}, 130_512_416),
        ("L", {"outputs": 8}, 458_102_816),
        ("XL", {"outputs": 8}, 675_129_632),
        ("B", {}, 130_500_112),
        ("L", {}, 458_086_416),
        ("XL", {}, 675_111_184),
        ("B", {"class_token": 768}, 131_683_600),
        ("L", {"class_token": 768}, 459_664_144),
        ("XL", {"class_token": 768}, 676_886_032),
    ],
)
def test_parameter_counts(size, options, total):
    assert numel(published(size, **options)) == total


@pytest.mark.parametrize(
    ("size", "class_token", "target", "total"),
    [
        ("B", 0, 768, 137_845_008),
        ("L", 0, 768, 465_955_600),
        ("XL", 0, 768, 683_242_512),
        ("B", 768, 768, 139_028_496),
        ("L", 768, 768, 467_533_328),
        ("XL", 768, 768, 685_017_360),
        ("XL", 1024, 1024, 686_131_984),
    ],
)
def test_parameter_counts_with_projector(size, class_token, target, total):
    with torch.device("meta"):
        mlp = projector(SIZES[size][1], 2048, target)
    assert numel(published(size, class_token=class_token)) + numel(mlp) == total


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ("S", {"outputs": 8}, 6.056),
        ("B", {"outputs": 8}, 23.005),
        ("L", {"outputs": 8}, 80.698),
        ("XL", {"outputs": 8}, 118.621),
        ("S", {"outputs": 8, "patch": 4}, 1.413),
        ("B", {"outputs": 8, "patch": 4}, 5.565),
        ("L", {"outputs": 8, "patch": 4}, 19.696),
        ("XL", {"outputs": 8, "patch": 4}, 29.044),
        ("XL", {"outputs": 8, "side": 64}, 524.54),
        ("XL", {}, 118.617),
        ("XL", {"class_token": 768}, 119.097),
        ("L", {"class_token": 768}, 81.022),
        ("B", {"class_token": 768}, 23.098),
        ("XL", {"class_token": 768, "side": 64}, 525.10),
    ],
)
def test_macs(size, options, expected):
    assert gmacs(published(size, **options)) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(("tokens", "expected"), [(256, 120.697 - 118.617), (257, 121.186 - 119.097)])
def test_macs_of_the_projector(tokens, expected):
    with torch.device("meta"):
        mlp = projector(1152, 2048, 768)
        macs = count_macs(lambda: mlp(torch.zeros(1, tokens, 1152))) / 1e9
    assert macs == pytest.approx(expected, abs=1e-3)


def test_class_token_has_no_position(monkeypatch):
    with_token, without = make("reg", monkeypatch).network.pos_embed, make("repa", monkeypatch).network.pos_embed
    assert torch.equal(with_token[:, :1], torch.zeros(1, 1, 24)) and torch.equal(with_token[:, 1:], without)
    assert torch.equal(without[0], sincos_table(SIDE // 2, 24))


def test_initialization(monkeypatch):
    method = make("reg", monkeypatch, depth=2, width=96)
    network = method.network
    for matrix in (
        network.blocks[1].attn.qkv.weight,
        network.x_embedder.proj.weight.flatten(1),
        network.cls_projectors2.weight,
        method.projectors[0][2].weight,
    ):
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.9 * bound < matrix.abs().max() <= bound
    for normal in (
        network.y_embedder.embedding_table.weight,
        network.t_embedder.mlp[0].weight,
        network.t_embedder.mlp[2].weight,
    ):
        assert normal.std().item() == pytest.approx(0.02, rel=0.12)
    zero = [name for name, p in method.named_parameters() if name.endswith("weight") and not p.any()]
    modulations = [f"network.blocks.{i}.adaLN_modulation.1.weight" for i in range(2)]
    assert set(zero) == {
        *modulations,
        "network.final_layer.adaLN_modulation.1.weight",
        "network.final_layer.linear.weight",
        "network.final_layer.linear_cls.weight",
    }
    biases = [p for name, p in method.named_parameters() if name.endswith("bias") and not name.startswith("teacher")]
    assert all(not bias.any() for bias in biases)
    assert torch.equal(network.wg_norm.weight, torch.ones(96)) and network.wg_norm.eps == 1e-6


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize("class_token", [0, 6])
def test_network_equals_its_second_writing(attention, class_token):
    torch.manual_seed(0)
    shape = Shape(3, 24, 2, 2, SIDE, CHANNELS, 5, 3, class_token, exact_attention=attention == "reference")
    network = randomized(LatentTransformer(shape)).double()
    torch.manual_seed(2)
    z, token = torch.randn(2, CHANNELS, SIDE, SIDE).double(), torch.randn(2, 6).double() if class_token else None
    t, labels = torch.tensor([0.13, 0.8]).double(), torch.tensor([1, 3])
    ours = network(z, t, labels, token, hidden_after=2)
    plain = plain_reg.forward(network.state_dict(), z, t, labels, 2, 2, 5, token, hidden_after=2)
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            # the frequencies of the time embedding are float32
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_qk_norm():
    torch.manual_seed(0)
    network = LatentTransformer(Shape(1, 24, 2, 2, SIDE, CHANNELS, CHANNELS, 3, qk_norm=True))
    names = {name for name in network.state_dict() if "q_norm" in name or "k_norm" in name}
    assert names == {f"blocks.0.attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")}
    assert network.blocks[0].attn.q_norm.eps == 1e-5 and network.blocks[0].attn.q_norm.normalized_shape == (12,)


def test_hidden_tokens_are_those_after_the_numbered_block():
    torch.manual_seed(0)
    network = randomized(LatentTransformer(Shape(3, 24, 2, 2, SIDE, CHANNELS, CHANNELS, 3)))
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    z = torch.randn(2, CHANNELS, SIDE, SIDE)
    hidden = [network(z, torch.rand(2), torch.tensor([0, 1]), None, number).hidden for number in (0, 1, 3)]
    assert hidden[0] is None and hidden[1] is seen[3] and hidden[2] is seen[8]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_derivative_of_the_position(path):
    x, n = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    quotient = (mix(path, t + 1e-6).position(x, n) - mix(path, t - 1e-6).position(x, n)) / 2e-6
    torch.testing.assert_close(mix(path, t).velocity(x, n), quotient, atol=1e-9, rtol=1e-9)
    ends = mix(path, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(torch.stack(ends[:2]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-7, rtol=0)


def score_form(path, v, z, t, diffusion):
    """The drift by way of the score, from the coefficients of the path."""
    a, s, a_rate, s_rate = (c.item() for c in mix(path, torch.tensor([t], dtype=torch.float64)))
    score = (a / a_rate * v - z) / (s**2 - a / a_rate * s_rate * s)
    return v - 0.5 * diffusion * t * score


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion", [2.0, 1.0, 0.0])
def test_closed_form_of_the_drift(path, diffusion):
    v, z = torch.randn(2, 50, dtype=torch.float64)
    for t in (1.0, 0.7, 0.3, 0.04):
        torch.testing.assert_close(
            drift(path, v, z, t, diffusion), score_form(path, v, z, t, diffusion), atol=1e-12, rtol=1e-12
        )
        if path == "linear" and diffusion == 2.0:
            torch.testing.assert_close(drift(path, v, z, t, diffusion), (2 - t) * v + z, atol=1e-14, rtol=1e-14)


def test_time_distributions():
    torch.manual_seed(0)
    count = 20_000
    logit = draw_times("linear", "lognormal", count, torch.device("cpu")).double().logit()
    assert logit.mean().item() == pytest.approx(0, abs=5 / math.sqrt(count)) and logit.std().item() == pytest.approx(
        1, abs=5 / math.sqrt(2 * count)
    )
    ratio = torch.tan(math.pi / 2 * draw_times("cosine", "lognormal", count, torch.device("cpu")).double()).log()
    assert ratio.mean().item() == pytest.approx(0, abs=5 / math.sqrt(count)) and ratio.std().item() == pytest.approx(
        1, abs=5 / math.sqrt(2 * count)
    )
    uniform = draw_times("cosine", "uniform", count, torch.device("cpu"))
    assert (
        uniform.min() >= 0
        and uniform.max() < 1
        and uniform.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * count))
    )


# -- objectives --------------------------------------------------------------------------------------------------------


def draws(size=4):
    torch.manual_seed(3)
    return torch.randn(size, CHANNELS, SIDE, SIDE), Draws(
        torch.tensor([0, 1, 2, 3])[:size], torch.rand(size), torch.randn(size, CHANNELS, SIDE, SIDE)
    )


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_untrained_losses(monkeypatch, path):
    """The untrained network says 0, so the losses are mean squares of the targets:
    about 1 + mean x^2 on the linear path.
    """
    x, d = draws()
    token, token_noise, target = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 17, 6)
    method = make("reg", monkeypatch, path=path)
    out = method.entangled_objective(x, d, target, token, token_noise)
    half = math.pi / 2
    coefficients = [
        (-1.0, 1.0) if path == "linear" else (-half * math.sin(half * t), half * math.cos(half * t))
        for t in d.t.tolist()
    ]
    velocity = torch.stack([a * x[i] + s * d.noise[i] for i, (a, s) in enumerate(coefficients)]).square().mean()
    entangled = (
        torch.stack([a * token[i] + s * token_noise[i] for i, (a, s) in enumerate(coefficients)]).square().mean()
    )
    assert out["velocity"].item() == pytest.approx(velocity.item(), rel=1e-5)
    # the released code is wrong here on the cosine path
    assert out["class_token"].item() == pytest.approx(entangled.item(), rel=1e-5)
    if path == "linear":
        assert out["velocity"].item() == pytest.approx(1 + x.square().mean().item(), rel=0.1)
    total = out["velocity"] + 0.5 * out["alignment"] + 0.03 * out["class_token"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_perfect_velocity_costs_nothing(monkeypatch):
    method = make("sit", monkeypatch)
    x, d = draws()
    # SiT's velocity points to the data
    method.network.forward = lambda z, time, labels, token, hidden: (x - d.noise, None, None)
    assert method.objective(x, d).item() == 0


@pytest.mark.parametrize("name", ["repa", "reg"])
def test_alignment_is_the_mean_cosine_over_all_tokens(monkeypatch, name):
    method = randomized(make(name, monkeypatch))
    tokens = 17 if name == "reg" else 16
    hidden, target = torch.randn(4, tokens, 24), torch.randn(4, tokens, 6)
    found = method.alignment(Prediction(hidden, None, hidden), target)
    cosines = [
        F.cosine_similarity(method.projectors[0](hidden[b, i]), target[b, i], dim=0).item()
        for b in range(4)
        for i in range(tokens)
    ]
    assert found.item() == pytest.approx(-sum(cosines) / len(cosines), rel=1e-5)


def test_class_position_is_left_out_where_the_teachers_widths_differ(monkeypatch):
    method = randomized(make("reg", monkeypatch, pooled_channels=3))
    target, token = method.features_of(batch())
    assert target.shape == (4, 16, 6) and token.shape == (4, 3)
    hidden = torch.randn(4, 17, 24)
    changed = torch.cat((hidden[:, :1] + 1, hidden[:, 1:]), dim=1)
    a, b = (method.alignment(Prediction(tokens, None, tokens), target) for tokens in (hidden, changed))
    assert torch.equal(a, b)


def test_class_token_comes_first_in_the_targets(monkeypatch):
    method = make("reg", monkeypatch)
    target, token = method.features_of(batch())
    assert target.shape == (4, 17, 6) and torch.equal(target[:, 0], token)
    grid, pooled = method.teacher.represent(batch()["image"])
    assert torch.equal(target[:, 1 + 2 * 4 + 3], grid[:, :, 2, 3]) and torch.equal(token, pooled)


def test_class_token_may_be_the_mean_of_the_patches(monkeypatch):
    method = make("reg", monkeypatch, pooled_channels=3, class_token="mean")
    target, token = method.features_of(batch())
    assert target.shape == (4, 17, 6) and method.network.shape.class_token == 6
    torch.testing.assert_close(token, method.teacher(batch()["image"]).mean(dim=(2, 3)))


def test_a_finer_teacher_is_averaged_onto_our_tokens(monkeypatch):
    method = make("repa", monkeypatch, patch=4)
    (target,) = method.features_of(batch())
    grid = method.teacher(batch()["image"])
    torch.testing.assert_close(target[:, 2], grid[:, :, 2:, :2].mean(dim=(2, 3)))


def test_alignment_survives_zero_tokens_and_bf16(monkeypatch):
    method = randomized(make("repa", monkeypatch))
    hidden = torch.zeros(2, 16, 24, requires_grad=True)
    torch.nn.init.zeros_(method.projectors[0][4].bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.alignment(Prediction(hidden, None, hidden), torch.zeros(2, 16, 6))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0 and hidden.grad.isfinite().all()


def test_losses_are_float32_and_close_under_autocast(monkeypatch):
    method = randomized(make("reg", monkeypatch))
    x, d = draws()
    token, token_noise, target = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 17, 6)
    exact = method.entangled_objective(x, d, target, token, token_noise)
    with torch.autocast("cpu", torch.bfloat16):
        low = method.entangled_objective(x, d, target, token, token_noise)
    assert all(value.dtype == torch.float32 for value in low.values())
    assert low["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-2) and low["loss"] != exact["loss"]


@pytest.mark.parametrize("name", FLOWS)
def test_forward_is_the_objective_of_its_draws(monkeypatch, name):
    method = randomized(make(name, monkeypatch))
    seed_step(1, 0, 0)
    out = method("main", batch(), 0)
    seed_step(1, 0, 0)
    data = batch()
    x = method.latents(data)
    d = method.draw(x, data["label"])
    features = method.features_of(data) if name != "sit" else ()
    if name == "sit":
        expected = method.objective(x, d)
    elif name == "repa":
        expected = method.aligned_objective(x, d, *features)["loss"]
    else:
        expected = method.entangled_objective(x, d, *features, torch.randn_like(features[1]))["loss"]
    assert torch.equal(out["loss"], expected) and out["loss"].requires_grad
    assert all(not value.requires_grad for key, value in out.items() if key != "loss")


def test_the_control_group_shares_draws_and_network(monkeypatch):
    """With lambda = 0, REPA is SiT but for the network's clock; with the same weights and draws the velocity losses
    of REPA and REG agree in form.
    """
    repa, sit = randomized(make("repa", monkeypatch, align_weight=0.0)), randomized(make("sit", monkeypatch))
    assert set(repa.network.state_dict()) == set(sit.network.state_dict())
    seed_step(4, 0, 0)
    x = repa.latents(batch())
    a = repa.draw(x, batch()["label"])
    seed_step(4, 0, 0)
    y = sit.latents(batch())
    b = sit.draw(y, batch()["label"])
    assert torch.equal(x, y) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_latents_are_draws_from_the_posterior(monkeypatch):
    method = make("sit", monkeypatch)
    data = {key: value[:1].expand(4000, *value.shape[1:]) for key, value in batch().items()}
    torch.manual_seed(0)
    drawn = method.latents(data)
    mean, _ = method.tokenizer.encode_moments(data["image"][:1])
    assert (drawn.mean(dim=0) - 2 * (mean[0] - 0.25)).abs().max() < 6 * 0.2 / math.sqrt(4000)
    torch.testing.assert_close(drawn.std(dim=0), torch.full_like(mean[0], 0.2), atol=6 * 0.2 / math.sqrt(8000), rtol=0)


def test_stored_moments_take_the_place_of_the_encoder(monkeypatch):
    method = make("sit", monkeypatch)
    data = batch()
    moments = torch.cat(method.tokenizer.encode_moments(data["image"]), dim=1)
    seed_step(0, 0, 0)
    expected = method.latents(data)
    seed_step(0, 0, 0)
    assert torch.equal(method.latents({**data, "image": torch.zeros(4, 3, 16, 16), "moments": moments}), expected)


def test_label_drop(monkeypatch):
    method = make("sit", monkeypatch, label_drop=0.1)
    torch.manual_seed(0)
    labels = method.drop_labels(torch.ones(20_000, dtype=torch.int64))
    assert set(labels.tolist()) == {1, 3}
    assert abs((labels == 3).sum().item() - 2000) < 5 * math.sqrt(0.09 * 20_000)


def test_class_token_can_be_standardised(monkeypatch):
    method = make("reg", monkeypatch, standardise=True)
    method.before_training(batch(8) for _ in iter(int, 1))
    _, token = method.features_of(batch(8))
    torch.testing.assert_close(method.class_mean, token.mean(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(method.class_std, token.repeat(64, 1).std(dim=0), atol=1e-5, rtol=0)
    assert "class_mean" not in make("reg", monkeypatch).state_dict()


def test_memory_of_frozen_outputs_changes_nothing(monkeypatch):
    plain, remembering = make("reg", monkeypatch), make("reg", monkeypatch, remember=True)
    remembering.load_external()
    calls = []
    remembering.teacher.mix.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    for _ in range(3):
        losses = []
        for method in (plain, remembering):
            seed_step(5, 0, 0)
            losses.append(method("main", batch(), 0)["loss"].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert sum(calls) == 4  # each image once


# -- the sampler -------------------------------------------------------------------------------------------------------


def test_grid_of_the_stochastic_sampler():
    times = sde_times(250, 0.04)
    assert len(times) == 251 and times[0] == 1.0 and times[-1] == 0.0
    assert times[1] - times[0] == pytest.approx(-0.96 / 249, rel=1e-12) and times[-1] - times[-2] == pytest.approx(
        -0.04, rel=1e-12
    )
    assert ode_times(50) == pytest.approx([1 - i / 50 for i in range(51)], abs=1e-15) and ode_times(50)[-1] == 0.0


@pytest.mark.parametrize(("high", "count"), [(0.7, 172), (0.8, 198), (0.85, 211), (0.9, 224), (1.0, 250)])
def test_guided_evaluations(high, count):
    config = SitSample(guidance=2.0, interval=(0.0, high))
    assert sum(is_guided(t, config) for t in sde_times(250, 0.04)[:-1]) == count
    assert not is_guided(0.5, SitSample(guidance=1.0))
    assert is_guided(0.5, SitSample(guidance=2.0, interval=(0.5, 0.6))) and not is_guided(
        0.61, SitSample(guidance=2.0, interval=(0.5, 0.6))
    )


@pytest.mark.parametrize(("name", "high", "forwards"), [("repa", 0.7, 422), ("reg", 0.85, 461), ("sit", 1.0, 500)])
def test_executed_forwards(monkeypatch, name, high, forwards):
    sample = (RegSample if name == "reg" else SitSample)(steps=250, guidance=1.8, interval=(0.0, high))
    with torch.device("meta"):
        method = make(name, monkeypatch)
    counted = sampling_cost(method, sample)
    assert counted.net_forwards == {"network": forwards, "decoder": 1} and counted.nfe == 250 == method.evaluations(
        sample
    )


@pytest.mark.parametrize(("solver", "calls"), [("sde", 50), ("euler", 50), ("heun", 99)])
@pytest.mark.parametrize("name", FLOWS)
def test_evaluations_are_those_executed(monkeypatch, name, solver, calls):
    sample = (RegSample if name == "reg" else SitSample)(steps=50, solver=solver)
    with torch.device("meta"):
        method = make(name, monkeypatch)
    assert sampling_cost(method, sample).net_forwards["network"] == calls == method.evaluations(sample)


MEAN, SPREAD = 0.7, 0.5


def gaussian_velocity(path, z, t):
    """dz/dt for data N(MEAN, SPREAD^2): E[a' x + s' n | z]. Returns also the slope, since it is affine in z."""
    a, s, a_rate, s_rate = (c.item() for c in mix(path, torch.tensor([t], dtype=torch.float64)))
    variance = a**2 * SPREAD**2 + s**2
    slope = (a_rate * a * SPREAD**2 + s_rate * s) / variance
    return a_rate * MEAN + slope * (z - a * MEAN), slope


def run_gaussian(method, config, path, count):
    """Mean and standard deviation of each number that the sampler gives when the network is perfect
    for Gaussian data, in `count` draws.
    """
    count += isinstance(method, RegMethod)  # it starts with two: the latents and the class token
    method.state_velocity = lambda z, t, labels: gaussian_velocity(path, z, t)[0]
    method.decode = lambda latents: latents
    method.image_of = lambda z: z
    noise = Impulses(count)
    images = method.sample(torch.zeros(count + 1, dtype=torch.int64), noise, config)
    assert noise.draw == count
    still = images[-1]
    return still, (images[:-1] - still).square().sum(dim=0).sqrt()


def recursion(path, times, diffusion, noisy=True):
    """Mean and standard deviation of the discretised equation, step by step."""
    mean, variance = 0.0, 1.0
    for step, (t, t_next) in enumerate(pairwise(times)):
        v, slope = gaussian_velocity(path, mean, t)
        move = drift(
            path,
            torch.tensor([v, slope], dtype=torch.float64),
            torch.tensor([mean, 1.0], dtype=torch.float64),
            t,
            diffusion,
        )
        dt = t_next - t
        mean, variance = mean + dt * move[0].item(), (1 + dt * move[1].item()) ** 2 * variance
        if noisy and step < len(times) - 2:
            variance += diffusion * t * abs(dt)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion", [2.0, 1.0, 0.0])
def test_stochastic_sampler_of_gaussian_data(monkeypatch, name, path, diffusion):
    """Exactly the discretised equation, for the image's and the class token's numbers alike;
    and near the data's mean and deviation.
    """
    method = make(name, monkeypatch, path=path)
    mean, std = run_gaussian(
        method, (RegSample if name == "reg" else SitSample)(steps=60, diffusion=diffusion), path, 60
    )
    expected = recursion(path, sde_times(60, 0.04), diffusion)
    torch.testing.assert_close(mean, torch.full_like(mean, expected[0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(std, torch.full_like(std, expected[1]), atol=1e-12, rtol=0)
    assert expected == pytest.approx((MEAN, SPREAD), abs=0.025)


@pytest.mark.parametrize(
    ("diffusion", "measured"), [(0.0, (0.6994, 0.4948)), (1.0, (0.7009, 0.4953)), (2.0, (0.7005, 0.4941))]
)
def test_stochastic_sampler_against_the_measured_one(monkeypatch, diffusion, measured):
    """250 steps, as measured with 400,000 samples, whose errors are 0.0008 and 0.0006."""
    mean, std = run_gaussian(make("repa", monkeypatch), SitSample(diffusion=diffusion), "linear", 250)
    assert mean.flatten()[0].item() == pytest.approx(measured[0], abs=3e-3) and std.flatten()[
        0
    ].item() == pytest.approx(measured[1], abs=2e-3)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ordinary_samplers_of_gaussian_data(monkeypatch, name, solver):
    """The flow carries N(0, 1) to N(m, k^2); with Heun's steps to a few 1e-4,
    with Euler's the recursion says how far.
    """
    method = make(name, monkeypatch)
    mean, std = run_gaussian(method, (RegSample if name == "reg" else SitSample)(steps=100, solver=solver), "linear", 1)
    if solver == "euler":
        expected = recursion("linear", ode_times(100), 0.0, noisy=False)
        tolerance = 1e-12
    else:
        expected, tolerance = (MEAN, SPREAD), 1e-3
    torch.testing.assert_close(mean, torch.full_like(mean, expected[0]), atol=tolerance, rtol=0)
    torch.testing.assert_close(std, torch.full_like(std, expected[1]), atol=tolerance, rtol=0)


def test_sampler_statistics_with_real_noise(monkeypatch):
    """One generator an image: the sampler's draws are independent,
    and the statistics those of the exact computation.
    """
    method = make("repa", monkeypatch)
    method.state_velocity = lambda z, t, labels: gaussian_velocity("linear", z, t)[0]
    method.decode = lambda latents: latents
    images = method.sample(torch.zeros(16, dtype=torch.int64), Noise(range(16)), SitSample(steps=40))
    mean, std = recursion("linear", sde_times(40, 0.04), 2.0)
    count = images.numel()
    assert images.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert images.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))


def labelled_velocity(method):
    """A velocity that tells class from no class, and image from class token."""
    width = method.start(Noise([0])).flatten(1).shape[1]
    shape = method.start(Noise([0])).shape[1:]
    base = torch.linspace(-1, 1, width, dtype=torch.float64).view(shape)
    return lambda z, t, labels: base + torch.where(labels == 3, 0.0, 1.0 + labels).view(-1, *[1] * len(shape)).double()


@pytest.mark.parametrize("name", FLOWS)
def test_guidance_of_each_part(monkeypatch, name):
    """u + w (c - u) on the guided channels, c on the others; the class token has its own scale, 0 meaning c."""
    method = make(name, monkeypatch)
    method.state_velocity = labelled_velocity(method)
    z, labels = method.start(Noise([1, 2])).double(), torch.tensor([0, 2])
    sample = (
        RegSample(guidance=3.0, guided_channels=3, class_guidance=2.0)
        if name == "reg"
        else SitSample(guidance=3.0, guided_channels=3)
    )
    guided = method.velocity(z, 0.5, labels, method.guidance_scale(sample).double())
    conditional, unconditional = (method.state_velocity(z, 0.5, y) for y in (labels, torch.tensor([3, 3])))
    image = method.image_of(unconditional + 3.0 * (conditional - unconditional)).clone()
    image[:, 3] = method.image_of(conditional)[:, 3]
    torch.testing.assert_close(method.image_of(guided), image)
    assert torch.equal(method.velocity(z, 0.5, labels, None), conditional)
    if name == "reg":
        torch.testing.assert_close(guided[:, -6:], unconditional[:, -6:] + 2.0 * (conditional - unconditional)[:, -6:])
        off = method.velocity(z, 0.5, labels, method.guidance_scale(RegSample(guidance=3.0)).double())
        torch.testing.assert_close(off[:, -6:], conditional[:, -6:])


def test_a_steps_second_evaluation_is_guided_as_its_first(monkeypatch):
    """Interval [0.5, 1] with steps 1, 0.75, 0.5, 0.25: the corrector at 0.25 of the step from 0.5 is guided,
    the one at 0.25 from 0.25 is not.
    """
    method = make("repa", monkeypatch)
    seen = []

    def velocity(z, t, labels):
        seen.append((t, len(z)))
        return torch.zeros_like(z)

    method.state_velocity = velocity
    method.sample(torch.tensor([0]), Noise([0]), SitSample(steps=4, solver="heun", guidance=2.0, interval=(0.5, 1.0)))
    assert seen == [(1.0, 2), (0.75, 2), (0.75, 2), (0.5, 2), (0.5, 2), (0.25, 2), (0.25, 1)]


def test_reg_state_keeps_image_and_token_apart(monkeypatch):
    method = randomized(make("reg", monkeypatch))
    z = method.start(Noise([1, 2]))
    assert z.shape == (2, CHANNELS * SIDE * SIDE + 6)
    t, labels = 0.3, torch.tensor([0, 1])
    predicted = method.predict(method.image_of(z), torch.full((2,), t), labels, z[:, -6:])
    velocity = method.state_velocity(z.double(), t, labels)
    assert velocity.dtype == torch.float64
    torch.testing.assert_close(method.image_of(velocity).float(), predicted.image)
    torch.testing.assert_close(velocity[:, -6:].float(), predicted.class_token)


def turn_clock(state):
    """Weights of a network that counts t as 1 - t and answers with the opposite sign, from one that does not."""
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    turn = torch.zeros(256, 256, dtype=torch.float64)
    for k in range(128):
        turn[k, k], turn[k, 128 + k], turn[128 + k, k], turn[128 + k, 128 + k] = (
            f[k].cos(),
            f[k].sin(),
            f[k].sin(),
            -f[k].cos(),
        )
    turned = dict(state)
    turned["t_embedder.mlp.0.weight"] = (state["t_embedder.mlp.0.weight"].double() @ turn).float()
    for kind in ("weight", "bias"):
        turned[f"final_layer.linear.{kind}"] = -state[f"final_layer.linear.{kind}"]
    return turned


@pytest.mark.parametrize("solver", ["sde", "heun"])
def test_sit_is_repa_with_the_clock_turned(monkeypatch, solver):
    """v_repa(z, t) = -network_sit(z, 1 - t): with the turn folded into the weights,
    shared noise gives the same images.
    """
    sit, repa = randomized(make("sit", monkeypatch)), make("repa", monkeypatch).eval()
    repa.network.load_state_dict(turn_clock(sit.network.state_dict()))
    sample = SitSample(steps=20, solver=solver, guidance=1.5, guided_channels=3)
    with torch.no_grad():
        images = [m.sample(torch.tensor([0, 1, 2]), Noise([1, 2, 3]), sample) for m in (sit, repa)]
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=1e-5)  # float32 networks, 20 steps
    assert images[0].std() > 0.1


# -- costs and settings ------------------------------------------------------------------------------------------------


def test_projector_costs_nothing_at_sampling(monkeypatch):
    with torch.device("meta"):
        method = make("reg", monkeypatch)
    counts = parameter_counts(method)
    inside = sum(p.numel() for p in method.network.parameters())
    assert counts.gen_trainable == inside and counts.aux_train_only >= numel(method.projectors)
    one = sampling_cost(method, RegSample(steps=2)).macs_per_forward["network"]
    assert one == pytest.approx(gmacs_small(method), rel=1e-9)


def gmacs_small(method):
    inputs = (
        torch.zeros(1, CHANNELS, SIDE, SIDE),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, 6),
    )
    return count_macs(lambda: method.network(*(x.to("meta") for x in inputs)))


def test_training_cost_counts_teacher_and_projector(monkeypatch):
    with torch.device("meta"):
        costs = {}
        for name in FLOWS:
            built = make(name, monkeypatch)
            costs[name] = training_cost(partial(lambda built, config, data: built, built), None, INFO).per_image
    assert costs["sit"] < costs["repa"] < costs["reg"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"align_after": 4}, "one of the 3 blocks"),
        ({"heads": 5}, "must divide model.width=24"),
        ({"path": "cosin"}, "Did you mean 'cosine'"),
        ({"label_drop": 1.5}, "probability"),
        ({"class_weight": -1.0}, "0 or more"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        RegConfig(**{**SMALL, "align_after": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "at least 2"),
        ({"interval": (0.5, 0.5)}, "low < high"),
        ({"guidance": 0.5}, r"1 \(off\) or more"),
        ({"solver": "ode"}, "not one of"),
    ],
)
def test_impossible_sampler_settings(settings, message):
    with pytest.raises(UserError, match=message):
        SitSample(**settings)


def test_teacher_grid_must_fit(monkeypatch):
    with pytest.raises(UserError, match="8 x 8 tokens, which must divide the 4 x 4 of the teacher"):
        make("repa", monkeypatch, patch=1)


def test_patch_must_fit(monkeypatch):
    with pytest.raises(UserError, match="8 latent positions"):
        make("sit", monkeypatch, patch=3)


def test_description(monkeypatch):
    told = make("reg", monkeypatch).describe(RegSample(guidance=2.3, interval=(0.0, 0.85)))
    assert (told.sampler, told.steps, told.guidance, told.guidance_scale, told.interval) == (
        "Euler-Maruyama, w = 2 t",
        250,
        "cfg",
        2.3,
        (0.0, 0.85),
    )
    assert [(c.role, c.used_at) for c in told.pretrained] == [("tokenizer", "both"), ("teacher", "train")]
