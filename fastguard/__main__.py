"""`python -m fastguard` is the command `fastguard`."""

import sys

from fastguard.cli import main

sys.exit(main())
