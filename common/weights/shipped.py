"""The weights that the package ships, by their cards (JSON with recipe, digest and cost). Imports no torch."""

from __future__ import annotations

from pathlib import Path

# autoencoders that method=vae trained, by the value of model.tokenizer
AUTOENCODERS = {"embedded": str(Path(__file__).resolve().parent.parent / "data" / "autoencoder32.json")}
