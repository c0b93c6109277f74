"""`python evaluation/claims.py` does the same as `pixlat claims`; studies/claim_tools/command.py holds the code."""

import sys

from pixlat.evaluation.studies.claim_tools.command import main

if __name__ == "__main__":
    sys.exit(main())
