"""Our JiT against a second, plain formulation of the spec: outputs and every gradient."""

import pytest
import torch
from jit_models import TINY, make, randomized
from plain_jit import plain_forward


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_outputs_and_gradients_equal_the_plain_formulation(attention):
    method = randomized(make(**TINY, attention=attention)).double()
    z, time, labels = (
        torch.randn(3, 3, 32, 32, dtype=torch.float64),
        torch.tensor([0.1, 0.5, 0.97], dtype=torch.float64),
        torch.tensor([1, 7, 1000]),
    )
    ours, plain = method.network(z, time, labels), plain_forward(method, z, time, labels)
    # float32 tables and time features bound the agreement
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    parameters = dict(method.network.named_parameters())
    for (name, _), a, b in zip(
        parameters.items(),
        *(torch.autograd.grad(out.sin().sum(), parameters.values()) for out in (ours, plain)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=name)
