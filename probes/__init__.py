# SPDX-License-Identifier: GPL-2.0-only OR MIT
"""The probes' C and the event schema derived from it."""
