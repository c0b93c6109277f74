"""Networks that a method uses but does not train: encoders, tokenizers and perceptual distances."""
