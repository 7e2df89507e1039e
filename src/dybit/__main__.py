"""``python -m dybit``: the command line. Must not know anything but it."""

import sys

from dybit.cli import main

if __name__ == "__main__":
    sys.exit(main())
