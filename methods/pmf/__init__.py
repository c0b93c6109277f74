"""pMF: one-step pixel generation with pixel mean flows (arXiv 2601.22158)."""
