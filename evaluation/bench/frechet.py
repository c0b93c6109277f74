"""`pixlat bench frechet`: times our Fréchet distance and those of other packages on the same statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pixlat.common.errors import UserError
from pixlat.evaluation.features.moments import Gaussian
from pixlat.evaluation.metrics.frechet import factorise, frechet_distance

REPEATS = 5


def compare(dims: int = 2048) -> dict[str, Any]:
    """For each implementation: the fastest of five calls in wall and processor seconds, its slowdown relative to ours,
    and its distance.
    """
    try:
        from cleanfid.fid import frechet_distance as cleanfid_distance
        from torch_fidelity.metric_fid import fid_statistics_to_metric
    except ImportError as error:
        raise UserError(
            f"this comparison needs torch-fidelity and clean-fid ({error}): pip install 'pixlat[metrics]'"
        ) from error
    a, b = gaussian(dims, seed=0), gaussian(dims, seed=1)
    means, covs = (a.mean.numpy(), b.mean.numpy()), (a.cov.numpy(), b.cov.numpy())
    statistics = [{"mu": mean, "sigma": cov} for mean, cov in zip(means, covs, strict=True)]
    factored = factorise(b)
    results = {
        "pixlat": timed(lambda: frechet_distance(a, factorise(b))),
        "pixlat, reference factored before": timed(lambda: frechet_distance(a, factored)),
        "torch-fidelity": timed(
            lambda: fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        ),
        "clean-fid (SciPy's matrix root)": timed(lambda: cleanfid_distance(means[0], covs[0], means[1], covs[1])),
    }
    ours = results["pixlat"]
    for name, result in results.items():
        result |= {f"times_slower_{clock}": result[f"{clock}_s"] / ours[f"{clock}_s"] for clock in ("wall", "cpu")}
        assert np.isclose(result["distance"], ours["distance"], rtol=1e-6), (name, result["distance"], ours["distance"])
    return {"dims": dims, "threads": torch.get_num_threads(), **results}


def gaussian(dims: int, seed: int) -> Gaussian:
    """Statistics of 3 * dims correlated features. Their spectrum falls by a factor of 1000, as for a real network."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, dims, dtype=torch.float64)
    x = torch.randn(3 * dims, dims, generator=generator, dtype=torch.float64) * scale * (1 + 0.1 * seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / dims**0.5
    x = x @ mixing + 0.4
    return Gaussian(len(x), x.mean(0), torch.cov(x.T))


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """The minimal wall and processor seconds of a call, and its result."""
    walls, processors, distance = [], [], 0.0
    for _ in range(REPEATS):
        wall, processor = time.perf_counter(), time.process_time()
        distance = float(work())
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {"wall_s": min(walls), "cpu_s": min(processors), "distance": distance}
