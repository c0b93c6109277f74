"""The weights of the judges, each with its card. `evaluation/judges/shipped.py` has their digests."""
