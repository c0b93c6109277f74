"""A run folder as launch/run.py leaves it, made in a moment: a tiny network that was never trained,
on a folder of small images.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixlat.common.config.identity import identity, to_yaml
from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import RunConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.weights import checkpoint
from pixlat.common.weights.checkpoint import Checkpoint
from pixlat.evaluation.features.extractor import Features
from pixlat.evaluation.records.record import build_record, write_record
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo

MODEL = {"depth": 1, "width": 16, "heads": 2, "patch": 4, "bottleneck": 8, "context_tokens": 0, "context_start": 0}


class Projections:
    """A stand-in for the extractor: 12 numbers of an image of 8 pixels, 5 of them as logits."""

    id, sha256, layer, resize, scaling, dims, num_classes = (
        "embedded-v1",
        "0" * 64,
        "projections",
        "none",
        "x/255",
        12,
        5,
    )
    comparable_with_inception_fid = False
    resize_digest = None

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.weights = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).normal(size=(192, 12))).float()

    def __call__(self, images):
        pooled = images.flatten(1).float() / 255 @ self.weights
        return Features(pooled, pooled[:, :5])


def image_folder(root: Path) -> Path:
    """3 classes of 24 images of 8 px; a fourth of them in val/."""
    rng = np.random.Generator(np.random.PCG64(0))
    for number in range(96):
        folder = root / ("val" if number % 4 == 0 else "train") / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        grey = 60 * (number % 3) + rng.integers(0, 80, (8, 8, 3))
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def run_folder(folder: Path, data: Path, seed: int = 0, record: bool = True) -> RunConfig:
    """config.yaml, one checkpoint with an average, and result.json."""
    settings = {
        "data.name": "folder",
        "data.path": str(data),
        "data.image_size": 8,
        "sample.steps": 2,
        "sample.guidance": 1.5,
        "seed": seed,
    }
    settings |= {f"model.{key}": value for key, value in MODEL.items()} | {
        "train.ema_decay": [0.9],
        "eval.num_images": 24,
    }
    run = resolve(get_spec("jit"), {key: str(value) for key, value in settings.items()})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(run))
    torch.manual_seed(seed)
    source = load_data(run.data)
    method = get_class(run.method)(run.model, DataInfo.of(source.info))
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.1)
    weights = {name: p.detach() for name, p in method.state_dict().items()}
    average = {name: 0.5 * p.detach() for name, p in method.named_parameters() if p.requires_grad}
    checkpoint.save(
        folder / "checkpoints",
        7,
        Checkpoint({"model": weights, "ema-0.9": average}, {"step": 7, "identity": identity(run)}),
        keep=1,
    )
    if record:
        write_record(build_record(_fields(folder.name, source.info)), folder / "result.json")
    return run


def _fields(name: str, info: object) -> dict:
    """A record whose numbers nobody looks at but those that an evaluation must keep."""
    return {
        "name": name,
        "system": {
            "method": "jit", "variant": None, "size": None, "space": "pixel", "prediction": "x",
            "loss_space": "v", "sampler": "heun",
        },
        "data": {
            "name": info.name, "revision": info.digest, "resolution": 8,
            "num_classes": 3, "train_images": info.num_train,
        },
        "checkpoint": {"sha256": None, "step": 7, "ema_decay": 0.9, "ema_kind": "0.9"},
        "code": {"git_sha": "abc", "dirty": False, "package_versions": {}},
        "seeds": {"train": 0, "sample": [0]},
        "train": {
            "epochs": 1.0, "images_seen": 448, "batch": 64, "precision": "float32",
            "optimizer": "AdamW", "macs_total": 12345,
            "device_seconds": 1.0, "device": "cpu", "images_per_s": 448.0,
        },
        "pretrained_components": [],
        "sampling": {
            "steps": 9, "nfe_evals": 9, "net_forwards": 9, "guidance": "none", "guidance_scale": None,
            "interval": None, "dtype": "float32",
        },
        "params": {"gen_trainable": 1, "gen_total": 1, "decoder": 0, "aux_train_only": 0},
        "compute": {
            "macs_per_forward": 1, "macs_decoder": 0, "macs_per_image": 1, "attention_counted": True, "counter": "",
        },
        "speed": {
            "images_per_s": None, "latency_s_b1": None, "batch": 50, "dtype": "float32",
            "device": "cpu", "compiled": False,
        },
        "memory": {"peak_bytes_sample": None, "peak_bytes_train": None, "kind": "ru_maxrss"},
        "protocol": None,
        "selection": {"n_configs": 1, "n_samples": 0, "swept": []},
        "metrics": {},
        "artifacts": {},
        "notes": "",
    }  # fmt: skip
