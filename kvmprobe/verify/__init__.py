# SPDX-License-Identifier: MIT
"""Whether this host has the faults of the class, found out on purpose in a VM of its own."""
