# SPDX-License-Identifier: MIT
"""A reference model of KVM's MMIO cache, and what it proves about rules and detector."""
