"""What is written: records of runs and claims, curves, and the papers' published rows. No torch."""
