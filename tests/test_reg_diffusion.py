"""DiT's schedule, hybrid objective and respaced ancestral sampler against closed forms."""

import math

import pytest
import torch
from reg_models import CHANNELS, SIDE, Impulses, batch, make, randomized

from pixlat.common.accounting.macs import sampling_cost
from pixlat.common.errors import UserError
from pixlat.common.seeds import Noise, seed_step
from pixlat.methods.reg.config import DitSample
from pixlat.methods.reg.diffusion import BIN, Draws, Gaussian, kl, level_surprise, posterior, predicted, schedule


def betas_by_hand():
    return [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]


def abar_by_hand():
    out, product = [], 1.0
    for beta in betas_by_hand():
        product *= 1 - beta
        out.append(product)
    return out


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_full_schedule():
    s, abar = schedule(1000), abar_by_hand()
    assert s.original.tolist() == list(range(1000))
    for i in (0, 1, 500, 999):
        before = abar[i - 1] if i else 1.0
        beta = betas_by_hand()[i]
        assert s.data[i].item() == pytest.approx(math.sqrt(abar[i]), rel=1e-6)
        assert s.noise[i].item() == pytest.approx(math.sqrt(1 - abar[i]), rel=1e-6)
        assert s.log_beta[i].item() == pytest.approx(math.log(beta), rel=1e-6)
        assert s.mean_data[i].item() == pytest.approx(beta * math.sqrt(before) / (1 - abar[i]), rel=1e-5)
        assert s.mean_state[i].item() == pytest.approx(
            (1 - before) * math.sqrt(1 - beta) / (1 - abar[i]), rel=1e-5, abs=1e-9
        )
        if i:
            assert s.log_posterior[i].item() == pytest.approx(math.log(beta * (1 - before) / (1 - abar[i])), rel=1e-6)
    assert s.log_posterior[0] == s.log_posterior[1]


def test_respaced_schedule():
    """250 of the 1000 times, ends included, with the betas that lead from one to the next."""
    s, abar = schedule(250), abar_by_hand()
    assert s.original.tolist() == [round(i * 999 / 249) for i in range(250)]
    for i in (1, 100, 249):
        here, before = abar[s.original[i]], abar[s.original[i - 1]]
        assert s.log_beta[i].exp().item() == pytest.approx(1 - here / before, rel=1e-5)
    assert schedule(1).original.tolist() == [0] and all(c.isfinite().all() for c in schedule(1))


def test_posterior_is_bayes_rule():
    """q(z_{i-1} | z_i, x) from the product of two Gaussians in z_{i-1}."""
    s, abar = schedule(1000), abar_by_hand()
    i, x, z = 400, 0.3, -0.8
    beta = betas_by_hand()[i]
    precision = (1 - beta) / beta + 1 / (1 - abar[i - 1])
    mean = (math.sqrt(1 - beta) * z / beta + math.sqrt(abar[i - 1]) * x / (1 - abar[i - 1])) / precision
    found = posterior(torch.tensor(x), torch.tensor(z), type(s)(*(c[i] for c in s)))
    assert found.mean.item() == pytest.approx(mean, rel=1e-4) and found.log_variance.exp().item() == pytest.approx(
        1 / precision, rel=1e-4
    )


# -- objective ---------------------------------------------------------------------------------------------------------


def test_kl_against_torch():
    q, p = (Gaussian(torch.randn(100), torch.randn(100)) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(g.mean, (0.5 * g.log_variance).exp()) for g in (q, p))
    )
    torch.testing.assert_close(kl(q, p), expected, atol=1e-5, rtol=1e-5)


def test_levels_are_a_distribution():
    """The probabilities of the 256 grey levels sum to 1, and each is that of its interval."""
    levels = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    p = Gaussian(torch.tensor(0.4, dtype=torch.float64), torch.tensor(math.log(0.3**2), dtype=torch.float64))
    probabilities = (-level_surprise(levels, p)).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    normal = torch.distributions.Normal(p.mean, 0.3)
    torch.testing.assert_close(
        probabilities[100], normal.cdf(levels[100] + BIN) - normal.cdf(levels[100] - BIN), atol=1e-12, rtol=1e-9
    )
    assert level_surprise(torch.tensor(0.0), Gaussian(torch.tensor(50.0), torch.tensor(-8.0))).isfinite()


def training_draws(times):
    torch.manual_seed(3)
    x, noise = torch.randn(2, len(times), CHANNELS, SIDE, SIDE)
    return x, Draws(torch.zeros(len(times), dtype=torch.int64), torch.tensor(times), noise)


def test_perfect_noise_leaves_the_bound_of_the_variance(monkeypatch):
    method = make("dit", monkeypatch)
    x, draws = training_draws([1, 300, 999])
    method.predict = lambda z, times, labels: (draws.noise, -torch.ones_like(z))
    out = method.objective(x, draws)
    # the posterior itself; rounding of 1 / sqrt(abar) near time 999
    assert out["noise"].item() == 0 and abs(out["bound"].item()) < 1e-3
    method.predict = lambda z, times, labels: (draws.noise, torch.ones_like(z))
    s = schedule(1000)
    ratio = [(s.log_posterior[i] - s.log_beta[i]).item() for i in (1, 300, 999)]
    expected = sum(0.5 * (-r - 1 + math.exp(r)) for r in ratio) / 3 / math.log(2)
    assert method.objective(x, draws)["bound"].item() == pytest.approx(expected, abs=1e-3)


def test_hybrid_loss_by_hand(monkeypatch):
    """Mean squared error of the noise plus, in bits, the KL at later times and the surprise of the level at time 0."""
    method = make("dit", monkeypatch)
    x, draws = training_draws([0, 250])
    torch.manual_seed(5)
    noise, fraction = draws.noise + 0.1 * torch.randn_like(x), torch.rand_like(x) * 2 - 1
    method.predict = lambda z, times, labels: (noise, fraction)
    out = method.objective(x, draws)
    s = schedule(1000)
    bits = []
    for row, i in enumerate((0, 250)):
        at = type(s)(*(c[i] for c in s))
        z = at.data * x[row] + at.noise * draws.noise[row]
        p = predicted(noise[row], fraction[row], z, at)
        data = (z - at.noise * noise[row]) / at.data
        torch.testing.assert_close(p.mean, at.mean_data * data + at.mean_state * z, atol=1e-5, rtol=1e-5)
        weight = (fraction[row] + 1) / 2
        torch.testing.assert_close(p.log_variance, weight * at.log_beta + (1 - weight) * at.log_posterior)
        term = level_surprise(x[row], p) if i == 0 else kl(posterior(x[row], z, at), p)
        bits.append(term.mean() / math.log(2))
    assert out["noise"].item() == pytest.approx((noise - draws.noise).square().mean().item(), rel=1e-5)
    assert out["bound"].item() == pytest.approx(torch.stack(bits).mean().item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx((out["noise"] + out["bound"]).item(), rel=1e-6)


def test_the_bound_teaches_the_variance_only(monkeypatch):
    """The gradient of the noise comes from the squared error alone."""
    method = make("dit", monkeypatch)
    x, draws = training_draws([10, 500])
    noise, fraction = torch.randn_like(x).requires_grad_(), torch.zeros_like(x).requires_grad_()
    method.predict = lambda z, times, labels: (noise, fraction)
    method.objective(x, draws)["loss"].backward()
    torch.testing.assert_close(noise.grad, 2 * (noise - draws.noise).detach() / x.numel())
    assert fraction.grad.abs().max() > 0


def test_forward_is_the_objective_of_its_draws(monkeypatch):
    method = randomized(make("dit", monkeypatch))
    seed_step(1, 0, 0)
    out = method("main", batch(), 0)
    seed_step(1, 0, 0)
    x = method.latents(batch())
    labels = method.drop_labels(batch()["label"])
    draws = Draws(labels, torch.randint(1000, (4,)), torch.randn_like(x))
    assert torch.equal(out["loss"], method.objective(x, draws)["loss"])


def test_the_network_hears_the_times_as_they_are(monkeypatch):
    method = make("dit", monkeypatch)
    heard = []
    method.network.register_forward_pre_hook(lambda module, args: heard.append(args[1]))
    method.objective(*training_draws([0, 999]))
    assert heard[0].tolist() == [0.0, 999.0]


# -- sampler -----------------------------------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.5


def perfect_noise(z, data, noise):
    """E[n | z] for data N(MEAN, SPREAD^2), and its slope."""
    slope = noise / (data**2 * SPREAD**2 + noise**2)
    return slope * (z - data * MEAN), slope


@pytest.mark.parametrize("steps", [40, 250])
def test_ancestral_sampler_of_gaussian_data(monkeypatch, steps):
    """Mean and variance are those of the recursion in exact arithmetic, and near the data's."""
    method = make("dit", monkeypatch)
    full = schedule(1000)

    def predict(z, times, labels):
        i = times.long()[0]
        return perfect_noise(z, full.data[i], full.noise[i])[0], -torch.ones_like(z)

    method.predict = predict
    method.decode = lambda latents: latents
    noise = Impulses(steps)
    images = method.sample(torch.zeros(steps + 1, dtype=torch.int64), noise, DitSample(steps=steps))
    assert noise.draw == steps
    mean, variance = 0.0, 1.0
    s = [c.double() for c in schedule(steps)[1:]]
    for i in reversed(range(steps)):
        data, part, mean_data, mean_state, log_posterior = (c[i].item() for c in s[:5])
        predicted_noise, slope = perfect_noise(mean, data, part)
        mean = mean_data * (mean - part * predicted_noise) / data + mean_state * mean
        variance = (mean_data * (1 - part * slope) / data + mean_state) ** 2 * variance + (
            math.exp(log_posterior) if i else 0.0
        )
    still = images[-1]
    spread = (images[:-1] - still).square().sum(dim=0).sqrt()
    torch.testing.assert_close(still, torch.full_like(still, mean), atol=1e-4, rtol=0)  # a float32 state over 250 steps
    torch.testing.assert_close(spread, torch.full_like(spread, math.sqrt(variance)), atol=1e-4, rtol=0)
    assert (mean, math.sqrt(variance)) == pytest.approx((MEAN, SPREAD), abs=0.03 if steps == 250 else 0.1)


def test_guidance_of_the_first_channels(monkeypatch):
    """u + w (c - u) for the guided channels of the noise; the others and the variance are conditional."""
    method = randomized(make("dit", monkeypatch))
    z, labels, time = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([0, 2]), torch.tensor(17)
    noise, fraction = method.guided(z, time, labels, method.channel_scale(3.0, 3))
    conditional, variance = method.predict(z, time.expand(2), labels)
    unconditional, _ = method.predict(z, time.expand(2), torch.tensor([3, 3]))
    expected = unconditional + 3.0 * (conditional - unconditional)
    expected[:, 3] = conditional[:, 3]
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fraction, variance, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("guidance", "forwards"), [(1.0, 250), (1.5, 500)])
def test_executed_forwards(monkeypatch, guidance, forwards):
    with torch.device("meta"):
        method = make("dit", monkeypatch)
    counted = sampling_cost(method, DitSample(guidance=guidance))
    assert counted.net_forwards == {"network": forwards, "decoder": 1} and counted.nfe == 250


def test_sampling_is_finite_and_depends_on_the_class(monkeypatch):
    method = randomized(make("dit", monkeypatch), std=0.02)
    with torch.no_grad():
        a, b = (method.sample(torch.tensor([label]), Noise([5]), DitSample(steps=10)) for label in (0, 1))
    assert a.isfinite().all() and not torch.equal(a, b)


def test_impossible_settings():
    with pytest.raises(UserError, match="1000 training times"):
        DitSample(steps=1001)
    with pytest.raises(UserError, match=r"1 \(off\) or more"):
        DitSample(guidance=0.5)
