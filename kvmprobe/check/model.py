# SPDX-License-Identifier: MIT
"""From what was seen of a host to OK, WARNING, CRITICAL or UNKNOWN."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from kvmprobe.analysis.words import INCONCLUSIVE, VERDICTS, VULNERABLE
from kvmprobe.host.exposure import Exposure

#: What is said of a fault that the host's configuration rules out.
UNREACHABLE = "unreachable"
WORDS = (*VERDICTS, UNREACHABLE)
#: VMs and findings that the line names at most; --json has all.
_NAMED = 3
_NAME_LENGTH = 40


class Code(IntEnum):
    """Exit status of a monitoring plugin."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True)
class Found:
    """What rules of a fault found on one VM.  `ignored`: the reason of a watch's [[ignore]]."""

    rules: tuple[str, ...]
    severity: str
    fault: str
    vm: str
    count: int
    ignored: str | None = None


@dataclass(frozen=True)
class VmSeen:
    """A VM that was watched: its verdict on each fault, and why it is not known, if it isn't."""

    label: str
    verdicts: Mapping[str, str]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What is known of a host, wherever from.

    `verdicts` are the host's by fault, `missing` what keeps them from being known.  `unreachable`
    has the faults that the configuration rules out, with the proof.  `error` says why nothing could
    be observed.  `vms` counts also VMs that are not in `each`.
    """

    source: Literal["live", "watch", "capture"]
    seconds: float = 0.0
    vms: int = 0
    events: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    found: Sequence[Found] = ()
    verdicts: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    each: Sequence[VmSeen] = ()
    unreachable: Mapping[str, str] = field(default_factory=dict)
    attached: Sequence[tuple[str, str, bool]] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """The answer: its code, the sentence behind it, and the VMs of which nothing is known."""

    code: Code
    text: str
    verdicts: Mapping[str, str]
    unknown_vms: tuple[VmSeen, ...]


def vm_label(name: str | None, pid: int | None) -> str:
    """A VM's name for the one line; the name is printable already."""
    short = (name or "VM").replace("|", "/")
    short = short if len(short) <= _NAME_LENGTH else short[: _NAME_LENGTH - 1] + "…"
    return f"{short} (pid {pid})" if pid is not None else short


def unreachable_by(configured: Iterable[Exposure]) -> dict[str, str]:
    """The faults that a host's configuration rules out, with the proof."""
    return {e.fault: e.reason for e in configured if e.word == "unreachable"}


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts without their repetitions."""
    return tuple(dict.fromkeys(texts))


def conclude(seen: Seen) -> Result:
    """Say what a host's state is: a finding outranks a loss, and a loss outranks silence."""
    verdicts = {
        fault: UNREACHABLE if fault in seen.unreachable and verdict != VULNERABLE else verdict
        for fault, verdict in seen.verdicts.items()
    }
    unknown = tuple(
        vm for vm in seen.each if any(_open(fault, v, seen) for fault, v in vm.verdicts.items())
    )
    found = [f for f in seen.found if f.ignored is None]
    accepted = {f.fault for f in seen.found} - {f.fault for f in found}
    code, sentences = Code.OK, []
    for severity, level in (("critical", Code.CRITICAL), ("warning", Code.WARNING)):
        if some := [f for f in found if f.severity == severity]:
            # The worst is told in full, the rest by its number.
            if code:
                sentences.append(f"{len(some)} {severity} findings more")
            else:
                code = level
                sentences.append(_list([_finding(f) for f in some]))
    proven = [f for f, v in verdicts.items() if v == VULNERABLE and f not in accepted]
    if proven:
        code = code or Code.WARNING
        sentences.append(f"vulnerable: {', '.join(proven)}")
    problem = _problem(seen, unknown)
    if problem is not None:
        code = code or Code.UNKNOWN
        sentences.append(problem)
    sentences += _rest(verdicts, seen, proven, unknown)
    return Result(code, "; ".join([*sentences, *seen.notes]), verdicts, unknown)


def _open(fault: str, verdict: str, seen: Seen) -> bool:
    """Whether a verdict is not known and matters: the rules of the others are not active."""
    return verdict == INCONCLUSIVE and fault not in seen.unreachable


def _problem(seen: Seen, unknown: Sequence[VmSeen]) -> str | None:
    """Say what is not known, and of which VMs."""
    if seen.error is not None:
        return f"could not run: {seen.error}"
    if unknown and len(unknown) < seen.vms:
        return "not known: " + _list([f"{vm.label}: {_list(vm.missing)}" for vm in unknown])
    if unknown:
        names = _list([vm.label for vm in unknown])
        return f"not known of any VM: {_list(unknown[0].missing)}: {names}"
    if not seen.each and any(_open(fault, v, seen) for fault, v in seen.verdicts.items()):
        return f"not known: {_list(seen.missing)}"
    return None


def _rest(
    verdicts: Mapping[str, str], seen: Seen, proven: Sequence[str], unknown: Sequence[VmSeen]
) -> Iterator[str]:
    """Say what else there is: the other faults' verdicts, and what they rest on."""
    if seen.error is not None:
        return
    # Where only some VMs are not known, the others' verdict is what the faults have there.
    others = {
        fault: next(
            (
                vm.verdicts[fault]
                for vm in seen.each
                if vm not in unknown and vm.verdicts.get(fault) != VULNERABLE
            ),
            verdict,
        )
        if verdict == INCONCLUSIVE
        else verdict
        for fault, verdict in verdicts.items()
        if fault not in proven
    }
    words: dict[str, list[str]] = {}
    for fault, verdict in others.items():
        if not (verdict == INCONCLUSIVE and len(unknown) >= seen.vms):
            words.setdefault(verdict, []).append(fault)
    for word in WORDS:
        if word in words:
            yield f"{word}: {', '.join(words[word])}"
    yield f"watched {seen.seconds:.1f} s, {seen.vms} VM{'' if seen.vms == 1 else 's'}"


def _finding(found: Found) -> str:
    times = "once" if found.count == 1 else f"{found.count} times"
    return f"{' and '.join(found.rules)} on {found.vm} {times}"


def _list(items: Sequence[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")
