# SPDX-License-Identifier: MIT
"""What every live test needs."""

import os

import pytest

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm


@pytest.fixture(scope="session", autouse=True)
def _needs_kvm_and_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("recording needs root")
    try:
        os.close(kvm.open_device())
    except GuestError as error:
        pytest.skip(str(error))
