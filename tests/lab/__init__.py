# SPDX-License-Identifier: MIT
"""The lab: Debian's own kernels, booted without KVM hardware, with kvmprobe inside (docs/lab.md)."""
