# SPDX-License-Identifier: MIT
"""`kvmprobe verify`: does this host have the faults; found out on purpose."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def verify(
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run spte-overwrite too; read above what it does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Say for each known fault whether this host has it, by trying it out.

    Runs small guests in VMs of its own.  Needs only /dev/kvm, touches no other
    VM, ends within 10 seconds and leaves nothing.

    \b
    internal-slot   A nested guest (L2) touches KVM's hidden TSS, then L1
                    does.  Effect on the host: none.
    address-space   A guest goes in and out of SMM (CVE-2026-99082).
                    Effect on the host: none.
    spte-overwrite  A page table changes behind KVM's back (CVE-2026-23401).
                    Effect on a vulnerable host: a kernel warning, and a
                    stale record of a page until the next boot.  Runs only
                    with --unsafe, never with kernel.panic_on_warn=1.

    \b
    Exit status: 0 fixed, not reachable or not tested; 2 vulnerable;
    3 unknown, and every error.
    """  # noqa: D301 - click wants the character itself
    from kvmprobe.host.facts import host_facts
    from kvmprobe.verify.answers import document, exit_status, text
    from kvmprobe.verify.run import verify as run

    host = host_facts()
    answers = run(host, unsafe=unsafe)
    if as_json:
        print(json.dumps(document(answers, host), indent=2))
    else:
        print(text(answers), end="")
    return exit_status(answers)
