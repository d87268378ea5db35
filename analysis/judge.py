# SPDX-License-Identifier: MIT
"""The judge: one stream of events in, and at any time what it shows, of the host and of each VM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvmprobe.analysis.detector import STEPPED, WATCHED, Detector, is_placeless
from kvmprobe.analysis.findings import Acquittal, Finding
from kvmprobe.analysis.integrity import Integrity
from kvmprobe.analysis.verdict import Coverage, Verdict, decide, worst
from kvmprobe.analysis.vms import Vm, VmNames
from kvmprobe.probes.schema import EVENT, Columns, Type

#: The columns that every batch must have; most of a healthy host's batches need no other.
COLUMNS = ("vm", "vcpu", "seq", "type", "flags", "slot")

#: VMs that are gone and still told by themselves; those before stay in all totals and findings.
GONE_LIMIT = 4096

#: Events that rules watch; the interpreter steps over so many in half a second.
_COMPILE_AFTER = 100_000


def further(columns: Columns) -> tuple[str, ...]:
    """Name the columns that `Judge.feed` will need of a batch, beside `COLUMNS`.

    Those of an event that is stepped over, that tells a name or a loss.  Evidence is whole events,
    so that all others may be needed too.
    """
    kinds = columns["type"]
    stepped = kinds[WATCHED.pick(columns)]
    if (kinds == Type.LOSS).any() or not is_placeless(stepped).all():
        return EVENT.names or ()
    return STEPPED if len(stepped) else ()


@dataclass(frozen=True)
class Reading:
    """How a capture could be read; the defaults are those of a stream that is live or whole.

    `damaged`: parts that were refused; `unknown`: events of types this version doesn't know;
    `truncated`: why the capture ends early.
    """

    damaged: int = 0
    unknown: int = 0
    truncated: str | None = None


@dataclass(frozen=True, eq=False)
class VmReport:
    """What is to be said of one VM.

    A proof against the kernel that another VM gave is no verdict on this one, but nothing here is
    `fixed` then.  A proof for the kernel counts for every VM, if it comes from one of which nothing
    was lost.  `gone`: the VM was destroyed.
    """

    vm: Vm
    gone: bool
    coverage: Coverage
    verdicts: Mapping[str, Verdict]

    @property
    def verdict(self) -> str:
        """The worst verdict on any fault."""
        return worst(v.verdict for v in self.verdicts.values())


@dataclass(frozen=True, eq=False)
class Report:
    """What a stream shows so far.

    `verdicts` has each fault's verdict on the host: the worst of its VMs', and what it rests on in
    all of them; `vms` has the VMs by number.  Findings are sorted by (first time, vm, vcpu, seq).
    """

    findings: tuple[Finding, ...]
    acquittals: tuple[Acquittal, ...]
    coverage: Coverage
    verdicts: Mapping[str, Verdict]
    vms: Mapping[int, VmReport]

    @property
    def verdict(self) -> str:
        """The worst verdict on any fault."""
        return worst(v.verdict for v in self.verdicts.values())


class Judge:
    """Follows one stream of events: batches in the order of their draining, cut anywhere.

    It must be given every event of the stream, in order: a sequence number that is missing is a
    loss.  The rules step over the CANDIDATE events only, so a stream that was made of those alone
    gives the same findings.  Memory is bounded by the vCPUs that live, `gone_limit`, and findings.
    """

    def __init__(
        self,
        plan: Iterable[Mapping[str, Any]],
        *,
        jit: bool = False,
        from_first: bool = False,
        gone_limit: int | None = None,
    ) -> None:
        """Begin a stream.

        Args:
            plan: the header's `plan`: what was attached.
            jit: compile the detector once many events were seen, where numba is installed.
            from_first: each vCPU's sequence begins at 0: so it is in what probes record.
            gone_limit: VMs that are gone and still told by themselves; None: `GONE_LIMIT`.

        """
        self._gone_limit = GONE_LIMIT if gone_limit is None else gone_limit
        self._attached = Coverage.attached_in(plan)
        self._detector = Detector(jit=jit, compile_after=_COMPILE_AFTER)
        #: Losses, gaps and anomalies; events by type.
        self.integrity = Integrity(from_first=from_first, jit=jit)
        #: The VMs' names and the vCPUs' threads.
        self.names = VmNames()

    @property
    def occurrences(self) -> int:
        """Events that convicted so far: it grows when there is something new to tell."""
        return self._detector.occurrences

    def feed(self, columns: Columns) -> None:
        """Take in one batch; LOSS events count as losses.

        Args:
            columns: every field of the event; all but `COLUMNS` are taken only when needed.

        """
        self._detector.feed(columns)
        self.integrity.feed(columns)
        self.names.feed(columns)
        self._forget()

    def findings(self) -> tuple[Finding, ...]:
        """Return what was found so far on vCPUs whose events a kernel can have made."""
        trusts = self.integrity.trusts
        return tuple(f for f in self._detector.findings() if trusts(f.vm, f.vcpu))

    def report(self, reading: Reading | None = None) -> Report:
        """Return what the stream shows so far.

        Args:
            reading: how the capture could be read; None: live, or without any problem.

        """
        reading = reading or Reading()
        findings = self.findings()
        acquittals = tuple(self._detector.acquittals())
        coverage = self._coverage(reading, None)
        return Report(
            findings=findings,
            acquittals=acquittals,
            coverage=coverage,
            verdicts=decide(findings, acquittals, coverage),
            vms=self._vms(findings, acquittals, reading),
        )

    def _coverage(self, reading: Reading, vm: int | None) -> Coverage:
        integrity = self.integrity
        if vm is None:
            unexplained, anomalies = integrity.unexplained, integrity.anomaly_counts.total()
        else:
            unexplained = integrity.unexplained_in(vm)
            anomalies = sum(integrity.vms[n].anomalies for n in {0, vm})
        return Coverage(
            attached=self._attached,
            lost=integrity.lost_by_observation(vm),
            # Unknown types and refused batches leave gaps too, and are told by themselves.
            unexplained=0 if reading.damaged or reading.unknown else unexplained,
            anomalies=anomalies,
            unknown=reading.unknown,
            damaged=reading.damaged,
            truncated=reading.truncated,
        )

    def _vms(
        self, findings: Sequence[Finding], acquittals: Sequence[Acquittal], reading: Reading
    ) -> dict[int, VmReport]:
        shared = self._coverage(reading, 0)
        coverage = {
            vm: self._coverage(reading, vm) if doubts.any() else shared
            for vm, doubts in self.integrity.vms.items()
            if vm
        }
        shown = {f.rule.fault for f in findings if f.rule.convicts}
        proofs = [a for a in acquittals if a.vm in coverage and coverage[a.vm].whole]
        # Most VMs are alike: nothing found, nothing lost.
        quiet = decide((), proofs, shared, shown)
        own: dict[int, list[Finding]] = {}
        for finding in findings:
            own.setdefault(finding.vm, []).append(finding)
        return {
            vm: VmReport(
                self.names.get(vm),
                vm in self.integrity.gone,
                seen,
                quiet
                if seen is shared and vm not in own
                else decide(own.get(vm, ()), proofs, seen, shown),
            )
            for vm, seen in sorted(coverage.items())
        }

    def _forget(self) -> None:
        """Drop the oldest VMs that are gone, once they are too many."""
        gone = self.integrity.gone
        if len(gone) <= self._gone_limit:
            return
        oldest = tuple(islice(gone, len(gone) - self._gone_limit))
        self.integrity.forget(oldest)
        for vm in oldest:
            self._detector.forget(vm)
            if not self._detector.convicted(vm):
                self.names.forget(vm)
