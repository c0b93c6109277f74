"""JiT: a plain Transformer on large image patches that predicts the clean image (arXiv 2511.13720)."""
