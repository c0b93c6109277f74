"""The named protocols: data that describe how published scores are measured. Imports no torch.

`describe` completes a protocol with the digests of the user's files and the number of images. The hash of the result
identifies the numbers (identity.py). The digests of Inception, clean-fid's network and DINOv2 are the same as those
that independent public projects pin for these files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixlat.common.config.resolve import PRECISIONS
from pixlat.common.errors import UserError, close_match
from pixlat.evaluation.protocols.identity import (
    DENSITY_K,
    EVALUATOR_VERSION,
    IS_SHUFFLE_SEED,
    IS_SPLITS,
    MAX_NEIGHBOURS,
    MIND_PROJECTIONS,
    MIND_SEED,
    PRECISION_K,
    UINT8_RULES,
    decoding_entry,
    extractor_entry,
    kid_entry,
)
from pixlat.evaluation.protocols.needed_files import NeededFile

LARGE_GROUPS = 10  # jackknife groups at 2048 dimensions, where each group costs seconds and 67 MB


@dataclass(frozen=True)
class ExtractorCard:
    """Describes an extractor without loading its network."""

    id: str
    layer: str
    resize: str
    scaling: str
    dims: int
    num_classes: int  # 0: the extractor has no classifier, so there is no inception score
    file: NeededFile
    spatial_dims: int = 0  # number of features for sFID
    comparable_with_inception_fid: bool = False

    @property
    def sha256(self) -> str | None:
        """The sha256 of the weights, or None if it is not known."""
        return self.file.sha256


@dataclass(frozen=True)
class ReferenceRule:
    """Names the real images of a protocol and the file format of their statistics."""

    id: str
    # The file format. .npz files: "adm" (mu, sigma, mu_s, sigma_s and 10,000 images), "mu_sigma" and "ref_mu_sigma".
    # Files of `pixlat reference build`: "built".
    kind: str
    split: str
    file: NeededFile
    n_images: int | None = None  # None: the file gives the number
    crop: str = "adm_center_crop"


@dataclass(frozen=True)
class NamedProtocol:
    """One published way to measure generated images."""

    name: str
    about: str
    extractor: ExtractorCard
    reference: ReferenceRule | None  # None: the originals of the reconstructions
    metrics: tuple[str, ...]
    resolution: int | None  # pixels; None: any size, which must be the same for the images and the reference
    label_law: str = "balanced"
    num_images: int = 50_000

    @property
    def files(self) -> tuple[NeededFile, ...]:
        """The files that the user must provide."""
        return (self.extractor.file, *([self.reference.file] if self.reference else []))


# -- extractors --------------------------------------------------------------------------------------------------------

INCEPTION_FILE = NeededFile(
    "weights",
    ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
INCEPTION = ExtractorCard(
    "inception-2015", "pool3; sFID: mixed_6/conv channels 0 to 6 in height, width, channel order",
    "299 px, bilinear, TensorFlow 1, no antialias",
    "(x-128)/128", 2048, 1008, INCEPTION_FILE, spatial_dims=2023, comparable_with_inception_fid=True,
)  # fmt: skip
HALF_PIXEL = ExtractorCard(
    "inception-2015-half-pixel",
    "pool3",
    "299 px, bilinear, half-pixel, no antialias",
    "(x-128)/128",
    2048,
    1008,
    INCEPTION_FILE,
    2023,
    True,
)
CLEAN = ExtractorCard(
    "inception-2015-clean", "pool3",
    "299 px, Pillow bicubic with antialias, a channel at a time in float, clipped to [0,255]", "(x-128)/128", 2048, 0,
    NeededFile(
        "weights",
        ("inception-2015-12-05.pt",),
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
)  # fmt: skip
DINOV2 = ExtractorCard(
    "dinov2-vitl14", "class token after the last norm; positions resampled bicubic with offset 0.1, no antialias",
    "224 px, Pillow bicubic, uint8",
    "ImageNet mean and deviation", 1024, 0,
    NeededFile(
        "weights",
        ("dinov2_vitl14_pretrain.pth",),
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        1_217_586_395,
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
)  # fmt: skip

# -- references --------------------------------------------------------------------------------------------------------

IMAGENET_TRAIN = 1_281_167
JIT_SHA256 = {
    256: "412046720c0d496dc6d72a30eac3e22b9ef6ddac3501cce7f996674ad227ba4c",
    512: "cdd15b54f9d1f26a881fcdc920a3410fa7a934047d6c4f5b8395b87182a9ab42",
}


def _adm(size: int) -> ReferenceRule:
    name = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}[size]
    source = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{size}/{name}"
    return ReferenceRule(
        f"adm-imagenet{size}", "adm", "train", NeededFile("reference", (name,), source), IMAGENET_TRAIN
    )


def _jit(size: int) -> ReferenceRule:
    name = f"jit_in{size}_stats.npz"
    file = NeededFile(
        "reference", (name,), f"https://github.com/LTH14/JiT/raw/main/fid_stats/{name}", sha256=JIT_SHA256[size]
    )
    return ReferenceRule(f"jit-imagenet{size}", "mu_sigma", "train", file, IMAGENET_TRAIN)


def _pmf(size: int) -> ReferenceRule:
    file = NeededFile("reference", (f"imagenet_{size}_fid_stats.npz",), "https://huggingface.co/Lyy0725/pMF")
    return ReferenceRule(f"pmf-imagenet{size}", "ref_mu_sigma", "train", file, IMAGENET_TRAIN)


def _built(name: str) -> ReferenceRule:
    command = (
        f"build it: pixlat reference build protocol={name} images=FOLDER size=PIXELS id=NAME "
        f"out={name}-reference.safetensors"
    )
    return ReferenceRule(
        "built", "built", "train", NeededFile("reference", (f"{name}-reference.safetensors",), command)
    )


# -- protocols ---------------------------------------------------------------------------------------------------------

NEIGHBOURS = ("precision", "recall", "density", "coverage")
WITH_IMAGES = ("kid", "mind", *NEIGHBOURS)
EVERYTHING = ("fid", "sfid", "is", *WITH_IMAGES)

_ALL = (
    *(
        NamedProtocol(
            f"adm{size}{suffix}",
            f"ADM's ImageNet {size} reference, {law} labels",
            INCEPTION,
            _adm(size),
            EVERYTHING,
            size,
            law,
        )
        for size in (256, 512)
        for suffix, law in (("", "random"), ("-balanced", "balanced"))
    ),
    NamedProtocol("jit256", "JiT's ImageNet 256 reference", INCEPTION, _jit(256), ("fid", "is"), 256),
    NamedProtocol("jit512", "JiT's ImageNet 512 reference", INCEPTION, _jit(512), ("fid", "is"), 512),
    NamedProtocol("pmf256", "pMF's ImageNet 256 reference", HALF_PIXEL, _pmf(256), ("fid", "is"), 256),
    NamedProtocol("pmf512", "pMF's ImageNet 512 reference", HALF_PIXEL, _pmf(512), ("fid", "is"), 512),
    NamedProtocol(
        "inception", "FID and company against your own reference", INCEPTION, _built("inception"), EVERYTHING, None
    ),
    NamedProtocol(
        "clean",
        "clean-fid's clean mode against your own reference",
        CLEAN,
        _built("clean"),
        ("fid", *WITH_IMAGES),
        None,
    ),
    NamedProtocol(
        "fd_dinov2",
        "FD-DINOv2, ViT-L/14, against your own reference",
        DINOV2,
        _built("fd_dinov2"),
        ("fd_dinov2", *WITH_IMAGES),
        None,
    ),
    NamedProtocol(
        "rfid",
        "reconstructions of a validation split",
        INCEPTION,
        None,
        ("rfid", "psnr", "ssim", "lpips"),
        None,
        "reconstruction",
    ),
)
PROTOCOLS: Mapping[str, NamedProtocol] = {protocol.name: protocol for protocol in _ALL}
RECONSTRUCTIONS = "rfid"
EMBEDDED = "embedded"  # score/embedded.py measures it against the data set of a run


def get_protocol(name: str) -> NamedProtocol:
    """The protocol with this name. Raises UserError with the nearest name if there is none."""
    if name not in PROTOCOLS:
        names = (EMBEDDED, *PROTOCOLS)
        raise UserError(f"protocol={name!r} is not known.{close_match(name, names)} Protocols: {', '.join(names)}.")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class SampleRule:
    """Everything about how the images were generated that can change a score."""

    n: int
    label_law: str  # balanced, random, unknown
    uint8_rule: str  # round_half_even, truncate, unknown
    container: str = "lossless"  # or lossy
    precision: str = "unknown"  # the precision of sampling: float32, tf32, bfloat16, unknown
    decoding: str | None = None  # the digest of decoding, for lossy files (common/images/decoding.py)


def describe(
    protocol: NamedProtocol,
    weights_sha256: str,
    reference: Mapping[str, Any],
    n_features: int,
    resolution: int,
    samples: SampleRule,
    resize_digest: str | None = None,
) -> dict[str, Any]:
    """The complete protocol, as it stands in records.

    reference: digests and counts of the user's file (`reference_files.Reference.entry`); n_features: number of real
    images with known features; resize_digest: for an extractor that resizes with Pillow.
    """
    card = protocol.extractor
    estimator: dict[str, Any] = {"fd": "plugin", "cov_ddof": 1, "dtype": "float64", "jackknife_groups": LARGE_GROUPS}
    if "is" in protocol.metrics:
        estimator["is"] = {
            "splits": IS_SPLITS,
            "shuffle_seed": IS_SHUFFLE_SEED,
            "generator": "RandomState",
            "bias": False,
        }
    if "kid" in protocol.metrics:
        estimator["kid"] = {"kernel": "(x.y/D+1)^3", **kid_entry(n_features, samples.n)}
        estimator["mind"] = {
            "projections": MIND_PROJECTIONS,
            "scale": "3D",
            "n": min(n_features, samples.n, MAX_NEIGHBOURS),
            "seed": MIND_SEED,
        }
        estimator["prdc"] = {
            "k_precision": PRECISION_K, "compare_precision": "<=", "k_density": DENSITY_K, "compare_density": "<",
            "n_ref": n_features, "n_gen": samples.n, "n_gen_density": min(samples.n, MAX_NEIGHBOURS),
        }  # fmt: skip
    return {
        "name": protocol.name,
        "extractor": extractor_entry(card, weights_sha256, card.comparable_with_inception_fid, resize_digest),
        "reference": {"split": "train", "weighting": "none", **reference},
        "samples": {
            "n": samples.n, "label_law": samples.label_law, "label_order": "any", "uint8_rule": samples.uint8_rule,
            "precision": samples.precision, "container": samples.container,
            "seeds": "mean_over_seeds", **decoding_entry(samples.decoding),
        },
        "estimator": estimator,
        "resolution": resolution,
        "evaluator_version": EVALUATOR_VERSION,
    }  # fmt: skip


def check_request(
    protocol: str, labels: str | None, uint8: str | None, precision: str | None, seeds: Sequence[int]
) -> None:
    """Raises UserError for values that have the right type but are not allowed."""
    if protocol != EMBEDDED:
        get_protocol(protocol)
    allowed = (
        ("labels", labels, ("balanced", "random")),
        ("uint8", uint8, tuple(UINT8_RULES)),
        ("precision", precision, PRECISIONS),
    )
    for key, value, options in allowed:
        if value not in (None, *options):
            raise UserError(f"{key}={value!r} is not one of {', '.join(options)}.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(
            f"seeds={list(seeds)} is not valid. Give at least one seed, all different and none negative, for example "
            "seeds=[0,1,2]."
        )
