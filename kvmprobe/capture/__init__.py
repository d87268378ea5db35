# SPDX-License-Identifier: MIT
"""From a live kernel to a capture: plan, session, ring, recorder."""
