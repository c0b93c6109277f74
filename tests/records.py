"""Valid records to vary in tests of records, tables and the page."""

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

from pixlat.evaluation.protocols.identity import (
    CLASSIFIER_SHRINKAGE,
    DENSITY_K,
    FRECHET_ENTRY,
    IS_SHUFFLE_SEED,
    IS_SPLITS,
    MAX_NEIGHBOURS,
    PRECISION_K,
    decoding_entry,
    extractor_entry,
    kid_entry,
    samples_entry,
)
from pixlat.evaluation.records.record import build_record

EXTRACTOR = SimpleNamespace(
    id="embedded-v1", sha256="ab" * 32, layer="pooled", resize="128", scaling="(x-127)/128", dims=320
)


def embedded_protocol(
    extractor: Any,
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
    """The protocol embedded-v1 of older records: images of balanced labels against a data set's training split.

    Every class of the training split has the same weight.

    data: name of the data set; train_digest and heldout_digest: they determine images, labels and order of the two
        splits; the floor uses the held-out split;
    num_reference: number of training images; resolution: pixels; num_images: number of generated images;
    precision: of sampling (float32, tf32, bfloat16 or unknown); decoding: `ImageSet.decoding` of the real images.
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
        "evaluator_version": 2,
    }


def protocol(num_images=1000):
    return embedded_protocol(EXTRACTOR, "toy", "train-digest", "heldout-digest", 4599, 32, num_images)


def metric(value, **more):
    return {"value": value, "value_bc": None, "se": None, "n": 1000, "unit": "1", **more}


def judges_protocol(num_images=1000):
    """The protocol of several judges (evaluator 3), which names no single extractor."""
    single = protocol(num_images)
    extractor = single.pop("extractor")
    judges = [{**extractor, "ranks": True, "labels_of": "toy-digest"}]
    judges += [{**extractor, "id": "other-v1", "sha256": "ef" * 32, "ranks": False, "labels_of": None}]
    samples = {**single["samples"], "label_law": "heldout", "label_order": "stratified"}
    return {**single, "name": "embedded-v2", "judges": judges, "samples": samples, "evaluator_version": 3}


def judged_fields(**changes):
    """What a record of several judges has beside `fields`."""
    names = ("fd_ratio", "fd_ratio_train", "fd_ratio_heldout", "kid_ratio", "memorisation", "copies")
    means = {name: metric(2.5, se=0.2, se_real=0.1, left_out=[2.4] * 20) for name in names}
    own = means | {name: metric(7.0) for name in ("fd", "fd_heldout", "kid", "kid_heldout")}
    entries = judges_protocol()["judges"]
    each = [{**{key: entry[key] for key in ("id", "sha256", "ranks")}, "metrics": own} for entry in entries]
    return {
        "protocol": judges_protocol(), "metrics": means, "judged_by": ["embedded-v1"], "judges": each,
        "real": {"metrics": means, "judges": each},
        "contact": [
            {"judge": "other-v1", "role": "teacher", "component": "net", "used_at": "train", "via": None},
            {"judge": "other-v1", "role": "loss", "component": "net", "used_at": "train", "via": "autoencoder"},
        ],
        "config": {
            "digest": "0123456789ab", "preset": "demo",
            "settings": {"model.prediction": "v", "train.lr": 1e-4, "sample.interval": [0.1, 1.0], "eval.ema": None},
        },
        "selection": {"n_configs": 10, "n_samples": 500, "swept": [], "about": "ten, by hand"},
        **changes,
    }  # fmt: skip


JUDGES = ("plain", "residual", "vit")  # they rank
RATIOS = ("fd_ratio", "fd_ratio_train", "fd_ratio_heldout", "kid_ratio")


def panel_protocol(num_images=1000):
    """The protocol of three ranking judges and one that is shown only."""
    several = judges_protocol(num_images)
    ranking, shown = several["judges"]
    ranked = [{**ranking, "id": name, "sha256": sha256(name.encode()).hexdigest()} for name in JUDGES]
    return {**several, "judges": [*ranked, {**shown, "id": "embedded-v1", "sha256": EXTRACTOR.sha256}]}


def jackknifed(value, noise, size=0.02, **more):
    """A metric whose jackknife values are its value plus the noise (20,) times `size`; runs share the noise."""
    left_out = [value + size * each for each in noise]
    mean = sum(left_out) / len(left_out)
    own = (sum((each - mean) ** 2 for each in left_out) * 19 / 20) ** 0.5
    return metric(value, se=(own**2 + 0.03**2) ** 0.5, se_real=0.03, left_out=left_out, **more)


def judged(name, ratio, seed=0, settings=None, method="jit", own=(0.0, 0.1, -0.1, 2.0), copies=0.06, **changes):
    """A record of embedded-v2 whose judges say ratio + own[i]; `settings` and method decide its configuration."""
    noise = [((7 * i + seed) % 20 - 9.5) / 10 for i in range(20)]
    settings = settings or {}
    digest = sha256(f"{method} {sorted(settings.items())}".encode()).hexdigest()[:12]

    def metrics(value, share=copies):
        values = {key: jackknifed(value, noise) for key in RATIOS}
        values["memorisation"] = metric(1.2 - share, se=0.01)
        values["copies"] = metric(share, se=0.01)
        return values | {key: metric(0.5) for key in ("is", "precision", "recall", "density", "coverage")}

    def judges(value, share=copies, shifts=own):
        entries = zip(panel_protocol()["judges"], shifts, strict=True)
        kept = ("id", "sha256", "ranks")
        return [{**{key: e[key] for key in kept}, "metrics": metrics(value + shift, share)} for e, shift in entries]

    base = fields(name, 1.0)
    return record(name, **{
        "system": {**base["system"], "method": method}, "protocol": panel_protocol(), "metrics": metrics(ratio),
        "seeds": {"train": seed, "sample": [0]}, "judged_by": list(JUDGES), "judges": judges(ratio), "contact": [],
        "real": {"metrics": metrics(1.0, 0.05), "judges": judges(1.0, 0.05, (0.0,) * 4)},
        "config": {"digest": digest, "preset": "demo", "settings": settings}, **changes,
    })  # fmt: skip


def met(judge, role, via=None):
    """One contact of a row with a judge."""
    return {"judge": judge, "role": role, "component": "net", "used_at": "train", "via": via}


def parent_stage(key, name, method):
    """An earlier run that a record is built on, as its `parents` hold it, but for its cost."""
    return {
        "key": key, "name": name, "method": method, "row_id": None, "checkpoint_sha256": None, "images_seen": 5,
        "device_seconds": 1.0,
    }  # fmt: skip


def fields(name="run", fd=100.0, guidance="none", num_images=1000, **changes):
    """All that a run hands over for its record."""
    return {
        "name": name,
        "created_utc": "2026-11-22T00:00:00+00:00",
        "system": {
            "method": "jit", "variant": None, "size": "demo", "space": "pixel", "prediction": "x",
            "loss_space": "v", "sampler": "heun",
        },
        "data": {"name": "toy", "revision": "d", "resolution": 32, "num_classes": 10, "train_images": 4599},
        "checkpoint": {
            "sha256": sha256(name.encode()).hexdigest(), "step": 1000, "ema_decay": 0.999, "ema_kind": "0.999",
        },
        "code": {"git_sha": "1234567", "dirty": True, "package_versions": {"torch": "2.14.1", "ruamel.yaml": "0.18"}},
        "seeds": {"train": 3, "sample": [0]},
        "train": {
            "epochs": 1.5, "images_seen": 6900, "batch": 64, "precision": "float32",
            "optimizer": "AdamW", "macs_total": 2 * 10**18,
            "device_seconds": 12.25, "device": "cpu", "images_per_s": 563.2,
        },
        "pretrained_components": [
            {"name": "teacher", "role": "loss", "params": 5, "sha256": "0f" * 32, "used_at": "train"},
        ],
        "sampling": {
            "steps": 50, "nfe_evals": 99, "net_forwards": 187, "guidance": guidance, "guidance_scale": 2.9,
            "interval": [0.1, 1.0], "dtype": "f32",
        },
        "params": {"gen_trainable": 1_900_000, "gen_total": 1_950_000, "decoder": 0, "aux_train_only": 0},
        "compute": {
            "macs_per_forward": 10**9, "macs_decoder": 0, "macs_per_image": 187 * 10**9,
            "attention_counted": True, "counter": "meta",
        },
        "speed": {
            "images_per_s": 20.5, "latency_s_b1": None, "batch": 50, "dtype": "float32",
            "device": "cpu", "compiled": False,
        },
        "memory": {"peak_bytes_sample": 1, "peak_bytes_train": 2, "kind": "ru_maxrss"},
        "protocol": protocol(num_images),
        "selection": {"n_configs": 1, "n_samples": 0, "swept": []},
        "metrics": {
            "fd_embedded": metric(fd, value_bc=fd - 40, se=2.5, regularised=False),
            "fd_floor": metric(200.0, value_bc=100.0, se=5.0, n=500, regularised=False),
            "kid": metric(0.012), "is": metric(14.25), "precision": metric(0.5),
            "recall": metric(0.25), "density": metric(0.75),
            "coverage": metric(0.125), "class_accuracy": metric(0.625), "class_accuracy_real": metric(0.738),
        },
        "artifacts": {"grid_png": "samples.png", "log": None},
        "notes": "",
        **changes,
    }  # fmt: skip


def record(*args, **kwargs):
    return build_record(fields(*args, **kwargs))
