# SPDX-License-Identifier: MIT
"""Other tools' files: read into captures, and written from them."""
