"""`python -m petune` is the `petune` command."""

import sys

from petune.cli import main

sys.exit(main())
