# SPDX-License-Identifier: MIT
"""A capture as one web page: gathered in one pass, drawn by the reader's browser."""
