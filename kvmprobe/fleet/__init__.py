# SPDX-License-Identifier: MIT
"""The captures of many hosts, analysed side by side."""
