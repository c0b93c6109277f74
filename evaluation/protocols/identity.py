"""The identity of a measurement: one JSON object with everything that changes a number, and its hash.

The leaderboard never puts numbers with different hashes into one table.

The hash covers:
- the extractor: the digest of its weights, its resize and its scaling;
- the reference: the digest of the data, the split and the class weights;
- the generated images: how labels are drawn, the precision of sampling and the conversion to uint8;
- the estimators with their seeds, and the version of this evaluator;
- Pillow, if it decodes the real images (folders, tars, tables) or if the extractor resizes with it. The hash then
  covers a digest of a fixed picture as this machine's Pillow processes it (common/images/decoding.py). Versions of
  Pillow that give equal pixels give equal hashes.
The hash does not cover:
- names: of a protocol, of a data set's folder, and the free text of a built reference. The digests identify the data;
- the version of PyTorch and the machine. They change a score by about 1e-6 of its value, and a test checks this
  against a stored value.

Version 1 hashed names, but neither precision nor decoding. Its records keep their hashes.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

EVALUATOR_VERSION = 2  # increase it with any change that changes a number; tests/test_evaluate.py stores the value
HASH_DIGITS = 12

UINT8_RULES = {"round": "round_half_even", "truncate": "truncate"}  # keyed by the value of `eval.uint8`

# Settings of the estimators. The modules that compute read them from here, so the hash covers the values in use.
JACKKNIFE_GROUPS = 20
IS_SPLITS = 10
IS_SHUFFLE_SEED = 2020
KID_COMPLETE_LIMIT = 5000  # images on each side; KID of larger sets uses subsets
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020
PRECISION_K = 3
DENSITY_K = 5
MAX_NEIGHBOURS = 10_000  # images on each side for precision, recall, density, coverage, and for subsets of KID
CLASSIFIER_SHRINKAGE = 0.03
COPY_QUANTILE = 0.05  # share of the held-out images that are "nearest" to the training images
MIND_PROJECTIONS = 1000
MIND_SEED = 2020
PSNR_CAP = 100.0  # dB, the value for an image that is identical to its original
SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_K1, SSIM_K2 = 0.01, 0.03
# how Fréchet distances are estimated
FRECHET_ENTRY = {"fd": "plugin", "cov_ddof": 1, "dtype": "float64", "jackknife_groups": JACKKNIFE_GROUPS}


class Layer(Protocol):
    """Describes which features an extractor computes, without its weights."""

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
    """The part of evaluation.features.extractor.Extractor that this module needs, without its import of torch."""

    @property
    def sha256(self) -> str: ...
    @property
    def comparable_with_inception_fid(self) -> bool: ...
    @property
    def resize_digest(self) -> str | None: ...


JUDGED = "embedded-v2"  # the name of the judged protocol
JUDGED_VERSION = 3  # its evaluator's version; the other protocols' numbers are those of EVALUATOR_VERSION


class JudgeIdentity(Protocol):
    """The part of evaluation.judges.panel.Judge that this module needs."""

    @property
    def extractor(self) -> ExtractorIdentity: ...
    @property
    def ranks(self) -> bool: ...
    @property
    def labels_of(self) -> str | None: ...


def judged_protocol(
    judges: Sequence[JudgeIdentity],
    data: str,
    train_digest: str,
    heldout_digest: str | None,
    num_reference: int,
    resolution: int,
    num_images: int,
    label_law: str,
    uint8_rule: str = "round_half_even",
    precision: str = "float32",
    decoding: str | None = None,
) -> dict[str, Any]:
    """The embedded protocol: several judges compare images with a data set's training part and its held-out part.

    Every class has the same weight on all sides.

    data: name of the data set; train_digest and heldout_digest: they determine images, labels and order of the two
        parts; num_reference: number of training images; resolution: pixels;
    num_images: number of generated images; label_law: how their labels were chosen (heldout: those of held-out images);
    precision: of sampling (float32, tf32, bfloat16 or unknown); decoding: `ImageSet.decoding` of the real images.
    """
    neighbours = {"n_ref": min(num_reference, MAX_NEIGHBOURS), "n_gen": min(num_images, MAX_NEIGHBOURS)}
    return {
        "name": JUDGED,
        "judges": [judge_entry(judge) for judge in judges],
        "reference": {
            "id": f"{data}-train",
            "digest": train_digest,
            "heldout_digest": heldout_digest,
            "split": "train",
            "n_images": num_reference,
            "weighting": "class_balanced",
            **decoding_entry(decoding),
        },
        "samples": samples_entry(num_images, label_law, "stratified", uint8_rule, precision),
        "estimator": {
            **FRECHET_ENTRY,
            "is": {"splits": IS_SPLITS, "shuffle_seed": IS_SHUFFLE_SEED, "bias": True},
            "kid": {"kernel": "(x.y/D+1)^3", "estimator": "plugin"},
            "prdc": {
                "k_precision": PRECISION_K,
                "compare_precision": "<=",
                "k_density": DENSITY_K,
                "compare_density": "<",
                **neighbours,
            },
            "memory": {"neighbours": 1, "copy_quantile": COPY_QUANTILE},
            "class_accuracy": {"classifier": "judge, or linear_discriminant", "shrinkage": CLASSIFIER_SHRINKAGE},
        },
        "resolution": resolution,
        "evaluator_version": JUDGED_VERSION,
    }


def judge_entry(judge: JudgeIdentity) -> dict[str, Any]:
    """The part of a protocol that describes a judge."""
    extractor = judge.extractor
    entry = extractor_entry(
        extractor, extractor.sha256, extractor.comparable_with_inception_fid, extractor.resize_digest
    )
    return entry | {"ranks": judge.ranks, "labels_of": judge.labels_of}


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
    """The protocol that compares the images of a split with their reconstructions.

    extractor: the result of `extractor_entry`; data_digest: determines the images and their order; perceptual: id and
    digest of the network of the perceptual distance.
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
    """The part of a protocol that describes the evaluated images."""
    return {
        "n": num_images,
        "label_law": label_law,
        "label_order": label_order,
        "uint8_rule": uint8_rule,
        "precision": precision,
        "container": "memory",
    }


def kid_entry(num_reference: int, num_images: int) -> dict[str, Any]:
    """The part of a protocol that says how KID is estimated for sets of these sizes."""
    if max(num_reference, num_images) <= KID_COMPLETE_LIMIT:
        return {"estimator": "complete"}
    return {"estimator": "subsets", "subsets": KID_SUBSETS, "size": KID_SUBSET_SIZE, "seed": KID_SEED}


def decoding_entry(decoding: str | None) -> dict[str, str]:
    """The part of a protocol that describes image decoding. It is empty for images that are stored as arrays."""
    return {} if decoding is None else {"decoding": decoding}


def extractor_entry(
    extractor: Layer, sha256: str, comparable_with_inception_fid: bool = False, resize_digest: str | None = None
) -> dict[str, Any]:
    """The part of a protocol that describes the extractor.

    sha256: of the weights; resize_digest: of Pillow's scaling, for an extractor that uses it.
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
    """JSON with sorted keys, no spaces, UTF-8, and whole numbers as integers. Raises ValueError for NaN or infinity."""
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
    """The hash that identifies a protocol; every table shows it in its caption."""
    return digest(without_names(protocol))[:HASH_DIGITS]


def without_names(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol without the names that only help human readers.

    Version 1 hashed the names as well. Its records keep their hashes, so their protocols are returned unchanged.
    """
    if protocol["evaluator_version"] < 2:
        return dict(protocol)
    reference = {key: value for key, value in protocol["reference"].items() if key != "id"}
    return {key: value for key, value in protocol.items() if key != "name"} | {"reference": reference}


DISTANCE = ("fd", "cov_ddof", "dtype")
ESTIMATORS = {
    "kid_ratio": ("kid",), "memorisation": ("memory",), "copies": ("memory",),
    "is": ("is",), "kid": ("kid",), "mind": ("mind",), "precision": ("prdc",), "recall": ("prdc",),
    "density": ("prdc",), "coverage": ("prdc",),
    "class_accuracy": ("class_accuracy",), "class_accuracy_real": ("class_accuracy",),
    "psnr": ("psnr",), "ssim": ("ssim",), "lpips": ("perceptual",), "perceptual_embedded": ("perceptual",),
}  # fmt: skip


def metric_hash(protocol: Mapping[str, Any], metric: str) -> str:
    """The identity of one metric: the hash of the protocol without the settings of other estimators.

    Two values of KID are therefore comparable even if the protocols differ in the k of recall. The protocol's name
    is left out in every version, because it changes no number.
    """
    wanted = ESTIMATORS.get(metric, DISTANCE)
    estimator = {key: value for key, value in protocol["estimator"].items() if key in wanted}
    rest = {key: value for key, value in without_names(protocol).items() if key != "name"}
    return digest({"metric": metric, **rest, "estimator": estimator})[:HASH_DIGITS]


def protocol_name(protocol: Mapping[str, Any]) -> str:
    """A readable name such as `embedded-v1/emoji32-train/n=1000/balanced#3fa2c8d01b7e`.

    If the protocol has a name, that comes first.
    """
    samples = protocol["samples"]
    named = f"{protocol['name']}: " if "name" in protocol else ""
    measured = protocol["extractor"]["id"] if "extractor" in protocol else f"{len(protocol['judges'])} judges"
    compared = f"{measured}/{protocol['reference']['id']}"
    return f"{named}{compared}/n={samples['n']}/{samples['label_law']}#{protocol_hash(protocol)}"
