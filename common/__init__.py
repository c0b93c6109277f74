"""What all methods share: configuration, data, trainer, checkpoints, flow mathematics, samplers, building blocks, frozen encoders, cost counting."""
