"""The identity of a measurement: everything that moves a number, as one JSON object, and its hash. Numbers with different hashes share no table.

In the hash: extractor (weights digest, resize, scaling), reference (digest of the data, split, class weights), how images are drawn and made
uint8, estimators and their seeds, the version of this evaluator. Not in the hash:
- versions of PyTorch and of the machine: they move a score by about 1e-6 of it; a golden test keeps it so;
- Pillow: the embedded data are stored losslessly and generated images never pass through a file, so it moves nothing. A protocol whose
  reference is cropped or decoded by Pillow must name the version (13.0 resizes tall images differently).

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

EVALUATOR_VERSION = 1  # raise on any change that moves a number; tests/test_evaluate.py has the golden value
HASH_DIGITS = 12

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


class ExtractorIdentity(Protocol):
    """The part of evaluation.features.Extractor that is needed here, where torch is not imported."""

    @property
    def id(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def resize(self) -> str: ...
    @property
    def scaling(self) -> str: ...
    @property
    def dims(self) -> int: ...


def embedded_protocol(
    extractor: ExtractorIdentity, data: str, train_digest: str, heldout_digest: str | None, num_reference: int, resolution: int, num_images: int
) -> dict[str, Any]:
    """The embedded protocol: balanced labels against the training split of a data set, every class of it weighted alike.

    data: name of the data set; the digests determine images, labels and order of its splits, the held-out one being that of the floor;
    num_reference: training images; resolution: pixels; num_images: generated images.
    """
    neighbours = {"n_ref": min(num_reference, MAX_NEIGHBOURS), "n_gen": min(num_images, MAX_NEIGHBOURS)}
    complete = max(neighbours["n_ref"], num_images) <= KID_COMPLETE_LIMIT
    kid = {"estimator": "complete"} if complete else {"estimator": "subsets", "subsets": KID_SUBSETS, "size": KID_SUBSET_SIZE, "seed": KID_SEED}
    return {
        "extractor": {
            "id": extractor.id,
            "sha256": extractor.sha256,
            "layer": extractor.layer,
            "resize": extractor.resize,
            "scaling": extractor.scaling,
            "dims": extractor.dims,
            "dtype": "float32",
            "tf32": False,
            "comparable_with_inception_fid": False,
        },
        "reference": {
            "id": f"{data}-train",
            "digest": train_digest,
            "heldout_digest": heldout_digest,
            "split": "train",
            "n_images": num_reference,
            "weighting": "class_balanced",
        },
        "samples": {"n": num_images, "label_law": "balanced", "label_order": "shuffled", "uint8_rule": "round_half_even", "container": "memory"},
        "estimator": {
            "fd": "plugin",
            "cov_ddof": 1,
            "dtype": "float64",
            "jackknife_groups": JACKKNIFE_GROUPS,
            "is": {"splits": IS_SPLITS, "shuffle_seed": IS_SHUFFLE_SEED, "bias": True},
            "kid": {"kernel": "(x.y/D+1)^3", **kid},
            "prdc": {"k_precision": PRECISION_K, "compare_precision": "<=", "k_density": DENSITY_K, "compare_density": "<", **neighbours},
            "class_accuracy": {"classifier": "linear_discriminant", "shrinkage": CLASSIFIER_SHRINKAGE},
        },
        "resolution": resolution,
        "evaluator_version": EVALUATOR_VERSION,
    }


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, UTF-8, whole numbers as integers; NaN and infinity are refused with ValueError."""
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
    return digest(protocol)[:HASH_DIGITS]


def protocol_name(protocol: Mapping[str, Any]) -> str:
    """For people, e.g. `embedded-v1/emoji32-train/n=1000/balanced#3fa2c8d01b7e`."""
    samples = protocol["samples"]
    return f"{protocol['extractor']['id']}/{protocol['reference']['id']}/n={samples['n']}/{samples['label_law']}#{protocol_hash(protocol)}"
