"""pMF's perceptual networks: which samples they see, that the others change nothing, and what is counted."""

from dataclasses import replace

import pytest
import torch
from pmf_models import SMALL, mixed_draws, small
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pixlat.common.accounting.macs import training_cost
from pixlat.common.maths import crops
from pixlat.methods.base import DataInfo
from pixlat.methods.pmf.config import PMFConfig
from pixlat.methods.pmf.method import PMFMethod
from pixlat.methods.pmf.objective import compared_samples, draw, draw_times, number_compared, share_below

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class FirstFeatures(nn.Module):
    """Stands in for a perceptual network, with features, so that equal losses are no matter of course."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, x, y):
        self.number = len(x)
        return (self.conv(x).tanh() - self.conv(y).tanh()).square().mean(dim=(1, 2, 3))


def test_perceptual_networks_run_only_on_the_samples_that_count():
    """The same loss and gradients as when they see all samples and those above the threshold are thrown away."""
    method = small(perceptual_max_t=0.6, perceptual_size=32)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    method.perceptual = nn.ModuleDict({"lpips": FirstFeatures(), "convnext": FirstFeatures()})
    draws = replace(mixed_draws(dtype=torch.float32), crops=crops.draw_crops(6, 8, "cpu"))
    positions = compared_samples(method.config, draws.t)
    assert positions.tolist() == [1, 4, 5]  # t = 0.02, 0.04, 0.5; 0.6 is not below
    losses, gradients = [], []
    for compared in (None, positions):
        out = method.objective(x, LABELS, replace(draws, compared=compared))
        losses.append(torch.stack([out[name].detach() for name in ("loss", "lpips", "convnext")]))
        gradients.append(torch.autograd.grad(out["loss"], list(method.network.parameters()), allow_unused=True))
    assert method.perceptual["lpips"].number == 3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for found, expected in zip(*gradients[::-1], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9


@pytest.mark.parametrize(
    ("count", "below", "number"),
    [(6, 4, 4), (16, 9, 10), (64, 43, 48), (64, 64, 64), (64, 0, 8), (20, 19, 20), (1, 0, 1)],
)
def test_the_compared_samples_are_rounded_up_to_an_eighth_of_the_micro_batch(count, below, number):
    t = torch.cat((torch.linspace(0.1, 0.7, below), torch.linspace(0.81, 0.99, count - below)))[torch.randperm(count)]
    positions = compared_samples(PMFConfig(perceptual_max_t=0.8), t)
    chosen = torch.arange(count) if positions is None else positions
    assert len(chosen) == number and torch.equal(chosen, chosen.sort().values)
    assert t[chosen].max() <= t[~torch.isin(torch.arange(count), chosen)].amin() if number < count else True
    assert set((t < 0.8).nonzero().flatten().tolist()) <= set(chosen.tolist())


def test_few_shapes_meet_the_perceptual_networks():
    torch.manual_seed(0)
    config = PMFConfig(perceptual="embedded")
    drawn = [draw(config, torch.zeros(64, 1, 2, 2)) for _ in range(100)]
    numbers = [64 if draws.compared is None else len(draws.compared) for draws in drawn]
    assert len(set(numbers)) <= 8 and {number % 8 for number in numbers} == {0} and len(set(numbers)) > 1
    for draws in drawn:
        assert draws.compared is None or set((draws.t < 0.8).nonzero().flatten().tolist()) <= set(
            draws.compared.tolist()
        )


@pytest.mark.parametrize("config", [
    {}, {"time_mean": 0.0, "perceptual_max_t": 0.6, "uniform_share": 0.1},
    {"flow_share": 0.25}, {"uniform_share": 0.5, "zero_share": 0.5},
    {"time_sampler": "diagonal"}, {"time_sampler": "zero"}, {"time_sampler": "edges"},
    {"perceptual_max_t": 1.0}, {"perceptual_max_t": 0.0},
])  # fmt: skip
def test_costs_count_the_mean_number_of_compared_samples(config):
    config = PMFConfig(**config)
    torch.manual_seed(0)
    t = draw_times(config, 40_000)[0]
    assert share_below(config, config.perceptual_max_t) == pytest.approx(
        (t < config.perceptual_max_t).double().mean().item(), abs=0.01
    )
    micro_batches = t[torch.randperm(40_000, generator=torch.Generator().manual_seed(1))].reshape(-1, 64)
    mean = sum(number_compared(config, each) for each in micro_batches) / len(micro_batches)
    assert number_compared(config, torch.empty(64, device="meta")) == pytest.approx(mean, abs=0.8)


def test_the_counted_macs_of_training_are_those_of_the_compared_samples():
    """By the distance's own MACs: the mean share of it, and with a threshold of 1 all of it."""
    macs = {}
    for threshold in (0.0, 0.8, 1.0):
        config = PMFConfig(**SMALL, perceptual="embedded", perceptual_size=32, perceptual_max_t=threshold)
        macs[threshold] = training_cost(PMFMethod, config, DataInfo("test", 3, 8, 100)).per_image
    share = share_below(config, 0.8)
    assert (macs[0.8] - macs[0.0]) / (macs[1.0] - macs[0.0]) == pytest.approx(
        (round(64 * share + 3.5) - 8) / 56, abs=1e-4
    )


def test_times_are_drawn_on_the_host_so_that_no_gpu_is_waited_for():
    """With fake CUDA tensors: a number read from one would be an error.

    Among fake tensors all samples are compared, since memory must suffice for them.
    """
    with FakeTensorMode():
        draws = draw(PMFConfig(perceptual="embedded"), torch.empty(16, 3, 8, 8, device="cuda"))
        assert {value.device.type for value in (draws.t, draws.r, draws.omega, draws.noise)} == {
            "cuda"
        } and draws.compared is None
    seen = []

    def copied(tensor, device, non_blocking):
        seen.append((tensor.shape, tensor.device.type, device, non_blocking))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", copied)
        draws = draw(PMFConfig(perceptual="embedded"), torch.zeros(16, 3, 8, 8))
    assert [(len(shape), kind, wait) for shape, kind, _, wait in seen] == [(1, "cpu", True)] * 3 and len(
        draws.compared
    ) < 16
