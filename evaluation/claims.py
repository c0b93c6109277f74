"""`python evaluation/claims.py` is `pixlat claims`: see studies/claims/command.py."""

import sys

from pixlat.evaluation.studies.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
