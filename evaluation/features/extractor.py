"""Feature extractors: they map uint8 images to features.

A metric depends on its extractor, so each extractor has an id and the digest of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pixlat.common.frozen import efficientnet_lite0 as lite0

# Images per forward pass. Larger chunks are slower on a CPU, because their activations do not fit into its caches
# (32 images: -25 %, 64: -45 %).
CPU_CHUNK = 16
ACCELERATOR_CHUNK = 256


class Features(NamedTuple):
    """The outputs of an extractor for a batch of images."""

    pooled: Tensor  # (B, D) float32
    logits: Tensor  # (B, C) float32, of the extractor's classifier
    spatial: Tensor | None = None  # (B, S) float32, a flattened feature map, for sFID

    def cpu(self) -> Features:
        """A copy on the CPU."""
        return Features(self.pooled.cpu(), self.logits.cpu(), None if self.spatial is None else self.spatial.cpu())


def joined(parts: Sequence[Features]) -> Features:
    """Concatenates the features of consecutive batches."""
    pooled, logits, spatial = zip(*parts, strict=True)
    return Features(torch.cat(pooled), torch.cat(logits), None if spatial[0] is None else torch.cat(spatial))


class Extractor(Protocol):
    """The interface of an extractor. Everything but `device` is part of the protocol's identity."""

    id: str
    sha256: str  # of the weights file
    layer: str
    resize: str
    scaling: str
    dims: int
    num_classes: int  # number of classes of its classifier
    comparable_with_inception_fid: bool
    resize_digest: str | None
    device: torch.device

    def __call__(self, images: Tensor) -> Features:
        """Features on `device` of images (B, 3, H, W) uint8 on any device.

        An image's features do not depend on the others of its batch.
        """


class NetworkExtractor:
    """An extractor with one frozen network.

    It checks its input, splits it into chunks and computes in float32, whatever precision the caller has set.
    """

    comparable_with_inception_fid = False
    resize_digest: str | None = None  # for an extractor that resizes with Pillow (common/images/decoding.py)

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device)

    def __call__(self, images: Tensor) -> Features:
        """The features of images (B, 3, H, W) uint8.

        Computes in float32 without TF32 and without autocast, in chunks whose size suits the device.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(f"the extractor takes uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        on_cpu = self.device.type == "cpu"
        chunks = images.tensor_split(-(-len(images) // (CPU_CHUNK if on_cpu else ACCELERATOR_CHUNK)))
        with exact_float32():
            return joined(map_on_threads(self._chunk, chunks) if on_cpu else [self._chunk(chunk) for chunk in chunks])

    def _chunk(self, images: Tensor) -> Features:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):  # both apply to this thread only
            return self.extract(images)

    def extract(self, images: Tensor) -> Features:
        """The features of one chunk, uint8 on any device."""
        raise NotImplementedError


class EmbeddedExtractor(NetworkExtractor):
    """EfficientNet-Lite0 at 128 px, which needs no download. Compare its distances inside this project only."""

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
    """Computes each chunk on one thread, instead of all threads on one operation. Uses PyTorch's number of threads.

    The result does not depend on the number of threads. The threads also do not wait for each other after every small
    convolution, which matters if another process keeps a core busy: on two cores shared with another process, two such
    threads extract ten times as many images as two threads within operations.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(chunk) for chunk in chunks]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, chunks))
    finally:
        torch.set_num_threads(threads)  # the call in the workers has changed the number for the whole process


@contextmanager
def exact_float32() -> Iterator[None]:
    """Computes float32 products without TF32 and with deterministic convolutions, whatever the caller has set."""
    precision = torch.get_float32_matmul_precision()
    # torch 2.9 and newer have a separate setting for the CPU, which set_float32_matmul_precision changes as well
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread within the block, so that sums are formed in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
