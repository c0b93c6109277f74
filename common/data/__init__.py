"""The embedded data set emoji32: one WebP sheet, one JSON index, the upstream licences. README.md is the data card."""
