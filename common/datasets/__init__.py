"""From `data.*` to training batches: opens data sets, chooses the images of each step, reads prepared shards."""
