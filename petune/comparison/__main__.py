"""`python -m petune.comparison …` is one measured `petune fit`; see petune/comparison/worker.py."""

import sys

from petune.comparison.worker import main

sys.exit(main())
