"""Stored latents: in memory, in our shards, in the released layout; training from them is training from the images."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from reg_models import make
from toys import toy_images

from pixlat.common.accounting.macs import activation_bytes, training_cost
from pixlat.common.accounting.memory import step_memory
from pixlat.common.config.identity import run_folder
from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.batches import TrainingPlan, training_batches
from pixlat.common.datasets.load import load_data
from pixlat.common.datasets.stored_latents import CARD, LatentShards, open_latents, read_latent_card
from pixlat.common.errors import UserError
from pixlat.common.files import read_rows
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.frozen.store_latents import check_encoder, encoder_digest, write_latents
from pixlat.common.frozen.tokenizer import OwnTokenizer, sd_name
from pixlat.common.images.image_set import ArrayImages, LatentFacts, SyntheticImages
from pixlat.common.layers.autoencoder import Encoder
from pixlat.common.seeds import seed_step
from pixlat.common.training.data_passes import prepare_batch
from pixlat.evaluation.bench.steps import measure
from pixlat.evaluation.records.record import read_record
from pixlat.launch.job.execute import run_one
from pixlat.launch.prepare import main as prepare
from pixlat.methods import get_class, get_spec
from pixlat.methods.base import DataInfo

SHAPE = {"widths": [8], "stem": 2, "depth": 1, "latent_channels": 4}


def tokenizer(seed: int = 0) -> OwnTokenizer:
    """A small autoencoder with random weights, latents doubled and shifted by 0.25."""
    built = OwnTokenizer("toy", SHAPE)
    torch.manual_seed(seed)
    encoder = Encoder(**SHAPE)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {key: torch.randn(value.shape) for key, value in built.state_dict().items() if key.startswith("decoder.")}
    built.fill(state, "toy", torch.full((4,), 0.25), torch.full((4,), 2.0))
    return built


@pytest.fixture
def shards(tmp_path):
    return tmp_path, write_latents(tmp_path, toy_images(), tokenizer(), batch=7, shard_images=16)


# -- in memory ---------------------------------------------------------------------------------------------------------


def counting_table(num_images=0):
    calls = []

    def compute(images):
        calls.append(len(images))
        return images.mean(dim=(1, 2, 3)), 2 * images

    return FeatureTable(compute, num_images), calls


def test_each_image_is_computed_once():
    table, calls = counting_table(5)
    images = torch.randn(5, 3, 4, 4)
    for chosen in ([0, 1], [1, 2], [4, 3, 0], [2, 2]):
        mean, double = table({"image": images[chosen], "index": torch.tensor(chosen)})
        assert torch.equal(double, 2 * images[chosen])
        torch.testing.assert_close(mean, images[chosen].mean(dim=(1, 2, 3)))
    assert calls == [1] * 5 and not table.missing.any()


def test_rows_have_one_precision_whenever_they_are_filled():
    """`before_training` fills rows outside of autocast, and a resumed run fills the same ones within it."""
    torch.manual_seed(0)
    network = torch.nn.Linear(48, 5)
    images = torch.randn(4, 3, 4, 4)
    tables = [FeatureTable(lambda images: (network(images.flatten(1)),), 4) for _ in range(2)]
    batch = {"image": images, "index": torch.arange(4)}
    first = {name: value[:2] for name, value in batch.items()}
    tables[0](first)
    with torch.autocast("cpu", torch.bfloat16):
        found = [table(batch)[0] for table in tables]
        # not remembered: as the training is
        assert FeatureTable(lambda images: (network(images.flatten(1)),))(batch)[0].dtype == torch.bfloat16
    assert found[0].dtype == torch.float32 and torch.equal(*found)
    assert torch.equal(found[0], torch.cat([network(image.flatten()[None]) for image in images]))


def test_without_memory_every_batch_is_computed():
    table, calls = counting_table()
    for _ in range(2):
        table({"image": torch.randn(3, 3, 4, 4), "index": torch.arange(3)})
    assert calls == [3, 3]


def test_mirror_images_are_other_images():
    table, calls = counting_table(3)
    image = torch.randn(1, 3, 4, 4)
    for mirrored, pixels in ((False, image), (True, image.flip(3)), (False, image), (True, image.flip(3))):
        _, double = table({"image": pixels, "index": torch.tensor([1]), "mirrored": torch.tensor([mirrored])})
        assert torch.equal(double, 2 * pixels)
    assert sum(calls) == 2


def test_a_table_beyond_memory_is_refused():
    table = FeatureTable(lambda images: (torch.zeros(len(images), 1024, 1024),), 1_281_167)
    with pytest.raises(UserError, match=r"model.remember=true would keep 5004\.6 GiB"):
        table({"image": torch.zeros(1, 3, 4, 4), "index": torch.tensor([0])})


# -- our shards --------------------------------------------------------------------------------------------------------


def test_shards_hold_the_moments_of_both_orientations(shards):
    folder, card = shards
    images, net = toy_images(), tokenizer()
    assert len(card.shards) == 3 and card.shape == (8, 4, 4) and card.images == 40
    latents = open_latents(folder, images)
    indices, flips = np.array([39, 0, 17, 16]), np.array([True, False, True, False])
    expected = torch.cat(net.encode_moments(torch.from_numpy(images.fetch(indices, flips)).float() / 127.5 - 1), dim=1)
    torch.testing.assert_close(torch.from_numpy(latents.moments(indices, flips)), expected, atol=1e-5, rtol=1e-5)
    latents.verify()


def test_half_precision(tmp_path, shards):
    write_latents(tmp_path / "half", toy_images(), tokenizer(), dtype="float16")
    indices, flips = np.arange(40), np.zeros(40, dtype=bool)
    half, full = (
        open_latents(folder, toy_images()).moments(indices, flips) for folder in (tmp_path / "half", shards[0])
    )
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, rtol=2**-10, atol=1e-6)


def test_writing_goes_on_and_is_repeatable(tmp_path, shards):
    folder, card = shards
    (folder / CARD).unlink()
    removed = next(iter(card.shards))
    (folder / removed).unlink()
    kept = {name: (folder / name).stat().st_mtime_ns for name in card.shards if name != removed}
    again = write_latents(folder, toy_images(), tokenizer(), batch=7, shard_images=16)
    assert again == card and all((folder / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_an_unfinished_folder_is_refused(shards):
    folder, _ = shards
    (folder / CARD).unlink()
    with pytest.raises(UserError, match="let it finish"):
        open_latents(folder, toy_images())


def test_latents_of_other_images_are_refused(shards):
    folder, _ = shards
    other = ArrayImages(255 - toy_images().images, toy_images().labels, "other")
    with pytest.raises(UserError, match="other images"):
        open_latents(folder, other)
    with pytest.raises(UserError, match="Choose another folder"):
        write_latents(folder, other, tokenizer())


def test_another_encoder_is_refused(shards):
    latents = LatentShards(shards[0])
    check_encoder(latents.facts.encoder_sha256, tokenizer())
    with pytest.raises(UserError, match="another encoder"):
        check_encoder(latents.facts.encoder_sha256, tokenizer(seed=1))
    with pytest.raises(UserError, match="another encoder"):
        write_latents(shards[0], toy_images(), tokenizer(seed=1))


def test_the_decoder_is_no_part_of_the_digest():
    a, b = tokenizer(), tokenizer()
    with torch.no_grad():
        next(b.decoder.parameters()).add_(1)
    assert encoder_digest(a) == encoder_digest(b)


def test_damage_is_found(shards):
    folder, card = shards
    file = folder / list(card.shards)[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=r"moments-00001\.npy is damaged: its SHA-256"):
        LatentShards(folder).verify()


def test_another_format_is_refused(shards):
    folder, _ = shards
    content = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_latent_card(folder)


# -- the released layout -----------------------------------------------------------------------------------------------


def write_released(folder, moments, labels):
    """One .npy an image under numbered sub-folders, and dataset.json in another order."""
    entries = []
    for i, label in enumerate(labels.tolist()):
        name = f"{i // 20:05d}/img-mean-std-{i:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, moments[i])
        entries.append([name, label])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries[::-1]}))


@pytest.fixture
def released(tmp_path):
    images = toy_images()
    write_released(
        tmp_path,
        np.arange(40, dtype=np.float32)[:, None, None, None] + np.zeros((8, 4, 4), dtype=np.float32),
        images.labels,
    )
    return tmp_path


def test_released_layout_reads_in_sorted_order(released):
    latents = open_latents(released, toy_images())
    found = latents.moments(np.array([3, 39, 0]), np.zeros(3, dtype=bool))
    assert found.shape == (3, 8, 4, 4) and found[:, 0, 0, 0].tolist() == [3, 39, 0]
    check_encoder(latents.facts.encoder_sha256, tokenizer())


def test_released_layout_has_no_mirror_images(released):
    with pytest.raises(UserError, match="no mirror images"):
        open_latents(released, toy_images(), mirrored=True)


def test_released_layout_must_fit_the_images(released):
    content = json.loads((released / "dataset.json").read_text())
    (released / "dataset.json").write_text(json.dumps({"labels": content["labels"][1:]}))
    with pytest.raises(UserError, match="lists 39 latents"):
        open_latents(released, toy_images())
    (released / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        open_latents(released, toy_images())


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_changed_byte_of_stored_latents_is_found_when_they_are_opened(shards):
    folder, card = shards
    open_latents(folder, toy_images())
    file = folder / list(card.shards)[2]
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=rf"{file.name} is damaged: its SHA-256"):
        open_latents(folder, toy_images())
    assert open_latents(folder, toy_images(), verify=False).facts.shape == (8, 4, 4)  # a plan reads no shard


ODD_VALUES = [None, -1, 0, 10**15, 2**70, 1.5, True, "x", [], {}, [[]], {"a": 1}, [8, 4, 5], [8, 4, 2**30], 39, 41]


def test_a_damaged_card_of_latents_is_a_sentence(shards):
    """Every field in turn is missing or holds something else; what the numbers depend on is never accepted changed."""
    folder, _ = shards
    whole = json.loads((folder / CARD).read_text())
    for key in whole:
        for value in [*ODD_VALUES, ...]:
            changed = {
                name: value if name == key else old for name, old in whole.items() if name != key or value is not ...
            }
            (folder / CARD).write_text(json.dumps(changed))
            try:
                open_latents(folder, toy_images())
            except UserError as error:
                assert CARD in str(error) or "moments-" in str(error) or key == "data_digest", str(error)
            else:
                assert key in ("tokenizer", "encoder_sha256") and value == "x", (key, value)
    for text in ("", "[]", "null", "[" * 100_000):
        (folder / CARD).write_text(text)
        with pytest.raises(UserError, match=r"latents\.json"):
            open_latents(folder, toy_images())


def test_a_damaged_header_of_latents_is_a_sentence(shards):
    folder, card = shards
    file = folder / next(iter(card.shards))
    whole, refused = file.read_bytes(), 0
    for place in range(0, 128, 3):
        file.write_bytes(whole[:place] + b"7" + whole[place + 1 :])
        try:
            open_latents(folder, toy_images(), verify=False)
        except UserError as error:
            assert file.name in str(error)
            refused += 1
    assert refused > 10
    for length in (0, 5, 60, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=file.name):
            open_latents(folder, toy_images(), verify=False)


def test_an_orientation_of_an_image_is_one_request(shards, monkeypatch):
    latents = open_latents(shards[0], toy_images())
    requests, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: requests.append(size) or pread(file, size, offset))
    latents.moments(np.array([3, 39]), np.array([True, False]))
    assert requests == [4 * 8 * 4 * 4] * 2


@pytest.mark.parametrize("labels", [[], [["0.npy", 10**400]], [["0.npy", 1e400]], [["0.npy"]], 5])
def test_a_damaged_list_of_released_latents_is_a_sentence(released, labels):
    (released / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_latents(released, toy_images())


def test_a_released_latent_of_another_shape_is_named(released):
    latents = open_latents(released, toy_images())
    assert latents.facts.shape == (8, 4, 4)
    np.save(released / latents.files[3], np.zeros((8, 4, 5), np.float32))
    with pytest.raises(UserError, match=r"holds \(8, 4, 5\) numbers"):
        latents.moments(np.array([3]), np.array([False]))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_training_from_the_cache_is_training_from_the_images(shards, monkeypatch, flip):
    """With the same seed the losses agree to float32's rounding:
    the posterior is drawn anew from the stored moments.
    """
    cached, plain = toy_images(), toy_images()
    cached.latents = open_latents(shards[0], cached)
    plan = TrainingPlan(plain.labels, 8, seed=0, balanced=False, flip=flip)
    method = make("sit", monkeypatch)
    method.tokenizer = net = tokenizer()
    method.moments_of = FeatureTable(net.encode_moments)
    for step, (stored, encoded) in enumerate(
        zip(*(training_batches(s, plan, 0, 8, 1) for s in (cached, plain)), strict=False)
    ):
        assert "moments" in stored[0] and "moments" not in encoded[0] and ("mirrored" in stored[0]) == flip
        drawn = []
        for batch in (stored[0], encoded[0]):
            seed_step(0, step, 0)
            drawn.append(method.latents(prepare_batch(batch, torch.device("cpu"))))
        torch.testing.assert_close(drawn[0], drawn[1], atol=1e-5, rtol=1e-5)
        if step == 3:
            break


def test_two_reads_draw_twice(shards, monkeypatch):
    method = make("sit", monkeypatch)
    moments = torch.from_numpy(open_latents(shards[0], toy_images()).moments(np.arange(4), np.zeros(4, dtype=bool)))
    a, b = (method.latents({"moments": moments}) for _ in range(2))
    assert not torch.equal(a, b)


# -- the command -------------------------------------------------------------------------------------------------------


def test_prepare_command(tmp_path, capsys):
    arguments = ["latents", "method=sit", "data=synthetic", f"to={tmp_path / 'cache'}", "device=cpu", "dtype=float16"]
    assert prepare([*arguments, "data.image_size=8"]) == 0
    assert "4600 images" in capsys.readouterr().out and read_latent_card(tmp_path / "cache").dtype == "float16"


RUN = {
    "data.name": "synthetic", "data.image_size": "16", "data.flip": "true",
    "model.depth": "1", "model.width": "24", "model.heads": "2", "model.remember": "false",
    "train.images": "64", "train.batch": "16", "train.warmup_images": "0",
    "train.log_images": "16", "train.preview_images": "0",
    "sample.steps": "2", "eval.num_images": "0", "eval.grid_columns": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The latents of the synthetic images at 16 px."""
    folder = tmp_path_factory.mktemp("latents") / "cache"
    assert prepare(["latents", "method=sit", "data=synthetic", "data.image_size=16", f"to={folder}", "device=cpu"]) == 0
    return folder


def test_speed_is_that_of_stored_latents(cache):
    """A timed step takes moments, as a training does, and does not run the encoder."""
    images, stored = (
        measure(resolve(get_spec("sit"), RUN | more), batch=2, steps=1, sample=False)
        for more in ({}, {"data.latents": str(cache)})
    )
    assert stored["train"]["images_per_s"] > 0
    assert stored["train"]["macs_per_image"] < images["train"]["macs_per_image"]


def start(tmp_path, method="sit", **changes):
    """Trains, and returns the folder of the run."""
    run = resolve(get_spec(method), {**RUN, "out": str(tmp_path / "runs"), **changes})
    run_one(run)
    return run_folder(run)


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


def test_a_run_reads_the_cache_or_the_released_layout_in_the_place_of_the_images(tmp_path, cache):
    """The losses are the same to float32's rounding, and not those of another seed;
    the encoder is not in the cost of a run that reads.
    """
    released = tmp_path / "vae-sd"
    latents, labels = LatentShards(cache), load_data(DataConfig(name="synthetic")).train.labels
    write_released(released, latents.moments(np.arange(4600), np.zeros(4600, dtype=bool)), labels)
    plain = start(tmp_path)
    cached = start(tmp_path, **{"data.latents": str(cache)})
    assert (
        losses(cached)
        == pytest.approx(losses(plain), rel=1e-5)
        != pytest.approx(losses(start(tmp_path, seed="1")), rel=1e-2)
    )
    costs = [read_record(folder / "result.json")["train"]["macs_total"] for folder in (plain, cached)]
    assert costs[1] < costs[0]
    unmirrored = {"data.flip": "false"}
    read = start(tmp_path, **unmirrored, **{"data.latents": str(released)})
    assert losses(read) == pytest.approx(losses(start(tmp_path, **unmirrored)), rel=1e-5)


@pytest.mark.parametrize("method", ["sit", "dit"])
def test_stored_latents_train_without_decoding_images(tmp_path, cache, method, monkeypatch):
    """No training image is read, and every loss is bit for bit that of batches that bring the images as well."""
    read = []
    fetch = SyntheticImages.fetch

    def counted(images, indices, *more):
        read.extend([len(indices)] if len(more) == 2 else [])  # as the loader asks: with flips and offsets
        return fetch(images, indices, *more)

    monkeypatch.setattr(SyntheticImages, "fetch", counted)
    without = start(tmp_path / "without", method, **{"data.latents": str(cache)})
    assert read == []
    monkeypatch.setattr(get_class(method), "needs_images", classmethod(lambda cls, data: True))
    with_images = start(tmp_path / "with", method, **{"data.latents": str(cache)})
    assert read == [16] * 4 and losses(without) == losses(with_images)


@pytest.mark.parametrize(
    ("method", "needed"), [("sit", False), ("dit", False), ("repa", True), ("reg", True), ("jit", True)]
)
def test_who_needs_images_beside_stored_latents(method, needed):
    stored = DataInfo("toy", 10, 16, 40, latents=LatentFacts((8, 4, 4), None))
    assert get_class(method).needs_images(stored) == needed and get_class(method).needs_images(
        replace(stored, latents=None)
    )


def test_cost_and_memory_of_a_training_without_images():
    run = resolve(get_spec("sit"), RUN | {"model.remember": "true"})
    stored = DataInfo("synthetic", 10, 16, 4600, latents=LatentFacts((16, 4, 4), None))
    images = replace(stored, latents=None)
    with_remembering, reading = (training_cost(get_class("sit"), run.model, data) for data in (images, stored))
    assert with_remembering.encoding > 0 == reading.encoding and reading.per_image == with_remembering.per_image
    assert step_memory(get_class("sit"), run.model, run.train, stored, 4).peak > 0
    assert activation_bytes(get_class("sit"), run.model, stored, 4) > 0


def test_latents_that_do_not_fit_are_refused(tmp_path, cache):
    for method, changes, message in (
        ("sit", {"data.image_size": "32"}, "4600 other images"),
        ("jit", {}, "method=jit does not read data.latents"),
        ("sit", {"model.tokenizer": "sd-ft-ema"}, r"\(16, 4, 4\): do not fit model.tokenizer=sd-ft-ema"),
    ):
        run = {
            "data.name": "synthetic",
            "data.image_size": "16",
            "out": str(tmp_path / "runs"),
            "data.latents": str(cache),
            **changes,
        }
        with pytest.raises(UserError, match=message):
            run_one(resolve(get_spec(method), run))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latent", "to=x"], "Did you mean 'latents'"),
        (["latents", "method=sit"], "to= is missing"),
        (["latents", "method=jit", "to=x"], "no tokenizer"),
        (["latents", "method=sit", "to=x,y"], "one value each"),
        (["tokenizer", "to=x"], "from= is missing"),
        (["tokenizer", "to=x", "from=nowhere", "size=3"], "unknown key 'size'"),
        (["tokenizer", "to=x", "from=nowhere"], "not a run folder"),
    ],
)
def test_mistakes_of_the_command(arguments, message, capsys):
    assert prepare(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.mid_block.attentions.0.query.weight", "encoder.network.0.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid_block.attentions.0.proj_attn.bias", "decoder.1.mid_block.attentions.0.to_out.0.bias"),
        ("encoder.mid_block.attentions.0.to_v.bias", "encoder.network.0.mid_block.attentions.0.to_v.bias"),
        ("quant_conv.weight", "encoder.network.1.weight"),
        ("post_quant_conv.bias", "decoder.0.bias"),
    ],
)
def test_names_of_stable_diffusions_autoencoder(theirs, ours):
    assert sd_name(theirs) == ours
