"""`python evaluation/collapse.py method=...` is `pixlat study collapse method=...`: see studies/collapse.py."""

import sys

from pixlat.evaluation.studies.collapse import main

if __name__ == "__main__":
    sys.exit(main())
