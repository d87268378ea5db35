# SPDX-License-Identifier: MIT
"""What a boot of the matrix left: its VMs, its captures and their analyses, read and checked."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmprobe.probes.schema import Flag
from kvmprobe.store.reader import CaptureReader
from tests.lab.base import LabError, run_program
from tests.lab.scenarios import FAULT, NOT_EXERCISED, Scenario


@dataclass(frozen=True)
class Result:
    """A recording's analysis, the process of every VM in it, and two counts.

    `unstable`: lookups of a memslot while memslots changed; `flight`: events that the boot's flight
    recorder held at the end.
    """

    recording: str
    document: dict[str, Any]
    pids: dict[str, int]
    unstable: int
    flight: int

    @property
    def verdict(self) -> str:
        return str(self.document["verdicts"][FAULT]["verdict"])

    def findings(self, vm: str) -> list[dict[str, Any]]:
        """Return the findings in one VM."""
        pid = self.pids[vm]
        return [each for each in self.document["findings"] if each["vm"]["pid"] == pid]

    def compare(
        self, scenarios: Sequence[Scenario], vendor: str, classified: str, *, caching: bool = True
    ) -> Iterator[tuple[str, str, str]]:
        """Yield (name, expected, found) of each VM of these scenarios and of the whole recording.

        classified: what is known of the kernel.  caching: False with kvm.mmio_caching=0.
        """
        for scenario in scenarios:
            for vm in scenario.vms:
                expected, found = scenario.check(
                    self.findings(vm), vm, vendor, classified, caching=caching
                )
                if scenario.watched:
                    expected += ", events in the flight recorder"
                    found += ", events in the flight recorder" if self.flight else ""
                if scenario.toggled:
                    expected += ", lookups unstable"
                    found += ", lookups unstable" if self.unstable else ""
                yield vm, expected, found
        said = {scenario.verdict(classified) for scenario in scenarios} - {NOT_EXERCISED}
        expected = f"verdict {next(iter(said), NOT_EXERCISED)}"
        yield f"({self.recording})", expected, f"verdict {self.verdict}"


def read_result(folder: Path, recording: str, vms: Sequence[str], code: Path) -> Result:
    """Read what a boot left.

    Raises LabError when a VM did not run to its end or is not in the capture, when a finding is in
    none of the VMs, or when the analysis made in the emulator and one made here differ.
    """
    output = (folder / "output").read_text(errors="replace")
    pids = {name: int(pid) for name, pid in re.findall(r"^vm (\S+) (\d+)\r?$", output, re.M)}
    failed = re.findall(r"^failed (\S+)", output, re.M)
    broken = [vm for vm in vms if vm not in pids or vm in failed]
    if broken:
        raise LabError(f"did not run: {', '.join(broken)}; see {folder / 'output'}")
    capture = folder / "out" / f"{recording}.kvmprobe"
    try:
        inside = json.loads(capture.with_suffix(".json").read_text())
        outside = run_kvmprobe(code, "analyze", "--json", str(capture.resolve()))
        seen = run_kvmprobe(code, "info", "--json", str(capture.resolve()))["vms"]
    except (OSError, ValueError, LabError) as error:
        raise LabError(f"no analysis: {error}") from None
    for part in ("findings", "verdicts"):
        if inside[part] != outside[part]:
            raise LabError(f"{part} differ between the analysis in the VM and that outside")
    if seen != len(vms):
        raise LabError(f"{seen} VMs are in the capture, not {len(vms)}")
    mine = {pids[vm] for vm in vms}
    others = [each["rule"] for each in outside["findings"] if each["vm"]["pid"] not in mine]
    if others:
        raise LabError(f"findings in no VM of the scenarios: {', '.join(others)}")
    flight = sum(map(int, re.findall(r"^flight (\d+)\r?$", output, re.M)))
    return Result(recording, outside, pids, count_unstable(capture), flight)


def count_unstable(capture: Path) -> int:
    """Return how many of a capture's events had their memslot looked up while memslots changed."""
    with CaptureReader(capture) as reader:
        return sum(int((batch["flags"] & Flag.UNSTABLE != 0).sum()) for batch in reader.batches())


def run_kvmprobe(code: Path, *words: str) -> dict[str, Any]:
    """Run a checkout's kvmprobe and return the JSON it prints; LabError when it fails."""
    program = "import sys; from kvmprobe.cli.main import main; sys.exit(main())"
    document: dict[str, Any] = json.loads(
        run_program([sys.executable, "-c", program, *words], cwd=code)
    )
    return document
