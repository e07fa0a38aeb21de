"""`python -m openmoba`, which torchrun starts too: the command `openmoba`."""

import sys

from openmoba.cli import main

sys.exit(main())
