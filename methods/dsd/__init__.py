"""DSD: one network that encodes, denoises and decodes, trained end to end (arXiv 2511.14716)."""
