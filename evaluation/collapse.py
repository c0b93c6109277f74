"""`python evaluation/collapse.py` does the same as `pixlat study collapse`; studies/collapse.py holds the code."""

import sys

from pixlat.evaluation.studies.collapse import main

if __name__ == "__main__":
    sys.exit(main())
