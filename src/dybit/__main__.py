"""``python -m dybit``: the command line."""

import sys

from dybit.cli import main

if __name__ == "__main__":
    sys.exit(main())
