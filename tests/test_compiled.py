"""Compiled blocks: how many graphs they take, that training and sampling do not share them,
and that nothing falls back to slow code in silence.
"""

import pytest
import torch
from toys import settings, tiny_jit

from pixlat.common.errors import UserError
from pixlat.common.seeds import Noise
from pixlat.common.training import compiled
from pixlat.common.training.setup import prepare_blocks
from pixlat.methods.base import DataInfo
from pixlat.methods.jit.config import JiTConfig, JiTSample
from pixlat.methods.jit.method import JiTMethod

# The token counts and the dropout of JiT-H at 256 px: blocks 0 and 1 plain with 256 tokens, 2 with dropout,
# 3 to 5 with dropout and 288 tokens, 6 and 7 plain
JIT = JiTConfig(depth=8, width=16, heads=2, patch=16, bottleneck=8, context_tokens=32, context_start=3, dropout=0.1)
KINDS = 4


@pytest.fixture
def graphs(monkeypatch):
    """What dynamo compiles: for training and for sampling, the number of symbolic sizes of each graph,
    which then runs as plain torch.
    """
    found: dict[str, list[int]] = {"train": [], "sample": []}

    def backend(module, inputs):
        found["train" if torch.is_grad_enabled() else "sample"].append(
            sum(isinstance(each, torch.SymInt) for each in inputs)
        )
        return module.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield found
    torch.compiler.reset()


def train_steps(method: JiTMethod, count: int = 2) -> None:
    """Losses and gradients of two images each, as the trainer has them on a GPU."""
    size = method.data.image_size
    method.train()
    for step in range(count):
        torch.manual_seed(step)
        batch = {
            "image": torch.rand(2, 3, size, size) * 2 - 1,
            "label": torch.tensor([0, 1]),
            "index": torch.tensor([0, 1]),
        }
        with torch.autocast("cpu", torch.bfloat16):
            loss = method("main", batch, step)["loss"]
        loss.backward()


@torch.no_grad()
def sample(method: JiTMethod, *sizes: int) -> None:
    """Guided and unguided samples in batches of several sizes, as previews and evaluations ask for them."""
    method.eval()
    for size in sizes:
        with torch.autocast("cpu", torch.bfloat16):
            method.sample(
                torch.zeros(size, dtype=torch.int64), Noise(list(range(size))), JiTSample(steps=2, interval=[0.5, 1.0])
            )


@pytest.mark.parametrize(("first", "recompute"), [("sampling", False), ("training", True)])
def test_training_has_a_graph_for_each_kind_of_block_whatever_was_sampled_before(graphs, first, recompute):
    """One cache of eight graphs for everything was full after a preview, and the rest of the run was not compiled;
    shapes became symbols.
    """
    torch.manual_seed(0)
    method = JiTMethod(JIT, DataInfo("toy", num_classes=3, image_size=256, num_train=8))
    prepare_blocks(method, settings(compile=True, recompute_blocks=recompute))
    if first == "sampling":
        sample(method, 4, 3, 2)
        assert graphs["sample"] and not graphs["train"]
    train_steps(method)
    assert graphs["train"] == [0] * KINDS, "one graph a kind of block, and every size is a number"
    sample(method, 4, 3, 2)
    sampled = len(graphs["sample"])
    train_steps(method)
    sample(method, 4, 3, 2)
    assert graphs["train"] == [0] * KINDS and len(graphs["sample"]) == sampled, "nothing is compiled again"


def test_compiled_training_never_falls_back_in_silence(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "GRAPHS_AT_MOST", KINDS - 1)
    method = tiny_jit()
    prepare_blocks(method, settings(compile=True))
    with pytest.raises(UserError, match=r"called in more than 3 ways .* in AdaLNBlock\. Set train\.compile=false"):
        train_steps(method)


def test_a_block_that_cannot_be_compiled_as_a_whole_is_refused(graphs, monkeypatch):
    method = tiny_jit()
    forward = type(method.blocks()[0]).forward

    def with_a_break(self, x, condition, rope):
        torch._dynamo.graph_break()
        return forward(self, x, condition, rope)

    monkeypatch.setattr(type(method.blocks()[0]), "forward", with_a_break)
    prepare_blocks(method, settings(compile=True))
    with pytest.raises(UserError, match=r"Block cannot be compiled as a whole: .*Set train\.compile=false"):
        train_steps(method)
