# SPDX-License-Identifier: MIT
"""kvmprobe: finds KVM taking memory for MMIO."""

__version__ = "0.1.0"
