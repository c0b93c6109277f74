"""From a model, or from finished images, to the metrics of a protocol. Start with embedded.py."""
