"""`python evaluation/claims.py [run | report]`: the papers' statements that a CPU can check. The claims are the files of claims/."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this checkout; and `evaluation.claims` is the package, not this file

from evaluation.claims.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
