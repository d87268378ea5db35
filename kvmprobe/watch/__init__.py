# SPDX-License-Identifier: MIT
"""The service: watch this host's KVM for as long as it runs, and tell."""
