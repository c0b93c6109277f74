"""`python -m pixlat` is `pixlat`; `torchrun --nproc-per-node 8 -m pixlat ...` starts it in several processes."""

import sys

from pixlat.cli import main

if __name__ == "__main__":
    sys.exit(main())
