# SPDX-License-Identifier: MIT
"""Counts and times of what KVM does: aggregated live in the kernel, or from captures."""
