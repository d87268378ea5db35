# SPDX-License-Identifier: MIT
"""A tiny virtual machine monitor and tiny guests that make KVM do things on purpose."""
