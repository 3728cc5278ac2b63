"""``python -m pydiffusion``: the same as the command ``pydiffusion``."""

import sys

from .cli import main

sys.exit(main())
