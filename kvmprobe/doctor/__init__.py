# SPDX-License-Identifier: MIT
"""What this host is, what can be observed on it, and whether the faults can occur."""
