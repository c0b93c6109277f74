"""The road from a method to its metrics: generation, several processes, the cached reference, the golden numbers."""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from pixlat.common.datasets.load import DataSource
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.seeds import Noise, image_seeds
from pixlat.evaluation.board.notes import floor_at
from pixlat.evaluation.features.collect import batches, collect
from pixlat.evaluation.features.extractor import EmbeddedExtractor, Features
from pixlat.evaluation.features.feature_sets import class_weights, feature_set
from pixlat.evaluation.features.moments import Moments
from pixlat.evaluation.judges.panel import Judge
from pixlat.evaluation.metrics.class_accuracy import fit_discriminant
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.protocols.identity import EVALUATOR_VERSION, JUDGED_VERSION, protocol_name
from pixlat.evaluation.score import generate as generation
from pixlat.evaluation.score.embedded import Clock, Evaluation, evaluate_method, judge
from pixlat.evaluation.score.generate import Drawing, balanced_labels, generate, quantise
from pixlat.evaluation.score.headline import MEANS, OWN_UNITS
from pixlat.evaluation.score.judged import Reals
from pixlat.evaluation.score.outcome import speed_fields
from pixlat.methods.base import Method


class NoisyLabels(Method):
    """Images of one grey a class, with noise. Uses dropout, so that forgetting evaluation mode shows."""

    def __init__(self):
        super().__init__(None, None)
        self.dropout = torch.nn.Dropout(0.5)

    def sample(self, labels, noise, config):
        assert not torch.is_grad_enabled()
        return self.dropout(labels[:, None, None, None] / 5 - 1 + config * noise.normal(3, 8, 8))


class LinearExtractor:
    """A cheap stand-in: 12 random projections of 8x8 images, 5 of them as logits."""

    id, sha256, layer, resize, scaling, dims, num_classes = "linear", "0" * 64, "projections", "none", "x/255", 12, 5
    resize_digest, comparable_with_inception_fid = None, False
    device = torch.device("cpu")

    def __init__(self):
        self.weights = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).normal(size=(192, 12))).float()
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        pooled = images.flatten(1).float() / 255 @ self.weights
        return Features(pooled, pooled[:, :5])


def noise_images(n, seed, size=8):
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def all_images(stream, n):
    images = np.full((n, 3, 8, 8), 77, dtype=np.uint8)
    for batch, indices in stream:
        images[indices] = batch.numpy()
    return images


# -- generation --------------------------------------------------------------------------------------------------------


def test_labels_are_balanced_and_shuffled():
    labels = balanced_labels(1000, 10, seed=0)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [100] * 10
    assert len(np.unique(labels[:20])) > 5
    assert np.array_equal(labels, balanced_labels(1000, 10, seed=0))
    assert not np.array_equal(labels, balanced_labels(1000, 10, seed=1))
    assert sorted(np.bincount(balanced_labels(25, 10, seed=0), minlength=10)) == [2] * 5 + [3] * 5
    assert len(set(balanced_labels(7, 10, seed=0))) == 7


def test_images_depend_neither_on_batch_size_nor_on_processes(monkeypatch):
    labels, method = balanced_labels(50, 10, seed=0), NoisyLabels()
    whole = all_images(generate(method, 0.3, labels, 3, 50, "cpu"), 50)
    assert np.array_equal(whole, all_images(generate(method, 0.3, labels, 3, 7, "cpu"), 50))
    assert not np.array_equal(whole, all_images(generate(method, 0.3, labels, 4, 50, "cpu"), 50))
    parts, seen = np.zeros_like(whole), []
    for rank in range(3):
        monkeypatch.setattr(generation, "rank_and_size", lambda rank=rank: (rank, 3))
        for batch, indices in generate(method, 0.3, labels, 3, 8, "cpu"):
            assert indices[0] // 8 % 3 == rank  # chunk c is the work of process c mod 3
            parts[indices] = batch.numpy()
            seen += indices.tolist()
        assert np.array_equal(whole, all_images(generate(method, 0.3, labels, 3, 50, "cpu", distributed=False), 50))
    assert sorted(seen) == list(range(50))
    assert np.array_equal(whole, parts)


class TwoDraws(Method):
    """Draws twice an image, as a stochastic sampler, the first time in another shape
    for each batch if it is asked to.
    """

    def __init__(self, restless=False):
        super().__init__(None, None)
        self.restless, self.batches, self.waiting = restless, 0, []

    def sample(self, labels, noise, config):
        self.waiting.append(noise._ahead is not None)
        shape = (3, 8, 8) if not self.restless or self.batches % 2 else (192,)
        self.batches += 1
        return (noise.normal(*shape).reshape(-1, 3, 8, 8) + noise.normal(3, 8, 8)).clamp(-3, 3) / 3


def noise_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


@pytest.mark.parametrize("restless", [False, True])
def test_drawing_ahead_changes_no_image(restless):
    """Bit for bit those of generators that are asked when the sampler asks,
    also where the next batch wants another shape.
    """
    labels, method, drawing = balanced_labels(20, 4, 0), TwoDraws(restless), Drawing()
    found = all_images(generate(method, None, labels, 3, 6, "cpu", drawing=drawing), 20)
    # all batches but the first had been begun while another was sampled
    assert method.waiting == [False, True, True, True]
    assert drawing.seconds > 0 and not noise_threads()
    alone = TwoDraws(restless)
    for start in range(0, 20, 6):
        chunk = range(start, min(start + 6, 20))
        expected = quantise(alone.sample(None, Noise(image_seeds(3, chunk)), None))
        assert np.array_equal(found[chunk.start : chunk.stop], expected.numpy())


def test_threads_end_with_the_generator_and_their_errors_reach_it(monkeypatch):
    stream = generate(TwoDraws(), None, balanced_labels(20, 4, 0), 3, 6, "cpu")
    next(stream)
    assert noise_threads()
    stream.close()
    assert not noise_threads()
    randn = torch.randn

    def failing(*shape, **options):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room for noise")
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", failing)
    stream = generate(TwoDraws(), None, balanced_labels(20, 4, 0), 3, 6, "cpu")
    next(stream)  # its own noise is drawn by the sampler itself
    with pytest.raises(MemoryError, match="no room for noise"):
        next(stream)
    assert not noise_threads()


def test_the_rate_without_random_numbers_is_told_beside_the_one_with_them():
    fields = speed_fields(Evaluation({}, {}, 10.0, 40, drawing_seconds=2.0), 5, "float32", "cpu")
    assert (fields["images_per_s"], fields["images_per_s_without_draws"]) == (4.0, 5.0)
    nothing = speed_fields(None, 5, "float32", "cpu")
    assert nothing["images_per_s"] is nothing["images_per_s_without_draws"] is None


class Ambient(Method):
    """Images that show what a product within the sampler is computed in."""

    def __init__(self):
        super().__init__(None, None)

    def sample(self, labels, noise, config):
        self.dtype = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        return torch.zeros(len(labels), 3, 8, 8)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)],
)
def test_sampling_has_its_own_precision_and_rounding_whatever_the_training_chose(precision, dtype):
    method, tf32 = Ambient(), torch.backends.cuda.matmul.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        ((images, _),) = generate(method, None, balanced_labels(4, 2, 0), 0, 4, "cpu", precision, "truncate")
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16  # the training's, again
    assert method.dtype == dtype and torch.backends.cuda.matmul.allow_tf32 == tf32
    assert images.unique().tolist() == [127]


def test_generation_restores_the_training_mode():
    method = NoisyLabels().train()
    stream = generate(method, 0.3, balanced_labels(20, 10, 0), 0, 5, "cpu")
    next(stream)
    assert not method.training
    stream.close()
    assert method.training
    list(generate(method.eval(), 0.3, balanced_labels(20, 10, 0), 0, 5, "cpu"))
    assert not method.training


def test_quantise():
    values = torch.tensor([-1.0, -1.5, 1.0, 2.0, 0.0, 127 / 127.5 - 1 + 0.6 / 127.5])
    assert quantise(values).tolist() == [0, 0, 255, 255, 128, 128]  # truncation would give 127 for the last two
    assert quantise(values, "truncate").tolist() == [0, 0, 255, 255, 127, 127]
    assert quantise(values).dtype == quantise(values, "truncate").dtype == torch.uint8
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(levels.float() / 127.5 - 1), levels)
    assert torch.equal(
        quantise((levels.float() / 127.5 - 1).bfloat16()).int(),
        ((levels.float() / 127.5 - 1).bfloat16().float() * 127.5 + 127.5).round().int(),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantise_refuses_what_is_not_finite(bad):
    images = torch.zeros(4, 3, 2, 2)
    images[1, 0, 0, 0] = bad
    with pytest.raises(UserError, match="1 of 4 generated images"):
        quantise(images)


def test_quantised_images_survive_a_png():
    image = noise_images(1, seed=0)[0].transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    assert np.array_equal(np.array(Image.open(buffer)), image)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_collect_orders_keeps_and_weighs():
    images, weights = torch.from_numpy(noise_images(60, seed=0)), torch.linspace(0.5, 1.5, 60, dtype=torch.float64)
    keep = torch.arange(60) % 3 == 0
    shuffled = [
        (images[indices], indices)
        for indices in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(7)
    ]
    collected = collect(shuffled, 60, LinearExtractor(), weights, keep, groups=4)
    features = LinearExtractor()(images).pooled
    assert torch.allclose(collected.features, features[keep], rtol=1e-5)
    assert collected.logits.shape == (20, 5)
    expected = Moments.zeros(12, 4)
    expected.add(features, torch.arange(60), weights)
    assert torch.allclose(collected.moments.second, expected.second, rtol=1e-5)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 1, 2], "1 are missing, 0 came"), ([0, 1, 1, 2, 3], "0 are missing, 1 came"), ([0, 1, 2, 4], "1 are missing")],
)
def test_missing_and_doubled_images_are_refused(indices, message):
    stream = [(torch.from_numpy(noise_images(len(indices), 0)), torch.tensor(indices))]
    with pytest.raises(UserError, match=message):
        collect(stream, 4, LinearExtractor())


def measure(cache):
    """Reference and metrics of the cheap extractor, with as many processes as there are."""
    extractor, labels = LinearExtractor(), balanced_labels(90, 5, 0)
    generated, real = noise_images(90, seed=0) // 2, noise_images(75, seed=1)
    train = feature_set(batches(real.__getitem__, 75, 10), np.arange(75) % 5, extractor, "real", cache)
    some = batches(real[:40].__getitem__, 40, 10)
    held_out = feature_set(some, np.arange(40) % 5, extractor, "held-out", cache, logits=True)
    reals = Reals(Judge(extractor, ranks=True), train, held_out, 90)
    (metrics,) = judge(batches(generated.__getitem__, 90, 20), labels, [reals], "toy")
    return {name: (metric["value"], metric["se"]) for name, metric in metrics.items()}


def worker(rank, folder):
    """Two, then three processes; a third one of two, and the third's second chunk, have nothing to do."""
    torch.set_num_threads(1)
    for size in (2, 3):
        if rank < size:
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{size}", rank=rank, world_size=size)
            torch.save(measure(folder / f"cache{size}"), folder / f"metrics{size}-{rank}.pt")
            dist.destroy_process_group()


def test_metrics_do_not_depend_on_the_number_of_processes(tmp_path):
    single = measure(tmp_path / "cache")
    mp.spawn(worker, (tmp_path,), nprocs=3)
    for size in (2, 3):
        for rank in range(size):
            found = torch.load(tmp_path / f"metrics{size}-{rank}.pt")
            assert found.keys() == single.keys()
            for name, (value, se) in single.items():
                assert found[name][0] == pytest.approx(value, rel=1e-11), (size, rank, name)
                assert found[name][1] == (None if se is None else pytest.approx(se, rel=1e-9)), (size, rank, name)


# -- reference ---------------------------------------------------------------------------------------------------------


def reference_of(cache, extractor, digest="data", labels=None, **keys):
    images, shown = noise_images(30, seed=0), np.arange(30) % 3 if labels is None else labels
    return feature_set(batches(images.__getitem__, 30), shown, extractor, digest, cache, **keys)


def test_reference_is_cached_and_a_damaged_cache_rebuilt(tmp_path):
    extractor = LinearExtractor()
    first = reference_of(tmp_path, extractor)
    again = reference_of(tmp_path, extractor)
    assert extractor.images == 30  # the second came from the cache
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in first.tensors().items())
    (file,) = tmp_path.iterdir()  # no temporary file is left

    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for damage in (content[:-10], b"", b"not safetensors", bytes(flipped)):
        file.write_bytes(damage)
        seen = extractor.images
        assert torch.equal(reference_of(tmp_path, extractor).features, first.features)
        assert extractor.images == seen + 30
    assert file.read_bytes() == content
    reference_of(tmp_path, extractor, digest="other data")
    extractor.id = "other extractor"
    reference_of(tmp_path, extractor)
    assert len(list(tmp_path.iterdir())) == 3


def test_classes_of_the_reference_weigh_alike(tmp_path):
    labels = np.array([0] * 20 + [1] * 10)
    reference = reference_of(tmp_path, LinearExtractor(), labels=labels)
    x = reference.features.double()
    assert class_weights(torch.from_numpy(labels)).tolist() == [0.75] * 20 + [1.5] * 10
    assert torch.allclose(reference.moments.total().mean, (x[:20].mean(0) + x[20:].mean(0)) / 2, rtol=1e-12)


def test_a_large_reference_keeps_a_fixed_sample(tmp_path):
    first, second = (reference_of(tmp_path / name, LinearExtractor(), limit=12) for name in "ab")
    assert first.features.shape == (12, 12) and first.labels.shape == (12,)
    assert torch.equal(first.features, second.features)
    assert int(first.moments.count.sum()) == 30


# -- the whole ---------------------------------------------------------------------------------------------------------


def discs(n, start, stripes=0):
    """Procedural 32x32 images from integer arithmetic alone: a disc on a ramp, in colours,
    places and sizes that follow the index; every second one striped.
    """
    i, c, y, x = np.ogrid[start : start + n, :3, :32, :32]
    disc = (x - (i * 7 + 3) % 32) ** 2 + (y - (i * 11 + 5) % 32) ** 2 < (4 + (i * 5) % 9) ** 2
    ramp = i * 91 + c * c * 40 + x * (i % 5) + y * (i % 3)
    return np.clip(np.where(disc, i * 37 + c * 85, ramp) % 256 + x % 2 * (i % 2) * stripes, 0, 255).astype(np.uint8)


# Midway between what AVX2, SSE4 and no vector instructions give, which differ by up to 1e-6 (distances)
# or not at all (shares).
GOLDEN = {
    "fd": 703.97008,
    "fd_heldout": 761.13969,
    "fd_ratio": 4.7119582,
    "fd_ratio_train": 4.7119582,
    "fd_ratio_heldout": 3.6859539,
    "kid": 33.941616,
    "kid_heldout": 33.804961,
    "kid_ratio": 37.157850,
    "kid_ratio_train": 37.157850,
    "kid_ratio_heldout": 17.445779,
    "memorisation": 1.8043140,
    "copies": 1 / 380,
    "is": 4.5815857,
    "precision": 159 / 380,
    "recall": 0.7625,
    "density": 832 / 1900,
    "coverage": 0.74,
    "class_accuracy": 187 / 380,
}


@pytest.fixture(scope="module")
def golden_metrics(tmp_path_factory):
    extractor, cache = EmbeddedExtractor(), tmp_path_factory.mktemp("cache")
    real, held_out, generated = discs(400, 0), discs(60, 600), discs(380, 1000, stripes=24)
    train = feature_set(batches(real.__getitem__, 400), np.arange(400) % 5, extractor, "real", cache)
    labels = np.arange(600, 660) % 5
    heldout = feature_set(batches(held_out.__getitem__, 60), labels, extractor, "held-out", cache, logits=True)
    reals = Reals(Judge(extractor, ranks=True), train, heldout, 380)
    (metrics,) = judge(batches(generated.__getitem__, 380), np.arange(1000, 1380) % 5, [reals], "discs")
    return metrics


def test_golden_numbers(golden_metrics):
    """Fixed images give fixed numbers on every machine. If one moves on purpose, raise JUDGED_VERSION with it."""
    assert (EVALUATOR_VERSION, JUDGED_VERSION) == (2, 3)
    assert {name: metric["value"] for name, metric in golden_metrics.items()} == pytest.approx(GOLDEN, rel=2e-6)


def toy_source():
    """Ten greys with noise; unbalanced, so that the weights matter."""

    def part(n, seed):
        labels = np.sort(np.arange(n) ** 2 % 10)
        noise = np.random.Generator(np.random.PCG64(seed)).normal(0, 20, (n, 3, 8, 8))
        images = np.clip(labels[:, None, None, None] * 25.5 + noise, 0, 255).astype(np.uint8)
        return ArrayImages(images, labels, f"toy{seed}")

    train, held_out = part(60, 0), part(25, 1)
    return DataSource(DataSummary("toy", 10, 8, 60, 25, tuple("abcdefghij"), "digest"), train, held_out, balanced=True)


def test_throughput_is_that_of_one_device_whatever_their_number(monkeypatch):
    """A run and its re-evaluation must tell the same speed, on one GPU and on eight."""
    for devices in (1, 4):
        monkeypatch.setattr("pixlat.evaluation.features.ranks.rank_and_size", lambda n=devices: (0, n))
        monkeypatch.setattr("pixlat.evaluation.score.generate.rank_and_size", lambda n=devices: (0, n))
        clock = Clock()
        labels = np.zeros(40, dtype=np.int64)
        made = list(clock.timed(generate(NoisyLabels(), 0.15, labels, 0, 5, "cpu")))
        assert clock.images == sum(len(indices) for _, indices in made) == 40 // devices
        fields = speed_fields(Evaluation({}, {}, clock.seconds, clock.images), 5, "float32", "cpu")
        assert fields["devices"] == devices and fields["images_per_s"] == pytest.approx(clock.images / clock.seconds)


def test_a_method_is_measured(tmp_path):
    run = SimpleNamespace(
        sample=0.15,
        eval=SimpleNamespace(num_images=40, seed=0, seeds=[], batch=15, precision="fp32", uint8="round", judges=[]),
    )
    good = evaluate_method(NoisyLabels(), run, toy_source(), "cpu", tmp_path)
    assert (
        good.protocol["samples"] | {"n": 40, "precision": "float32", "uint8_rule": "round_half_even"}
        == good.protocol["samples"]
    )
    assert protocol_name(good.protocol).startswith("embedded-v2: 1 judges/toy-train/n=40/heldout#")
    assert good.sampling_seconds > 0 and good.images_made == 40
    metrics = good.metrics
    assert set(metrics) == {*MEANS, *OWN_UNITS, "fd_ratio", "kid_ratio"}
    assert good.judged["judged_by"] == ["embedded-v1"]
    assert good.judged["real"]["metrics"]["fd_ratio"]["value"] == 1
    assert all(np.isfinite(metric["value"]) and metric["n"] > 0 for metric in metrics.values())
    assert metrics["fd"]["regularised"]  # 60 real images in 320 dimensions
    assert metrics["class_accuracy"]["value"] >= 0.4
    with torch.autocast("cpu", torch.bfloat16):  # whatever runs around it
        assert evaluate_method(NoisyLabels(), run, toy_source(), "cpu", tmp_path).metrics == metrics
    noisy = SimpleNamespace(sample=2.0, eval=run.eval)
    bad = evaluate_method(NoisyLabels(), noisy, toy_source(), "cpu", tmp_path)
    assert bad.protocol == good.protocol
    assert bad.metrics["fd_ratio"]["value"] > 1.5 * metrics["fd_ratio"]["value"]
    assert bad.judged["real"] == good.judged["real"]
    assert bad.metrics["class_accuracy"]["value"] < metrics["class_accuracy"]["value"]


def floor_of(heldout, reference):
    """The entry `fd_floor` of records of embedded-v1."""
    estimate = jackknife(
        frechet_distance(heldout.total(), reference), [frechet_distance(g, reference) for g in heldout.left_out()]
    )
    return {
        "value": estimate.value,
        "value_bc": estimate.value_bc,
        "n": int(heldout.count.sum()),
        "n_eff": heldout.effective_number,
    }


def test_the_floor_at_another_number_of_images_is_what_that_many_reach():
    """Classes of 10 to 300 images weighted alike: their distance has the bias of fewer images than there are.

    Measured with balanced images of the same law.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    sizes, dims, n, repeats = (300, 120, 60, 30, 10), 24, 400, 12
    centres = rng.normal(size=(len(sizes), dims))

    def moments_of(counts):
        labels = np.repeat(np.arange(len(counts)), counts)
        features = torch.from_numpy(centres[labels] + rng.normal(size=(len(labels), dims)))
        moments = Moments.zeros(dims)
        moments.add(features, torch.from_numpy(rng.permutation(len(labels))), class_weights(torch.from_numpy(labels)))
        return moments

    reference = factorise(moments_of([20_000] * len(sizes)).total())
    floors = [floor_of(moments_of(sizes), reference) for _ in range(repeats)]
    reached = np.array(
        [frechet_distance(moments_of([n // len(sizes)] * len(sizes)).total(), reference) for _ in range(repeats)]
    )
    told, by_count = (
        np.array([floor_at({**floor, **change}, n) for floor in floors]) for change in ({}, {"n_eff": sum(sizes)})
    )
    error = np.hypot(told.std(ddof=1), reached.std(ddof=1)) / repeats**0.5
    assert abs(told.mean() - reached.mean()) < 3 * error < by_count.mean() - reached.mean()
    assert floors[0]["n"] == sum(sizes) and floors[0]["n_eff"] == pytest.approx(5**2 / sum(1 / size for size in sizes))
    plain = Moments.zeros(2)
    plain.add(torch.randn(30, 2), torch.arange(30))
    assert plain.effective_number == 30


def test_without_held_out_images_there_is_no_ratio(tmp_path):
    extractor, images, labels = LinearExtractor(), noise_images(40, seed=0), np.zeros(40, dtype=np.int64)
    train = feature_set(batches(images.__getitem__, 40), labels, extractor, "real", tmp_path)
    reals = Reals(Judge(extractor, ranks=True), train, None, 40)
    (metrics,) = judge(batches(images.__getitem__, 40), labels, [reals], "toy")
    # and of one class there is no accuracy
    assert metrics.keys() == {"fd", "kid", "is", "precision", "recall", "density", "coverage"}
    assert metrics["fd"]["value"] == pytest.approx(0, abs=1e-9)
    assert metrics["precision"]["value"] == metrics["recall"]["value"] == 1


def test_too_few_images_are_refused(tmp_path):
    run = SimpleNamespace(sample=0.15, eval=SimpleNamespace(num_images=10, seed=0, seeds=[], batch=15, judges=[]))
    with pytest.raises(UserError, match="at least 20"):
        evaluate_method(NoisyLabels(), run, toy_source(), "cpu", tmp_path)


def test_discriminant_separates_what_can_be_separated():
    rng = np.random.Generator(np.random.PCG64(0))
    labels = torch.tensor([3, 7, 9]).repeat_interleave(torch.tensor([100, 50, 20]))
    features = torch.from_numpy(rng.normal(size=(170, 6))).float() + 6 * torch.nn.functional.one_hot(labels // 3, 6)
    classifier = fit_discriminant(features, labels, class_weights(labels))
    assert classifier.correct(features, labels).mean() > 0.97
    assert classifier.correct(features, torch.full((170,), 3)).sum() == pytest.approx(100, abs=4)
