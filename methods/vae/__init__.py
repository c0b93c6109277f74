"""A small KL autoencoder: the latent methods' tokenizer without a download (arXiv 1312.6114, 2112.10752)."""
