# SPDX-License-Identifier: MIT
"""The capture file: its writer, its reader, and the safe creation of output files."""
