# SPDX-License-Identifier: MIT
"""What this host is: BTF, symbols, parameters, permissions; and finding bcc."""
