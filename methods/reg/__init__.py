"""SiT, REPA, REG and DiT: one latent transformer (arXiv 2401.08740, 2410.06940, 2507.01467, 2212.09748)."""
