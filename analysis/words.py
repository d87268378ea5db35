# SPDX-License-Identifier: MIT
"""The words of a verdict; without numpy, for `check` reads them in a hurry."""

VULNERABLE = "vulnerable"
INCONCLUSIVE = "inconclusive"
NOT_EXERCISED = "not exercised"
FIXED = "fixed"
#: All verdicts, the worst first.
VERDICTS = (VULNERABLE, INCONCLUSIVE, NOT_EXERCISED, FIXED)
