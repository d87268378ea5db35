# SPDX-License-Identifier: MIT
"""What every test runs under."""

import os
import sys
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).parents[1]

# Under sudo nothing that root writes may stay in somebody's checkout.
FOREIGN = os.geteuid() != ROOT.stat().st_uid
sys.dont_write_bytecode |= FOREIGN

# How long one example takes depends on the machine and decides nothing here.
settings.register_profile("kvmprobe", deadline=None, print_blob=True)
settings.register_profile("foreign", settings.get_profile("kvmprobe"), database=None)
settings.load_profile("foreign" if FOREIGN else "kvmprobe")
