"""Falsifiable statements of the papers that a CPU can check, one module each. `../claim_tools/` defines a claim."""
