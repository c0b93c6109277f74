"""`python evaluation/hidden_states.py` does the same as `pixlat study hidden-states`; see studies/hidden_states.py."""

import sys

from pixlat.evaluation.studies.hidden_states import main

if __name__ == "__main__":
    sys.exit(main())
