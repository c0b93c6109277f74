"""`python evaluation/collapse.py` is `pixlat study collapse`: see studies/collapse.py."""

import sys

from pixlat.evaluation.studies.collapse import main

if __name__ == "__main__":
    sys.exit(main())
