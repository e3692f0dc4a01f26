"""``python -m sam``: see ``python -m sam --help``."""

import sys

from .cli import main

sys.exit(main())
