"""`python -m fastguard` is the command `fastguard`."""

import sys

from fastguard.commands.cli import main

sys.exit(main())
