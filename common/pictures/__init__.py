"""The pictures of a run: sample grids, nearest training images, training curves."""
