"""Networks that a method uses and does not train: encoders, tokenizers, perceptual distances."""
