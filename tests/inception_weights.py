"""Weights for torch-fidelity's Inception from a seed, since the real ones cannot be downloaded where tests run."""

from pathlib import Path
from unittest import mock

import torch


def random_inception(path: Path) -> Path:
    """A state dict file, scaled so that activations neither die nor explode over the 48 layers."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with (
        mock.patch.object(theirs, "load_state_dict_from_url"),
        mock.patch.object(theirs.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.startswith("fc."):
            tensor.normal_(0, 0.05, generator=generator)
    torch.save(network.state_dict(), path)
    return path
