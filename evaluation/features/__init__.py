"""From images to features and their sums: extractors, moments, and the statistics of real images."""
