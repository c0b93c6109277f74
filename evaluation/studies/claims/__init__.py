"""The papers' falsifiable statements that a CPU can check, one file each; `framework.py` says what a claim is."""
