"""`python evaluation/claims.py [run | report]`: the papers' statements that a CPU can check.

The claims are the files of claims/.
"""

import sys

from pixlat.evaluation.studies.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
