"""The shared mathematics: interpolant, conversions, solvers, guidance and building blocks."""

import itertools
import math

import pytest
import torch

from pixlat.common.layers import transformer as blocks
from pixlat.common.maths import flow
from pixlat.common.maths.guidance import classifier_free
from pixlat.common.maths.samplers import ancestral, euler, euler_maruyama, heun
from pixlat.common.seeds import Noise

PAIRS = list(itertools.product(flow.SPACES, flow.SPACES))
TO = {"x": flow.to_data, "eps": flow.to_noise, "v": flow.to_velocity}


def triple(times):
    """x, n, z and the three quantities at the times, in float64."""
    torch.manual_seed(0)
    t = torch.tensor(times, dtype=torch.float64)
    x, n = torch.randn(2, len(times), 3, 4, 4, dtype=torch.float64)
    return t, flow.interpolate(x, n, t), {space: flow.target(space, x, n) for space in flow.SPACES}


# -- flow --------------------------------------------------------------------------------------------------------------


def test_interpolant_ends_and_velocity():
    x, n = torch.randn(2, 2, 3, 4, 4)
    assert torch.equal(flow.interpolate(x, n, torch.zeros(2)), x) and torch.equal(
        flow.interpolate(x, n, torch.ones(2)), n
    )
    assert torch.equal(flow.interpolate(x, n, 0.25), flow.interpolate(x, n, torch.full((2,), 0.25)))
    assert torch.equal(flow.target("v", x, n), n - x)


@pytest.mark.parametrize(("space", "wanted"), PAIRS)
def test_conversions_recover_the_truth(space, wanted):
    t, z, truth = triple([0.06, 0.3, 0.5, 0.94])
    torch.testing.assert_close(TO[wanted](truth[space], space, z, t, 0.05), truth[wanted], atol=1e-13, rtol=1e-12)
    one = TO[wanted](truth[space][1:2], space, z[1:2], 0.3, 0.05)
    torch.testing.assert_close(one, truth[wanted][1:2], atol=1e-13, rtol=1e-12)


def test_denominators_are_clipped():
    t, z, truth = triple([0.01, 0.99])
    near_data = flow.to_velocity(truth["x"], "x", z, t, 0.05)[0]
    torch.testing.assert_close(near_data, (z[0] - truth["x"][0]) / 0.05, atol=1e-13, rtol=0)
    near_noise = flow.to_velocity(truth["eps"], "eps", z, t, 0.05)[1]
    torch.testing.assert_close(near_noise, (truth["eps"][1] - z[1]) / 0.05, atol=1e-13, rtol=0)
    assert flow.floor_at(0.01, 0.05) == 0.05 and flow.floor_at(0.06, 0.05) == 0.06


@pytest.mark.parametrize(("prediction", "measured"), PAIRS)
def test_gain_is_the_error_of_the_conversion(prediction, measured):
    t, z, truth = triple([0.01, 0.3, 0.5, 0.99])
    output = torch.randn_like(z)
    convert = TO[measured]
    difference = convert(output, prediction, z, t, 0.05) - convert(truth[prediction], prediction, z, t, 0.05)
    gain = flow.match_dims(flow.error_gain(prediction, measured, t, 0.05), z)
    torch.testing.assert_close((gain * (output - truth[prediction])).abs(), difference.abs(), atol=1e-11, rtol=1e-11)


def test_logit_normal():
    torch.manual_seed(0)
    logit = torch.logit(flow.logit_normal(0.8, 0.5, 50_000).double())
    assert logit.mean().item() == pytest.approx(0.8, abs=5 * 0.5 / math.sqrt(50_000))
    assert logit.std().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(100_000))
    assert flow.logit_normal(0.0, 1.0, 2, 3, device="meta").shape == (2, 3)


# -- solvers -----------------------------------------------------------------------------------------------------------


def grid(steps):
    return [1 - i / steps for i in range(steps + 1)]


def decay_error(solve, steps):
    """|error| at t = 0 of dz/dt = cos(t) z from t = 1."""
    end = solve(lambda z, t: math.cos(t) * z, torch.ones(1, dtype=torch.float64), grid(steps))
    return abs(end.item() - math.exp(-math.sin(1)))


@pytest.mark.parametrize(
    ("solve", "order"),
    [(euler, 1), (lambda v, z, times: heun(v, z, times, last_euler=False), 2), (heun, 2)],
    ids=["euler", "heun", "heun, last step Euler"],
)
def test_order_of_convergence(solve, order):
    """One Euler step of size h costs O(h^2), so it does not spoil Heun's order."""
    assert math.log2(decay_error(solve, 64) / decay_error(solve, 128)) == pytest.approx(order, abs=0.06)


def test_solvers_are_exact_where_they_should_be():
    z = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(euler(lambda z, t: torch.full_like(z, 2.0), z, [1.0, 0.7, 0.0]), z - 2.0)
    torch.testing.assert_close(
        heun(lambda z, t: torch.full_like(z, 2 * t), z, [1.0, 0.7, 0.0], last_euler=False), z - 1.0
    )
    torch.testing.assert_close(
        heun(lambda z, t: torch.full_like(z, 2 * t), z, [0.0, 0.7, 1.0], last_euler=False), z + 1.0
    )


def test_where_the_velocity_is_evaluated():
    seen = []

    def velocity(z, t):
        seen.append(t)
        return torch.zeros_like(z)

    times = grid(50)
    heun(velocity, torch.zeros(1), times)
    assert len(seen) == 99 and times[-1] not in seen and seen[:3] == [times[0], times[1], times[1]]
    seen.clear()
    heun(velocity, torch.zeros(1), times, last_euler=False)
    assert len(seen) == 100 and seen[-1] == times[-1]
    seen.clear()
    euler(velocity, torch.zeros(1), times)
    assert seen == times[:-1]
    seen.clear()
    heun(velocity, torch.zeros(1), times[-2:])
    assert seen == [times[-2]]


def test_without_variance_the_stochastic_solver_is_eulers():
    z = torch.randn(2, 3, dtype=torch.float64)
    field = lambda z, t: math.cos(t) * z  # noqa: E731
    found = euler_maruyama(field, lambda t: 0.0, z, grid(20), Noise([1, 2]))
    torch.testing.assert_close(found, euler(field, z, grid(20)), atol=1e-15, rtol=1e-15)


def test_stochastic_steps_by_hand():
    """Noise of variance rate(t) |dt| in every step but the last, from each image's own generator,
    in the state's type.
    """
    z, times = torch.randn(2, 3, dtype=torch.float64), [1.0, 0.6, 0.3, 0.0]
    draws = Noise([5, 6])
    expected = z
    for t, t_next in itertools.pairwise(times):
        expected = expected + (t_next - t) * (2 * expected + t)
        if t_next:
            expected = expected + math.sqrt(3 * t * (t - t_next)) * draws.normal(3).double()
    found = euler_maruyama(lambda z, t: 2 * z + t, lambda t: 3 * t, z, times, Noise([5, 6]))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-14)


def test_ancestral_steps_by_hand():
    z, draws, seen = torch.randn(2, 3), Noise([5, 6]), []

    def posterior(z, i):
        seen.append(i)
        return 0.5 * z + i, torch.tensor(0.1 * (i + 1))

    expected = 0.5 * z + 2 + 0.3 * draws.normal(3)
    expected = 0.5 * expected + 1 + 0.2 * draws.normal(3)
    torch.testing.assert_close(ancestral(posterior, z, 3, Noise([5, 6])), 0.5 * expected)
    assert seen == [2, 1, 0]


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_classifier_free_guidance():
    calls = []

    def predict(z, labels):
        calls.append(labels.tolist())
        return z * (1 + labels.view(-1, 1))

    z, labels = torch.randn(2, 5), torch.tensor([1, 3])
    guided = classifier_free(predict, z, labels, null_label=9, scale=2.5)
    torch.testing.assert_close(guided, 10 * z + 2.5 * (z * torch.tensor([[2.0], [4.0]]) - 10 * z))
    assert calls == [[1, 3, 9, 9]]
    assert torch.equal(classifier_free(predict, z, labels, null_label=9, scale=1.0), z * torch.tensor([[2.0], [4.0]]))
    assert calls[1:] == [[1, 3]]


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_rms_norm():
    norm = blocks.RMSNorm(16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = 3 * torch.randn(4, 5, 16)
    formula = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    torch.testing.assert_close(norm(x), formula, atol=1e-6, rtol=1e-6)
    low = x.bfloat16()
    in_float32 = low.float() * torch.rsqrt(low.float().square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    assert norm(low).dtype == torch.bfloat16
    torch.testing.assert_close(norm(low), in_float32.bfloat16(), atol=0, rtol=2**-8)
    assert norm.weight.dtype == torch.float32 and norm(torch.zeros(16)).abs().sum() == 0


def test_sinusoidal_embedding():
    """Cosines first, period 10000, the scalar unscaled."""
    embedding = blocks.SinusoidalEmbedding(8)
    t = torch.tensor([0.0, 0.37])
    seen = []
    embedding.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert embedding(t).shape == (2, 8)
    angles = [[value * math.exp(-math.log(10000) * k / 128) for k in range(128)] for value in t.tolist()]
    expected = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles])
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2730), (1280, 3413), (1664, 4437)])
def test_swiglu_hidden(width, hidden):
    assert blocks.swiglu_hidden(width, 4.0) == hidden


def test_swiglu_gates_with_the_first_half():
    layer = blocks.SwiGLU(6, 4)
    x = torch.randn(2, 3, 6)
    hidden = x @ layer.w12.weight.T + layer.w12.bias
    gated = hidden[..., :4] * torch.sigmoid(hidden[..., :4]) * hidden[..., 4:]
    torch.testing.assert_close(layer(x), gated @ layer.w3.weight.T + layer.w3.bias, atol=1e-6, rtol=1e-5)


def test_patchify_order_and_inverse():
    images = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    tokens = blocks.patchify(images, 2)
    assert tokens.shape == (2, 9, 12)
    token, row, column, channel = 5, 1, 0, 2  # token 5 is grid row 1, column 2
    assert tokens[1, token, (row * 2 + column) * 3 + channel] == images[1, channel, 1 * 2 + row, 2 * 2 + column]
    assert torch.equal(blocks.unpatchify(tokens, 2, 3), images)


@pytest.mark.parametrize("bottleneck", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_patch_embed_is_a_linear_map_of_patches(bottleneck, bias):
    embed = blocks.PatchEmbed(3, 2, 8, bottleneck, bias)
    images = torch.randn(2, 3, 6, 6)
    patches = blocks.patchify(images, 2)
    weight = embed.down.weight.permute(0, 2, 3, 1).flatten(1)  # (channel, row, column) to (row, column, channel)
    expected = patches @ weight.T + (0 if embed.down.bias is None else embed.down.bias)
    expected = expected @ embed.up.weight.T + embed.up.bias if bottleneck else expected
    torch.testing.assert_close(embed(images), expected, atol=1e-6, rtol=1e-5)
    assert (embed.down.bias is None) == (bottleneck > 0 and not bias)


def test_sincos_table_puts_the_column_first():
    table = blocks.sincos_table(4, 16)
    row, column = 2, 3
    omega = [10000 ** (-k / 4) for k in range(4)]
    expected = [f(index * w) for index in (column, row) for f in (math.sin, math.cos) for w in omega]
    torch.testing.assert_close(table[row * 4 + column], torch.tensor(expected), atol=1e-7, rtol=0)
    assert table.dtype == torch.float32


def test_rotation_by_hand():
    """Row turns the first half, column the second; pairs are adjacent; the prefix stays as it is."""
    table = blocks.rope_table(3, 8, prefix=2)
    x = torch.randn(2, 11, 8)
    turned = blocks.rotate(x, table)
    assert torch.equal(turned[:, :2], x[:, :2])
    row, column = 1, 2
    for pair, angle in enumerate([row * 1.0, row * 10000**-0.5, column * 1.0, column * 10000**-0.5]):
        a, b = x[:, 2 + row * 3 + column, 2 * pair : 2 * pair + 2].unbind(-1)
        expected = torch.stack(
            (a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)), dim=-1
        )
        torch.testing.assert_close(
            turned[:, 2 + row * 3 + column, 2 * pair : 2 * pair + 2], expected, atol=1e-6, rtol=1e-5
        )
    assert torch.equal(blocks.rope_table(3, 8), table[2:])


def test_rotation_makes_products_relative():
    """<R_m q, R_n k> depends on the offset of the two tokens only."""
    table = blocks.rope_table(4, 8)
    q, k = torch.randn(2, 8)
    q_all, k_all = (
        blocks.rotate(q.expand(16, 8), table).view(4, 4, 8),
        blocks.rotate(k.expand(16, 8), table).view(4, 4, 8),
    )
    torch.testing.assert_close(q_all[0, 1] @ k_all[2, 2], q_all[1, 2] @ k_all[3, 3], atol=1e-5, rtol=1e-5)
    assert abs(q_all[0, 1] @ k_all[2, 2] - q_all[0, 1] @ k_all[2, 3]) > 1e-3


def test_rotation_is_the_same_when_compiled():
    """Eager mode multiplies complex numbers, compiled code real ones."""
    table, x = blocks.rope_table(3, 8, prefix=1), torch.randn(2, 10, 8)
    compiled = torch.compile(blocks.rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), blocks.rotate(x, table), atol=1e-6, rtol=1e-6)
    assert compiled(x.bfloat16(), table).dtype == blocks.rotate(x.bfloat16(), table).dtype == torch.float32


@pytest.mark.parametrize("exact", [False, True])
def test_attention(exact):
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    weights = torch.softmax(q.double() @ k.double().transpose(-2, -1) / math.sqrt(8), dim=-1)
    torch.testing.assert_close(
        blocks.attend(q, k, v, exact=exact), (weights @ v.double()).float(), atol=2e-6, rtol=1e-5
    )
    assert blocks.attend(q, k, v.bfloat16(), exact=exact).dtype == torch.bfloat16


def test_exact_attention_keeps_float32_logits_under_autocast():
    """With the identity for values the output is the weights: to bf16's rounding if the logits are float32,
    much further off if they are not.
    """
    torch.manual_seed(0)
    q, k = 3 * torch.randn(2, 2, 4, 16, 8)
    v = torch.eye(16, dtype=torch.bfloat16).expand(2, 4, 16, 16)
    truth = blocks.attend(q, k, v.float(), exact=True)
    with torch.autocast("cpu", torch.bfloat16):
        exact, fused = blocks.attend(q, k, v, exact=True).float(), blocks.attend(q.bfloat16(), k.bfloat16(), v).float()
    torch.testing.assert_close(exact, truth, atol=0, rtol=2**-8)
    assert ((fused - truth) / truth).abs().max() > 2**-5
