"""Weights in files: our checkpoints, tensors that others saved, Hugging Face's cache, and finished runs.

Nothing is downloaded but what the user names as hf:owner/name (fetch.py).
"""
