# SPDX-License-Identifier: MIT
"""The command: one thin module a subcommand."""
