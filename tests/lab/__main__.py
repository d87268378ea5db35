# SPDX-License-Identifier: MIT
"""`python tests/lab …`: puts the folder `tests` on the path so that the package is `lab`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lab.cli import main  # noqa: E402

sys.exit(main())
