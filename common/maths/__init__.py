"""The mathematics of methods: plain functions from tensors to tensors. t = 1 is noise, t = 0 is data."""
