# SPDX-License-Identifier: MIT
"""The lab: Debian's own kernels without KVM hardware, kvmprobe inside (docs/lab.md)."""
