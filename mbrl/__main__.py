"""`python -m mbrl` is the command `mbrl`."""

import sys

from mbrl.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
