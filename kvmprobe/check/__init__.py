# SPDX-License-Identifier: MIT
"""A bounded look at a host, answered as monitoring plugins answer."""
