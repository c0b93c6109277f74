"""From `data.*` to training batches: which data set, which images a step sees, and what was prepared in files."""
