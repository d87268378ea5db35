# SPDX-License-Identifier: MIT
"""`python -m kvmprobe`."""

from kvmprobe.cli.main import main

main()
