"""pMF's training objective against a literal transcription of its description,
difference quotients and closed forms.
"""

import math
from dataclasses import replace

import pytest
import torch
from pmf_models import SMALL, make, mixed_draws, small
from torch import nn

from pixlat.common.maths import crops
from pixlat.common.maths.crops import CropBoxes
from pixlat.common.maths.flow import floor_at, match_dims
from pixlat.methods.pmf.config import PMFConfig
from pixlat.methods.pmf.network import Condition
from pixlat.methods.pmf.objective import adaptive, draw, draw_times, power_law, to_data, to_velocity

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ABLATIONS = [
    {},
    {"prediction": "u"},
    {"preconditioner": "linear"},
    {"preconditioner": "edm"},
    {"preconditioner": "scm"},
]


def images(dtype=torch.float64):
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=dtype) * 2 - 1


def both_velocities(method, z, t, h, omega, t_min, t_max, labels):
    """F(z, t, h, omega, a, b, y) -> (u, v), by the plain forward."""
    network = method.network
    tokens, _ = network.shared(network.embed(z, Condition(h, omega, t_min, t_max, labels)))
    return tuple(
        to_velocity(method.config, head(tokens, network.rope)[0], z, t) for head in (network.head, method.v_head)
    )


def released_fields(method, x, labels, draws):
    """Section 6 step by step: three forwards for the target, and torch.func.jvp over all samples."""
    t, r, omega = draws.t, draws.r, draws.omega
    wide = (slice(None), None, None, None)
    zero, one, null = torch.zeros_like(t), torch.ones_like(t), torch.full_like(labels, 3)
    flow = torch.arange(len(x)) < draws.flow_matching
    z = (1 - t[wide]) * x + t[wide] * draws.noise
    v_t = (z - x) / t.clamp(0.05, 1)[wide]
    masked = torch.where((draws.t_min <= t) & (t <= draws.t_max), omega, 1.0)
    with torch.no_grad():
        v_c0 = both_velocities(method, z, t, zero, omega, zero, one, labels)[1]
        v_u = both_velocities(method, z, t, zero, one, zero, one, null)[1]
        v_c = both_velocities(method, z, t, zero, masked, zero, one, labels)[1]
        v_g = torch.where(
            flow[wide], v_t + (1 - 1 / omega)[wide] * (v_c0 - v_u), v_t + (1 - 1 / masked)[wide] * (v_c - v_u)
        )
        v_g = torch.where(draws.dropped[wide], v_t, v_g)
    labels = torch.where(draws.dropped, null, labels)
    u, du, v = torch.func.jvp(
        lambda z, t, r: both_velocities(method, z, t, t - r, omega, draws.t_min, draws.t_max, labels),
        (z, t, r),
        (v_c, one, zero),
        has_aux=True,
    )
    return u + (t - r)[wide] * du.detach(), v, v_g


def gradients(method, *outputs):
    weights = [torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output) for output in outputs]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, list(method.parameters()))


@pytest.mark.parametrize("config", ABLATIONS)
@pytest.mark.parametrize("jvp", ["fused", "func"])
def test_fields_and_gradients_follow_the_released_steps(config, jvp):
    """Two forwards for three, tangents for half the batch and without a graph:
    the same numbers and the same gradients.
    """
    method, oracle = small(jvp=jvp, **config).double(), small(jvp="func", **config).double()
    x, draws = images(), mixed_draws()
    fields = method.fields(x, LABELS, draws)
    expected = released_fields(oracle, x, LABELS, draws)
    for found, wanted in zip((fields.u_at_t, fields.v, fields.target), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    assert not fields.target.requires_grad
    for (name, _), a, b in zip(
        method.named_parameters(),
        gradients(method, fields.u_at_t, fields.v),
        gradients(oracle, *expected[:2]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8, msg=name)
        assert a.any(), name


@pytest.mark.parametrize("flow_matching", [0, 6])
def test_batches_without_one_kind_of_sample(flow_matching):
    """The ablations' extremes: no sample matches flows, or all do."""
    draws = replace(mixed_draws(), flow_matching=flow_matching)
    if flow_matching:
        draws = replace(draws, r=draws.t, t_min=torch.zeros_like(draws.t), t_max=torch.ones_like(draws.t))
    method, x = small().double(), images()
    fields = method.fields(x, LABELS, draws)
    expected = released_fields(small(jvp="func").double(), x, LABELS, draws)
    for found, wanted in zip((fields.u_at_t, fields.v, fields.target), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("config", ABLATIONS)
@pytest.mark.parametrize("jvp", ["fused", "func"])
def test_tangent_equals_a_difference_quotient(config, jvp):
    """d/ds of u(z + s v, t + s, r): h = t - r moves, and so does the division by t, but for t below the clip."""
    method = small(jvp=jvp, **config).double()
    draws, z = mixed_draws(), images()
    dz = draws.noise[2:]
    condition = Condition(draws.t - draws.r, draws.omega, draws.t_min, draws.t_max, LABELS)
    _, du, _ = method.velocities(z, draws.t, condition, dz)
    step = 1e-6
    moved = torch.cat((torch.zeros_like(z[:2]), dz))

    def u(s):
        with torch.no_grad():
            return method.velocities(z + s * moved, draws.t + s, condition._replace(h=condition.h + s), dz)[0][2:]

    quotient = (u(step) - u(-step)) / (2 * step)
    torch.testing.assert_close(du, quotient, atol=2e-7, rtol=2e-7)
    assert not du.requires_grad and du.abs().amax(dim=(1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("t", [0.02, 0.3])
def test_the_division_stops_moving_below_the_clip(t):
    """With a network that ignores its input, du = (dz - u [t >= 0.05]) / max(t, 0.05) exactly."""
    method = small().double()
    with torch.no_grad():
        for p in (*method.network.head.linear.parameters(), *method.v_head.linear.parameters()):
            p.zero_()
    z, dz = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    times = torch.full((2,), t, dtype=torch.float64)
    condition = Condition(times / 2, times + 1, 0 * times, 0 * times + 1, LABELS[:2])
    u, du, _ = method.velocities(z, times, condition, dz)
    torch.testing.assert_close(u, z / max(t, 0.05))
    torch.testing.assert_close(du, (dz - (u if t >= 0.05 else 0)) / max(t, 0.05))


# -- the guided target -------------------------------------------------------------------------------------------------


def recorded_target(draws, x=None):
    """The fields with velocities that tell which question they answer, and the questions: v = omega + 100 label."""
    method, x = small().double(), images() if x is None else x
    asked = {}

    def instantaneous(z, t, omega, labels):
        asked["beforehand"] = (omega.tolist(), labels.tolist())
        return (omega + 100.0 * labels)[:, None, None, None].expand_as(z)

    def velocities(z, t, condition, dz):
        asked["forward"], asked["tangent"] = condition, dz
        v = (condition.omega + 100.0 * condition.labels)[:, None, None, None].expand_as(z)
        return torch.zeros_like(z), torch.zeros_like(dz), v

    method.instantaneous, method.velocities = instantaneous, velocities
    fields = method.fields(x, LABELS, draws)
    z = torch.lerp(x, draws.noise, draws.t[:, None, None, None])
    plain = (z - x) / draws.t.clamp(min=0.05)[:, None, None, None]
    return (fields.target - plain).mean(dim=(1, 2, 3)).tolist(), asked


def test_guidance_of_each_kind_of_sample():
    draws = mixed_draws()
    guidance, asked = recorded_target(draws)

    def expected(omega, label):
        return (1 - 1 / omega) * ((omega + 100 * label) - (1 + 300))

    # 0 and 5 lost their class; 1 matches flows; 2 has t = 0.95 outside [0.1, 0.7], so no guidance;
    # 3 and 4 are inside their intervals
    assert guidance == pytest.approx([0, expected(3.0, 1), 0, expected(2.0, 0), expected(4.0, 1), 0], abs=1e-9)
    assert asked["beforehand"] == ([1.0, 2.0, 4.0, 5.0] + [1.0] * 6, [2, 0, 1, 2] + [3] * 6)


def test_the_network_is_told_the_scale_as_drawn_and_the_tangent_has_its_class():
    draws = mixed_draws()
    _, asked = recorded_target(draws)
    told = asked["forward"]
    assert torch.equal(told.omega, draws.omega)  # outside the interval too, and without a class too
    assert told.labels.tolist() == [3, 1, 2, 0, 1, 3]
    assert torch.equal(told.t_min, draws.t_min) and torch.equal(told.t_max, draws.t_max)
    torch.testing.assert_close(told.h, draws.t - draws.r)
    # v of the masked scale and the undropped class: sample 2 has scale 1, sample 5 keeps label 2
    assert asked["tangent"][:, 0, 0, 0].tolist() == [1 + 200, 2, 4 + 100, 5 + 200]


def test_the_target_is_noise_minus_data_only_above_the_clip():
    method, x = small().double(), images()
    draws = replace(mixed_draws(), omega=torch.ones(6, dtype=torch.float64))
    target = method.fields(x, LABELS, draws).target
    factor = draws.t / floor_at(draws.t, 0.05)
    torch.testing.assert_close(target, match_dims(factor, x) * (draws.noise - x), atol=1e-9, rtol=0)
    assert factor[1].item() == pytest.approx(0.4) and (factor[[0, 2, 3, 5]] == 1).all()


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_adaptive_weight_makes_gradients_free_of_scale():
    config = PMFConfig()
    error = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64, requires_grad=True)
    weighted = adaptive(error, config)
    assert weighted.tolist() == pytest.approx([1e-3 / 0.011, 1 / 1.01, 1e4 / (1e4 + 0.01)])
    weighted.sum().backward()
    assert error.grad.tolist() == pytest.approx([1 / 0.011, 1 / 1.01, 1 / (1e4 + 0.01)])
    assert adaptive(error, PMFConfig(norm_power=0.0)).tolist() == error.tolist()


def test_the_loss_weighs_each_sample_by_its_own_summed_error():
    method, x, draws = small().double(), images(), mixed_draws()
    out = method.objective(x, LABELS, draws)
    fields = method.fields(x, LABELS, draws)
    sums = [((a - fields.target) ** 2).sum(dim=(1, 2, 3)) for a in (fields.u_at_t, fields.v)]
    assert out["loss"].item() == pytest.approx(sum((s / (s + 0.01)).mean().item() for s in sums), rel=1e-12)
    assert out["loss_u"].item() == pytest.approx((sums[0].mean() / 192).item()) and out[
        "loss_v"
    ].item() == pytest.approx((sums[1].mean() / 192).item())
    assert out.keys() == {"loss", "loss_u", "loss_v"}


class PixelDistance(nn.Module):
    """Stands in for a perceptual network: the mean square, and a record of what it saw."""

    def forward(self, x, y):
        self.seen = x.detach(), y
        return (x - y).square().mean(dim=(1, 2, 3))


def whole_images(count, size=8):
    zero, side = torch.zeros(count), torch.full((count,), float(size))
    return CropBoxes(zero, zero, side, side)


def with_distances(**config):
    method = small(**config)
    method.perceptual = nn.ModuleDict({"lpips": PixelDistance(), "convnext": PixelDistance()})
    return method


def test_perceptual_terms_compare_the_image_that_u_points_to():
    """Only where t is below the threshold, strictly; with their own weights; the gradient reaches u and not du/dt."""
    method = with_distances(perceptual_max_t=0.6, perceptual_size=32)
    draws = replace(mixed_draws(dtype=torch.float32), crops=whole_images(6))
    x = images(torch.float32)
    out, fields = method.objective(x, LABELS, draws), method.fields(x, LABELS, draws)
    denoised = fields.z - draws.t[:, None, None, None] * fields.u
    condition = Condition(
        draws.t - draws.r, draws.omega, draws.t_min, draws.t_max, torch.where(draws.dropped, 3, LABELS)
    )
    above = draws.t >= 0.05
    # the network's own image
    torch.testing.assert_close(denoised[above], method.network(fields.z, condition)[above], atol=1e-5, rtol=1e-5)
    a, b = crops.paired_crop([denoised, x], draws.crops, 32)
    torch.testing.assert_close(method.perceptual["lpips"].seen[0], a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method.perceptual["lpips"].seen[1], b)
    # t = 0.6 is not below
    distances = torch.where(
        torch.tensor([False, True, False, False, True, True]), (a - b).square().mean(dim=(1, 2, 3)), 0.0
    )
    plain = method.objective(x, LABELS, replace(draws, crops=None))["loss"]
    weighted = (distances / (distances + 0.01)).mean()
    torch.testing.assert_close(out["loss"] - plain, 0.5 * weighted, atol=2e-6, rtol=1e-5)
    assert out["lpips"].item() == pytest.approx(distances.mean().item(), rel=1e-5) and not out["lpips"].requires_grad
    parts = torch.autograd.grad(out["loss"] - plain, list(method.v_head.parameters()), allow_unused=True)
    assert all(part is None or part.abs().max() < 1e-6 for part in parts)


@pytest.mark.parametrize(("config", "names"), [
    ({"perceptual": "none"}, []),
    ({"perceptual": "embedded"}, ["embedded"]), ({"perceptual": "lpips+convnext"}, ["lpips", "convnext"]),
    ({"perceptual": "lpips+convnext", "lambda2": 0.0}, ["lpips"]),
    ({"perceptual": "lpips+convnext", "lambda1": 0.0}, ["convnext"]),
])  # fmt: skip
def test_perceptual_networks_of_weight_zero_are_left_out(config, names):
    with torch.device("meta"):
        method = make(8, 3, **{**SMALL, **config})
    assert list(method.perceptual) == names
    assert not any(p.requires_grad for p in method.perceptual.parameters())
    assert (draw(method.config, images()).crops is None) == (not names)


# -- draws -------------------------------------------------------------------------------------------------------------

COUNT = 40_000


def times(**config):
    torch.manual_seed(0)
    t, r, first = draw_times(PMFConfig(**config), COUNT)
    assert (r <= t).all() and (r >= 0).all() and (t <= 1).all()
    return t.double(), r.double(), first


def assert_normal(logits, mean, std):
    count = len(logits)
    assert logits.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert logits.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))


def test_times_on_the_plane():
    """Flow matching: the first half, r = t, a plain logit-normal draw.

    The others: the larger and the smaller of two.
    """
    t, r, first = times(time_mean=0.8, time_std=0.8)
    assert first == COUNT // 2 and torch.equal(t[:first], r[:first]) and (r[first:] < t[first:]).all()
    assert_normal(torch.logit(t[:first]), 0.8, 0.8)
    shift, spread = 0.8 / math.sqrt(math.pi), 0.8 * math.sqrt(1 - 1 / math.pi)
    assert_normal(torch.logit(t[first:]), 0.8 + shift, spread)
    assert_normal(torch.logit(r[first:]), 0.8 - shift, spread)


def test_a_share_of_the_times_is_uniform():
    t, r, first = times(time_mean=0.0, time_std=1e-3, uniform_share=0.1)  # all others are 1/2
    elsewhere = ((t - 0.5).abs() > 0.01) | ((r - 0.5).abs() > 0.01)
    assert elsewhere.double().mean().item() == pytest.approx(0.1, abs=0.008)
    late = t[first:][elsewhere[first:]]
    # the larger of two uniforms: P(t < s) = s^2
    assert (late < math.sqrt(0.5)).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_share_of_the_steps_ends_at_the_image():
    t, r, first = times(zero_share=0.3)
    t_plain, r_plain, _ = times()
    assert torch.equal(t, t_plain) and torch.equal(r[:first], t[:first])
    whole = r[first:] == 0
    assert whole.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(r[first:][~whole], r_plain[first:][~whole])


@pytest.mark.parametrize(("sampler", "flow"), [("diagonal", COUNT), ("zero", 0), ("edges", COUNT // 2)])
def test_times_of_the_ablations(sampler, flow):
    t, r, first = times(time_sampler=sampler)
    assert first == flow and torch.equal(r[:first], t[:first]) and not r[first:].any()
    assert_normal(torch.logit(t), 0.8, 0.8)


@pytest.mark.parametrize(("count", "flow"), [(1, 0), (5, 2), (8, 4)])
def test_half_of_a_micro_batch_rounds_down(count, flow):
    assert draw_times(PMFConfig(), count)[2] == flow


def test_draws_by_position():
    """Labels are lost by the first samples, as many as a binomial law says;
    flow matching has the interval (0, 1), the others their own.
    """
    config = PMFConfig(noise_scale=2.0)
    batch = torch.zeros(64, 1, 2, 2)
    counts, lows, highs, noises = [], [], [], []
    for seed in range(400):
        torch.manual_seed(seed)
        draws = draw(config, batch)
        count = int(draws.dropped.sum())
        assert draws.dropped[:count].all()
        assert not draws.t_min[:32].any() and (draws.t_max[:32] == 1).all()
        counts.append(count)
        lows.append(draws.t_min[32:])
        highs.append(draws.t_max[32:])
        noises.append(draws.noise)
    assert sum(counts) / len(counts) == pytest.approx(6.4, abs=5 * math.sqrt(64 * 0.09 / 400))
    assert torch.tensor(counts).double().var().item() == pytest.approx(64 * 0.09, rel=0.35)
    lows, highs, noises = torch.cat(lows), torch.cat(highs), torch.cat(noises)
    assert lows.min() >= 0 and lows.max() < 0.5 <= highs.min() and highs.max() < 1
    assert lows.mean().item() == pytest.approx(0.25, abs=0.007) and highs.mean().item() == pytest.approx(
        0.75, abs=0.007
    )
    assert noises.std().item() == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_guidance_scales_follow_the_power_law(beta):
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    scale = power_law(u, 8.0, beta)
    assert (scale[0].item(), scale[-1].item()) == pytest.approx((1.0, 8.0))
    density = 1 / torch.gradient(scale, spacing=1 / 4000)[0][1:-1]
    ratio = density * scale[1:-1] ** beta
    assert (ratio.max() / ratio.min()).item() == pytest.approx(1.0, abs=1e-4)
    if beta == 2:
        torch.testing.assert_close(scale, 8 / (8 - 7 * u))


def test_forward_is_the_objective_of_its_draws():
    method = small()
    batch = {"image": images(torch.float32), "label": LABELS}
    torch.manual_seed(3)
    losses = method("main", batch, 0)
    torch.manual_seed(3)
    again = method.objective(batch["image"], LABELS, draw(method.config, batch["image"]))
    assert torch.equal(losses["loss"], again["loss"]) and losses["loss"].requires_grad
    assert not any(value.requires_grad for name, value in losses.items() if name != "loss")


# -- pre-conditioners --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "edm", "scm"])
def test_preconditioners(kind):
    config = PMFConfig(preconditioner=kind)
    output, z = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    times = torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    x = to_data(config, output, z, times)
    for i, t in enumerate(times.tolist()):
        sigma, angle = t / (1 - t), math.atan2(t, 1 - t)
        skip, out = {
            "linear": (1 - t, t),
            "edm": (0.25 / (0.25 + sigma**2) / (1 - t), 0.5 * sigma / math.sqrt(0.25 + sigma**2)),
            "scm": (math.cos(angle) / math.hypot(t, 1 - t), -math.sin(angle)),
        }[kind]
        torch.testing.assert_close(x[i], skip * z[i] + out * output[i])
    assert to_data(config, output, z, torch.ones(4, dtype=torch.float64)).isfinite().all()  # where sampling begins
