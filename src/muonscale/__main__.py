"""`python -m muonscale` is the command line."""

import sys

from muonscale.cli import main

sys.exit(main())
