# SPDX-License-Identifier: MIT
"""What `make bench` measures: what is compared runs in turns (A B A B)."""
