# SPDX-License-Identifier: MIT
"""The one family of errors; `kvmprobe.cli.main` turns each into one line on stderr."""


class KvmprobeError(Exception):
    """Something went wrong that a user can act on.

    The message is one line: what is wrong, and what to do about it.  `exit_code` is the status
    the command ends with.
    """

    exit_code = 1


class UsageError(KvmprobeError):
    """The command was called in a way that can't work."""

    exit_code = 2


class HostError(KvmprobeError):
    """The host can't do what was asked: not root, no KVM, no BTF, BPF refused."""


class BtfError(HostError):
    """BTF is missing, is malformed (message names the byte offset) or lacks a named member."""


class CaptureError(KvmprobeError):
    """A capture file can't be written or read."""


class GuestError(KvmprobeError):
    """A bundled guest could not be run."""
