# SPDX-License-Identifier: MIT
"""`python tests/lab …`, from any folder: the same as `python -m tests.lab …` in the checkout."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.lab.cli import main  # noqa: E402

sys.exit(main())
