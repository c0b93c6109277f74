"""Feature extractors: uint8 images in, features out.

A metric is defined by its extractor, so each has an id and the digest of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pixlat.common.frozen import efficientnet_lite0 as lite0

# images a forward; more run slower on a CPU because their activations leave its caches (32: -25 %, 64: -45 %)
CPU_CHUNK = 16
ACCELERATOR_CHUNK = 256


class Features(NamedTuple):
    """What an extractor finds in a batch of images."""

    pooled: Tensor  # (B, D) float32
    logits: Tensor  # (B, C) float32, of the extractor's own classifier
    spatial: Tensor | None = None  # (B, S) float32, a map of features with its positions, for sFID

    def cpu(self) -> Features:
        """The same on the CPU."""
        return Features(self.pooled.cpu(), self.logits.cpu(), None if self.spatial is None else self.spatial.cpu())


def joined(parts: Sequence[Features]) -> Features:
    """The features of consecutive batches as one."""
    pooled, logits, spatial = zip(*parts, strict=True)
    return Features(torch.cat(pooled), torch.cat(logits), None if spatial[0] is None else torch.cat(spatial))


class Extractor(Protocol):
    """What the evaluator asks of an extractor. Everything but `device` is part of the protocol's identity."""

    id: str
    sha256: str  # of the weights file
    layer: str
    resize: str
    scaling: str
    dims: int
    num_classes: int  # of its classifier
    comparable_with_inception_fid: bool
    resize_digest: str | None
    device: torch.device

    def __call__(self, images: Tensor) -> Features:
        """Features on `device` of images (B, 3, H, W) uint8 on any device.

        An image's features do not depend on the others of its batch.
        """


class NetworkExtractor:
    """An extractor that is one frozen network: checks, chunks and computes in float32 whatever
    the run around it chose.
    """

    comparable_with_inception_fid = False
    resize_digest: str | None = None  # of one that scales with Pillow (common/images/decoding.py)

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device)

    def __call__(self, images: Tensor) -> Features:
        """images: (B, 3, H, W) uint8.

        Computed in float32, TF32 off, outside any autocast, in chunks that suit the device.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(f"the extractor takes uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        on_cpu = self.device.type == "cpu"
        chunks = images.tensor_split(-(-len(images) // (CPU_CHUNK if on_cpu else ACCELERATOR_CHUNK)))
        with exact_float32():
            return joined(map_on_threads(self._chunk, chunks) if on_cpu else [self._chunk(chunk) for chunk in chunks])

    def _chunk(self, images: Tensor) -> Features:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):  # both are settings of the thread
            return self.extract(images)

    def extract(self, images: Tensor) -> Features:
        """The features of one chunk, uint8 on any device."""
        raise NotImplementedError


class EmbeddedExtractor(NetworkExtractor):
    """EfficientNet-Lite0 at 128 px: needs no download. Its distances compare inside this project only."""

    id = "embedded-v1"
    sha256 = lite0.WEIGHTS_SHA256
    layer = "EfficientNet-Lite0 stage 7, mean over positions"
    resize = f"{lite0.INPUT_SIZE} px, bicubic a=-0.5, antialias, half-pixel, float, clipped to [0,255]"
    scaling = "(x-127)/128"
    dims = lite0.POOLED_DIMS
    num_classes = lite0.NUM_CLASSES

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(lite0.EfficientNetLite0(), device)

    def extract(self, images: Tensor) -> Features:
        output = self.network(lite0.resize(images.to(self.device).float()))
        return Features(output.pooled, output.logits)


def map_on_threads(function: Callable[[Tensor], Features], chunks: Sequence[Tensor]) -> list[Features]:
    """One thread a chunk instead of all threads on one operation, for as many threads as PyTorch may use.

    The result does not depend on their number, and where something else keeps a core busy the threads do not wait
    for each other at every small convolution: two threads that share two cores with another process extract ten times
    as many images as two threads within operations.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(chunk) for chunk in chunks]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, chunks))
    finally:
        torch.set_num_threads(threads)  # the call in the workers counts for the whole process


@contextmanager
def exact_float32() -> Iterator[None]:
    """Plain float32 products whatever the run around it chose: no TF32, deterministic convolutions."""
    precision = torch.get_float32_matmul_precision()
    # since torch 2.9 with a switch of its own, which the next line sets as well
    on_cpu = getattr(torch.backends.mkldnn, "matmul", None)
    cpu_precision = None if on_cpu is None else on_cpu.fp32_precision
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if on_cpu is not None:
            on_cpu.fp32_precision = cpu_precision
