"""Weights in the package that runs of this suite made, by the cards that tell their recipe, digest and cost.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

# of method=vae, by the value of model.tokenizer
AUTOENCODERS = {"embedded": str(Path(__file__).resolve().parent.parent / "data" / "autoencoder32.json")}
