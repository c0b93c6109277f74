"""Computes the metrics of a named protocol from a stream of generated images and the statistics of real images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pixlat.evaluation.features.collect import Collected, ImageBatch, collect
from pixlat.evaluation.features.moments import Gaussian, Moments
from pixlat.evaluation.features.networks import CardExtractor
from pixlat.evaluation.features.reference_files import Reference
from pixlat.evaluation.metrics.entries import frechet_metric, kid_metric, mean_metric
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance
from pixlat.evaluation.metrics.inception_score import inception_score, shuffled
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.metrics.kid import kernel_distance
from pixlat.evaluation.metrics.mind import monge_distance
from pixlat.evaluation.metrics.prdc import prdc
from pixlat.evaluation.protocols.identity import MAX_NEIGHBOURS
from pixlat.evaluation.protocols.named import LARGE_GROUPS, NEIGHBOURS, NamedProtocol
from pixlat.evaluation.records.record import Metric
from pixlat.evaluation.score.embedded import check_enough


def measure(
    images: Iterable[ImageBatch], n: int, extractor: CardExtractor, reference: Reference, protocol: NamedProtocol
) -> dict[str, Metric]:
    """All metrics of the protocol for n images. Every process gets the same result."""
    check_enough("generated", n)
    spatial_dims = extractor.spatial_dims if "sfid" in protocol.metrics else 0
    generated = collect(images, n, extractor, groups=LARGE_GROUPS, spatial_dims=spatial_dims)
    metrics: dict[str, Metric] = {
        name: distance_metric(generated.moments, reference.pooled)
        for name in ("fid", "fd_dinov2")
        if name in protocol.metrics
    }
    if generated.spatial is not None and reference.spatial is not None:
        metrics["sfid"] = distance_metric(generated.spatial, reference.spatial)
    if "is" in protocol.metrics:
        score = inception_score(generated.logits, "RandomState")
        metrics["is"] = {"value": score.value, "value_bc": None, "se": score.se, "n": n, "unit": "1"}
    if reference.features is not None and "kid" in protocol.metrics:
        metrics |= feature_metrics(generated, reference.features, extractor.device)
    return metrics


def distance_metric(generated: Moments, reference: Gaussian) -> Metric:
    """The record's entry for a Fréchet distance with its jackknife error."""
    factored = factorise(reference)
    left_out = [frechet_distance(group, factored) for group in generated.left_out()]
    estimate = jackknife(frechet_distance(generated.total(), factored), left_out)
    return frechet_metric(estimate, int(generated.count.sum()), factored.regularised)


def feature_metrics(generated: Collected, reference: Tensor, device: torch.device) -> dict[str, Metric]:
    """kid, mind, precision, recall, density and coverage.

    As in the published protocols, precision and recall use all images, density and coverage at most MAX_NEIGHBOURS.
    """
    n = len(generated.features)
    # files are often sorted by class; after the shuffle any part represents all images
    shuffled_features = generated.features[torch.from_numpy(shuffled(n, "PCG64"))]
    mind = monge_distance(shuffled_features, reference, LARGE_GROUPS)
    where = device if device.type == "cuda" else torch.device("cpu")  # other devices may lack float64
    features, real = shuffled_features.to(where), reference.to(where)
    kid = kernel_distance(features, real)
    near = prdc(features, real)
    few = near if n <= MAX_NEIGHBOURS else prdc(features[:MAX_NEIGHBOURS], real)
    values = dict(zip(NEIGHBOURS, (near.precision, near.recall, few.density, few.coverage), strict=True))
    return {
        "kid": kid_metric(kid, n),
        "mind": frechet_metric(mind, n, regularised=False),
        **{
            name: mean_metric(value.cpu(), None if name in ("precision", "density") else torch.ones(len(real)))
            for name, value in values.items()
        },
    }
