# SPDX-License-Identifier: MIT
"""`python tests/lab here`: the scenarios on this machine's own KVM, without an emulator."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmprobe.errors import KvmprobeError
from kvmprobe.guests.nested import nests
from tests.lab.base import CHECKOUT, LabError, MissingError, run_program, say
from tests.lab.matrix import Cell
from tests.lab.results import read_result, run_kvmprobe
from tests.lab.scenarios import UNCLASSIFIED, Scenario

_MODULE = Path("/dev/lab_slot")


def run_here(scenarios: Sequence[Scenario], classified: str, results: Path) -> list[Cell]:
    """Run those of the main recording that this KVM can do, under one recording.

    classified: what this kernel is believed to be.  `results` gets what a boot of the lab leaves.
    Raises MissingError where KVM has no nested guests; LabError when a VM did not run to its end,
    or when other VMs run beside.
    """
    try:
        vendor = nests()
    except KvmprobeError as error:
        raise MissingError(str(error)) from None
    if vendor is None:
        raise MissingError("KVM offers no nesting here; load kvm_intel or kvm_amd with nested=1")
    able = [
        each
        for each in scenarios
        if each.recording == "main"
        and vendor in each.vendors
        and (vendor == "intel" or not each.internal or _MODULE.exists())
    ]
    if not able:
        raise LabError("none of these scenarios can be run here")
    out = (results / "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    script, capture = out / "main.sh", out / "main.kvmprobe"
    script.write_text("".join(each.script(vendor) for each in able))
    say(f"{len(able)} scenarios on {platform.release()}, {vendor}")
    python = [sys.executable, "-m", "kvmprobe", "record", "--force", "-o", str(capture)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = [f"LAB={Path(__file__).parent}", f"PYTHONPATH={CHECKOUT}", f"PATH={path}"]
    said = run_program(["env", *environment, *python, "--", "sh", str(script)], cwd=CHECKOUT)
    (results / "output").write_text(said)
    document = run_kvmprobe(CHECKOUT, "analyze", "--json", str(capture))
    (out / "main.json").write_text(json.dumps(document))
    result = read_result(results, "main", [vm for each in able for vm in each.vms], CHECKOUT)
    return [
        Cell(
            platform.release(),
            vendor,
            name,
            "default",
            UNCLASSIFIED if classified == UNCLASSIFIED else expected,
            found,
        )
        for name, expected, found in result.compare(able, vendor, classified)
    ]
