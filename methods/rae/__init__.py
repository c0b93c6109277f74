"""RAE and DiT-DH: diffusion in the latents of a frozen representation encoder (arXiv 2510.11690), both stages."""
