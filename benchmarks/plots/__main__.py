"""`python -m benchmarks.plots FILE.json`: draws the charts of a result file into its folder."""

import sys
from pathlib import Path

from benchmarks.plots import draw

if len(sys.argv) != 2:
    sys.exit("usage: python -m benchmarks.plots FILE.json")
source = Path(sys.argv[1])
for drawn in draw(source, source.parent):
    print(drawn)
