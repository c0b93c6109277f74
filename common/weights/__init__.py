"""Files of weights: our checkpoints, tensors that others saved, Hugging Face's cache, and finished runs.

Only fetch.py downloads anything: repositories that the user names as hf:owner/name.
"""
