"""The identity of a measurement: everything that moves a number, as one JSON object, and its hash.

Numbers with different hashes share no table.

In the hash: extractor (weights digest, resize, scaling), reference (digest of the data, split, class weights),
how images are drawn, in what precision they are computed and how they become uint8, estimators and their seeds,
the version of this evaluator. Where pixels pass through Pillow (real images in folders, tars and tables; an extractor
that scales with it), a digest of what this machine's Pillow makes of a fixed picture (common/images/decoding.py):
equal pixels, equal hash, whatever the version. Not in the hash:
- names: of a protocol, of a data set's folder, the free text of a built reference. The digests say what the data are;
- versions of PyTorch and of the machine: they move a score by about 1e-6 of it; a golden test keeps it so.

Version 1 hashed names, and neither precision nor decoding; its records keep their hashes.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

EVALUATOR_VERSION = 2  # raise on any change that moves a number; tests/test_evaluate.py has the golden value
HASH_DIGITS = 12

UINT8_RULES = {"round": "round_half_even", "truncate": "truncate"}  # by the value of `eval.uint8`

# Settings of the estimators. The modules that compute read them from here: what is hashed is what is done.
JACKKNIFE_GROUPS = 20
IS_SPLITS = 10
IS_SHUFFLE_SEED = 2020
KID_COMPLETE_LIMIT = 5000  # images a side; beyond it subsets
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020
PRECISION_K = 3
DENSITY_K = 5
MAX_NEIGHBOURS = 10_000  # images a side for precision, recall, density, coverage, and for subsets of KID
CLASSIFIER_SHRINKAGE = 0.03
MIND_PROJECTIONS = 1000
MIND_SEED = 2020
PSNR_CAP = 100.0  # dB, of an image that is identical to its original
SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_K1, SSIM_K2 = 0.01, 0.03
# how Fréchet distances are estimated
FRECHET_ENTRY = {"fd": "plugin", "cov_ddof": 1, "dtype": "float64", "jackknife_groups": JACKKNIFE_GROUPS}


class Layer(Protocol):
    """What an extractor computes, without its weights."""

    @property
    def id(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def resize(self) -> str: ...
    @property
    def scaling(self) -> str: ...
    @property
    def dims(self) -> int: ...


class ExtractorIdentity(Layer, Protocol):
    """The part of evaluation.features.Extractor that is needed here, where torch is not imported."""

    @property
    def sha256(self) -> str: ...


def embedded_protocol(
    extractor: ExtractorIdentity,
    data: str,
    train_digest: str,
    heldout_digest: str | None,
    num_reference: int,
    resolution: int,
    num_images: int,
    uint8_rule: str = "round_half_even",
    precision: str = "float32",
    decoding: str | None = None,
) -> dict[str, Any]:
    """The embedded protocol: balanced labels against the training split of a data set,
    every class of it weighted alike.

    data: name of the data set; the digests determine images, labels and order of its splits,
        the held-out one being that of the floor;
    num_reference: training images; resolution: pixels; num_images: generated images, sampled in `precision` (float32,
        tf32, bfloat16 or unknown);
    decoding: `ImageSet.decoding` of the real images.
    """
    neighbours = {"n_ref": min(num_reference, MAX_NEIGHBOURS), "n_gen": min(num_images, MAX_NEIGHBOURS)}
    return {
        "extractor": extractor_entry(extractor, extractor.sha256),
        "reference": {
            "id": f"{data}-train",
            "digest": train_digest,
            "heldout_digest": heldout_digest,
            "split": "train",
            "n_images": num_reference,
            "weighting": "class_balanced",
            **decoding_entry(decoding),
        },
        "samples": samples_entry(num_images, "balanced", "shuffled", uint8_rule, precision),
        "estimator": {
            **FRECHET_ENTRY,
            "is": {"splits": IS_SPLITS, "shuffle_seed": IS_SHUFFLE_SEED, "bias": True},
            "kid": {"kernel": "(x.y/D+1)^3", **kid_entry(neighbours["n_ref"], num_images)},
            "prdc": {
                "k_precision": PRECISION_K,
                "compare_precision": "<=",
                "k_density": DENSITY_K,
                "compare_density": "<",
                **neighbours,
            },
            "class_accuracy": {"classifier": "linear_discriminant", "shrinkage": CLASSIFIER_SHRINKAGE},
        },
        "resolution": resolution,
        "evaluator_version": EVALUATOR_VERSION,
    }


def reconstruction_protocol(
    extractor: Mapping[str, Any],
    data: str,
    split: str,
    data_digest: str,
    num_images: int,
    resolution: int,
    perceptual: Mapping[str, Any],
    uint8_rule: str = "round_half_even",
    precision: str = "float32",
    decoding: str | None = None,
) -> dict[str, Any]:
    """Images of a split against what encoding and decoding makes of them.

    extractor: its entry; data_digest: determines the images and their order; perceptual:
    id and digest of the network of the perceptual distance.
    """
    pixels = {"data_range": 255, "mean": "images"}
    ssim = {**pixels, "window": SSIM_WINDOW, "sigma": SSIM_SIGMA, "k1": SSIM_K1, "k2": SSIM_K2, "border": "none"}
    return {
        "extractor": dict(extractor),
        "reference": {
            "id": f"{data}-{split}",
            "digest": data_digest,
            "split": split,
            "n_images": num_images,
            "weighting": "none",
            **decoding_entry(decoding),
        },
        "samples": samples_entry(num_images, "reconstruction", "reference", uint8_rule, precision),
        "estimator": {
            **FRECHET_ENTRY,
            "jackknife": "paired",
            "psnr": {**pixels, "cap_db": PSNR_CAP},
            **({"ssim": ssim} if resolution >= SSIM_WINDOW else {}),
            "perceptual": dict(perceptual),
        },
        "resolution": resolution,
        "evaluator_version": EVALUATOR_VERSION,
    }


def samples_entry(num_images: int, label_law: str, label_order: str, uint8_rule: str, precision: str) -> dict[str, Any]:
    """What a protocol says of the images that are evaluated."""
    return {
        "n": num_images,
        "label_law": label_law,
        "label_order": label_order,
        "uint8_rule": uint8_rule,
        "precision": precision,
        "container": "memory",
    }


def kid_entry(num_reference: int, num_images: int) -> dict[str, Any]:
    """How KID is estimated for sets of these sizes."""
    if max(num_reference, num_images) <= KID_COMPLETE_LIMIT:
        return {"estimator": "complete"}
    return {"estimator": "subsets", "subsets": KID_SUBSETS, "size": KID_SUBSET_SIZE, "seed": KID_SEED}


def decoding_entry(decoding: str | None) -> dict[str, str]:
    """What a protocol says of decoded images; nothing of those that are stored as numbers."""
    return {} if decoding is None else {"decoding": decoding}


def extractor_entry(
    extractor: Layer, sha256: str, comparable_with_inception_fid: bool = False, resize_digest: str | None = None
) -> dict[str, Any]:
    """The extractor's part of every protocol; sha256 is that of its weights,
    resize_digest that of Pillow's scaling where it uses that.
    """
    return {
        "id": extractor.id,
        "sha256": sha256,
        "layer": extractor.layer,
        "resize": extractor.resize,
        "scaling": extractor.scaling,
        "dims": extractor.dims,
        "dtype": "float32",
        "tf32": False,
        "comparable_with_inception_fid": comparable_with_inception_fid,
        **({} if resize_digest is None else {"resize_digest": resize_digest}),
    }


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, UTF-8, whole numbers as integers;
    NaN and infinity are refused with ValueError.
    """
    return json.dumps(_whole_numbers(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """What a table carries in its caption."""
    return digest(without_names(protocol))[:HASH_DIGITS]


def without_names(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol without what is written for people alone.

    Records of version 1 were hashed with it, and keep their hashes.
    """
    if protocol["evaluator_version"] < 2:
        return dict(protocol)
    reference = {key: value for key, value in protocol["reference"].items() if key != "id"}
    return {key: value for key, value in protocol.items() if key != "name"} | {"reference": reference}


DISTANCE = ("fd", "cov_ddof", "dtype")
ESTIMATORS = {
    "is": ("is",), "kid": ("kid",), "mind": ("mind",), "precision": ("prdc",), "recall": ("prdc",),
    "density": ("prdc",), "coverage": ("prdc",),
    "class_accuracy": ("class_accuracy",), "class_accuracy_real": ("class_accuracy",),
    "psnr": ("psnr",), "ssim": ("ssim",), "lpips": ("perceptual",), "perceptual_embedded": ("perceptual",),
}  # fmt: skip


def metric_hash(protocol: Mapping[str, Any], metric: str) -> str:
    """The identity of one metric: the protocol without the settings of other estimators,
    so that KID compares where only k of recall differs.

    A protocol's name is left out in every version: it moves nothing.
    """
    wanted = ESTIMATORS.get(metric, DISTANCE)
    estimator = {key: value for key, value in protocol["estimator"].items() if key in wanted}
    rest = {key: value for key, value in without_names(protocol).items() if key != "name"}
    return digest({"metric": metric, **rest, "estimator": estimator})[:HASH_DIGITS]


def protocol_name(protocol: Mapping[str, Any]) -> str:
    """For people, e.g. `embedded-v1/emoji32-train/n=1000/balanced#3fa2c8d01b7e`,
    led by the protocol's own name where it has one.
    """
    samples = protocol["samples"]
    named = f"{protocol['name']}: " if "name" in protocol else ""
    compared = f"{protocol['extractor']['id']}/{protocol['reference']['id']}"
    return f"{named}{compared}/n={samples['n']}/{samples['label_law']}#{protocol_hash(protocol)}"
