# SPDX-License-Identifier: MIT
"""From batches of events to findings and verdicts; needs no root and no host."""
