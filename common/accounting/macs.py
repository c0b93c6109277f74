"""Counts what a method costs by running it without data, on the meta device and with fake tensors.

So the counts need no large or fast machine. The unit is the MAC: one multiply-accumulate of a matrix product,
convolution or attention. Element-wise operations count as 0. The papers print MACs as "Gflops".
Real tensors would give wrong counts: on a CPU, PyTorch's counter counts fused attention as 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.frozen.tokenizer import Tokenizer
from pixlat.common.seeds import Noise

if TYPE_CHECKING:
    from pixlat.common.method import Batch, DataInfo, Method

BATCH = 2  # images per batch when sampling is counted
# Images per batch when training is counted. It is larger because some networks see only a share of the batch
# (pMF's perceptual networks).
TRAINING_BATCH = 64


def count_macs(run: Callable[[], object]) -> int:
    """MACs of all operations that `run` executes on meta tensors, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def on_meta(method_class: type[Method], config: Any, data: DataInfo) -> Method:
    """Builds the method on the meta device: its tensors have shapes but no values."""
    with torch.device("meta"):
        return method_class(config, data)


def empty_batch(data: DataInfo, size: int, device: str | torch.device, image: bool = True) -> Batch:
    """A training batch of the right shapes. image: whether it contains images (`Method.needs_images`)."""
    index = torch.zeros(size, dtype=torch.int64, device=device)
    batch = {"label": index, "index": index}
    if image:
        batch["image"] = torch.zeros(size, data.channels, data.image_size, data.image_size, device=device)
    if data.latents is not None:
        batch["moments"] = torch.zeros(size, *data.latents.shape, device=device)
    return batch


@dataclass(frozen=True)
class TrainingCost:
    """MACs of training.

    They include forward and backward of every active phase and frozen networks, but not optimizers
    and latent statistics.
    """

    # one pair for each part of the training: (images seen before it starts, MACs per image); the first starts at 0
    parts: tuple[tuple[int, int], ...]
    # MACs per image of the frozen networks whose outputs are cached (`FeatureTable`). They run once for each image,
    # so no part contains them.
    encoding: int

    @property
    def per_image(self) -> int:
        """MACs per image in the last part, where every phase and every term of the loss is active."""
        return self.parts[-1][1]

    def total(self, images: int, encoded: int, batch: int = 1) -> int:
        """MACs of training on the first `images` images in steps of `batch` images.

        encoded: how many images the frozen networks encoded into the cache meanwhile.
        """
        starts = [-(-first // batch) * batch for first, _ in self.parts] + [images]
        spans = (max(0, min(end, images) - start) for start, end in pairwise(starts))
        return self.encoding * encoded + sum(span * macs for span, (_, macs) in zip(spans, self.parts, strict=True))


def training_cost(method_class: type[Method], config: Any, data: DataInfo) -> TrainingCost:
    """Counts one training step in each part of the training; the method's turning points separate the parts."""
    method = on_meta(method_class, config, data).train()
    batch = empty_batch(data, TRAINING_BATCH, "meta", method.needs_images(data))
    encoding = sum(
        count_and_skip_encoding(table, batch)
        for table in vars(method).values()
        if isinstance(table, FeatureTable) and table.num_images
    )

    def step(images_seen: int) -> None:
        method.begin_step(images_seen)
        for phase in method.phases:
            if method.phase_active(phase, images_seen):
                method(phase, batch, 0)["loss"].backward()

    starts = sorted({0, *method.turning_points()})
    return TrainingCost(
        tuple((first, count_macs(partial(step, first)) // TRAINING_BATCH) for first in starts),
        encoding // TRAINING_BATCH,
    )


def tokenizer_macs(method_class: type[Method], config: Any, data: DataInfo) -> int:
    """MACs per image of frozen autoencoders in a training step of the last part of the training.

    The result is 0 if the latents are stored in files or cached.
    """
    method = on_meta(method_class, config, data).train()
    batch = empty_batch(data, TRAINING_BATCH, "meta", method.needs_images(data))
    for table in [table for table in vars(method).values() if isinstance(table, FeatureTable) and table.num_images]:
        count_and_skip_encoding(table, batch)
    encoders = [module.encoder for module in method.modules() if isinstance(module, Tokenizer)]
    with recorded({str(number): encoder for number, encoder in enumerate(encoders)}) as records:
        begin_last_part(method)
        for phase in method.phases:
            method(phase, batch, 0)
    return sum(record.macs for record in records.values()) // TRAINING_BATCH


def begin_last_part(method: Method) -> None:
    """Begins a step after the last turning point of the training: every phase and term of the loss is active there."""
    method.begin_step(max([0, *method.turning_points()]))


def count_and_skip_encoding(table: FeatureTable, batch: Batch) -> int:
    """MACs of the table's network for a batch on the meta device.

    Afterwards the table returns the same meta tensors without running the network again.
    """
    outputs: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        macs = count_macs(lambda: outputs.append(table.compute(batch["image"])))
    table.compute = lambda images: outputs[0]
    return macs


@dataclass(frozen=True)
class SamplingCost:
    """The cost of sampling one image.

    A forward is one image through one network, so guidance that doubles the batch counts as two forwards per image.
    """

    net_forwards: dict[str, float]  # executed forwards, by network
    macs_per_forward: dict[str, int]  # mean over the executed forwards
    macs_decoder: int
    macs_per_image: int  # all networks, guidance and decoder included
    nfe: int  # velocity evaluations; guidance branches do not count
    numbers: int = 0  # random numbers that sampling draws on the CPU
    draws: int = 0  # separate draws of these numbers; only the first draw can be prepared in advance


def sampling_cost(method: Method, sample_config: Any) -> SamplingCost:
    """Runs the sampler once for a batch; a reconstruction method, which has none, encodes and decodes instead.

    `method` must be on the meta device (`on_meta`).
    """
    noise = Noise(range(BATCH), "meta")
    with recorded(method.sampling_networks()) as networks, torch.no_grad():
        if method.task == "reconstruction":
            method.eval().decode(method.encode(empty_batch(method.data, BATCH, "meta")["image"]))
        else:
            method.eval().sample(torch.zeros(BATCH, dtype=torch.int64, device="meta"), noise, sample_config)
    return SamplingCost(
        net_forwards={name: network.images / BATCH for name, network in networks.items()},
        macs_per_forward={name: network.macs // max(network.images, 1) for name, network in networks.items()},
        macs_decoder=networks["decoder"].macs // BATCH if "decoder" in networks else 0,
        macs_per_image=sum(network.macs for network in networks.values()) // BATCH,
        nfe=method.evaluations(sample_config),
        numbers=noise.numbers,
        draws=noise.draws,
    )


class Recorded:
    """Replaces the `forward` of a network on meta tensors and counts images and MACs.

    It runs the network only for input shapes that are new to it.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.images = 0
        self.macs = 0
        self.seen: dict[str, tuple[Any, int]] = {}  # input signature -> output, MACs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = repr(tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), (args, kwargs)))
        if signature not in self.seen:
            outputs: list[Any] = []
            macs = count_macs(lambda: outputs.append(self.forward(*args, **kwargs)))
            self.seen[signature] = outputs[0], macs
        output, macs = self.seen[signature]
        self.images += next(len(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.macs += macs
        return output


@contextmanager
def recorded(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, Recorded]]:
    """Records the calls of these networks inside the `with` block."""
    records = {name: Recorded(network.forward) for name, network in networks.items()}
    try:
        for name, network in networks.items():
            network.forward = records[name]
        yield records
    finally:
        for network in networks.values():
            del network.forward  # the forward of the class applies again


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters in the leaderboard's categories. A tensor that two networks share counts once."""

    gen_trainable: int  # trainable parameters of the networks that sample, without the decoder
    gen_total: int  # the same plus frozen parameters and stored tables (position tables, latent statistics)
    decoder: int
    aux_train_only: int  # everything else: discriminators, teachers, projectors


def parameter_counts(method: Method) -> ParameterCounts:
    """Counts the values in state dicts, so tables that are recomputed on loading (non-persistent buffers) count 0."""
    networks = method.sampling_networks()
    decoder = _stored(networks.pop("decoder", nn.Module()))
    generator = {key: tensor for network in networks.values() for key, tensor in _stored(network).items()}
    rest = {key: tensor for key, tensor in _stored(method).items() if key not in generator and key not in decoder}
    trainable = [tensor for tensor in generator.values() if tensor.requires_grad]
    return ParameterCounts(
        _numel(trainable), _numel(generator.values()), _numel(decoder.values()), _numel(rest.values())
    )


def _stored(module: nn.Module) -> dict[int, Tensor]:
    """Floating-point parameters and persistent buffers, by the `id` of the tensor."""
    return {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values() if tensor.is_floating_point()}


def _numel(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


class Fakes(FakeTensorMode):
    """A fake-tensor mode that a module shares with its deep copies, such as an EMA of its weights.

    Plain FakeTensorMode would be copied together with each tensor.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Fakes:
        return self


@contextmanager
def silent_copies() -> Iterator[None]:
    """Silences the warning that PyTorch prints when it deep-copies fake tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def activation_bytes(method_class: type[Method], config: Any, data: DataInfo, batch: int, bf16: bool = False) -> int:
    """Bytes that autograd keeps from the forward to the backward of a micro-batch, without parameters.

    If the method has several phases, the result is that of the phase that keeps most. The tensors are fake CPU tensors
    and not meta tensors, because PyTorch then chooses fused attention, which keeps no attention weights.
    """
    with silent_copies(), Fakes(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        method = method_class(config, data).train()
        begin_last_part(method)
        inputs = empty_batch(data, batch, "cpu", method.needs_images(data))
        return max(_saved_bytes(method, partial(method, phase, inputs, 0)) for phase in method.phases)


def _saved_bytes(method: nn.Module, forward: Callable[[], object]) -> int:
    """Total bytes of the distinct storages that the graph of `forward` saves, without the module's own tensors."""
    own = {tensor.untyped_storage()._cdata for tensor in (*method.parameters(), *method.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no address is reused

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())
