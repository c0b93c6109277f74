"""A small KL autoencoder: the tokenizer of the latent methods where no downloaded one is at hand
(arXiv 1312.6114, 2112.10752).
"""
