# SPDX-License-Identifier: MIT
"""Which observation is made by which attachment on this kernel, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from kvmprobe.capture.points import FUNCTIONS, TRACEPOINTS, FunctionPoint, TracepointPoint
from kvmprobe.errors import HostError
from kvmprobe.host.btf import KernelBtf, Prototype
from kvmprobe.host.symbols import Symbols
from kvmprobe.probes.schema import Type

#: How a function is probed.
Method = Literal["kprobe", "fentry"]
METHODS: tuple[Method, ...] = ("kprobe", "fentry")
#: What a user may force: one method for functions, or no function at all.
BACKENDS = (*METHODS, "tracepoint")


class Row(TypedDict):
    """One line of the plan as a capture's header holds it."""

    observation: str
    site: str
    attachment: str
    attached: bool
    reason: str


@dataclass(frozen=True)
class Attachment:
    """A point with the decision about it: `method` and `target` when it is to be attached."""

    point: FunctionPoint | TracepointPoint
    method: Method | Literal["raw_tracepoint"] | None
    target: str
    reason: str
    arguments: int = 0

    @property
    def attached(self) -> bool:
        """Whether the session attaches it."""
        return self.method is not None


@dataclass(frozen=True)
class Plan:
    """All attachments of one recording."""

    attachments: tuple[Attachment, ...]

    def function(self, role: str) -> Attachment | None:
        """The attached function that plays a role."""
        for a in self.attachments:
            if isinstance(a.point, FunctionPoint) and a.point.role == role and a.attached:
                return a
        return None

    def active(self) -> tuple[Attachment, ...]:
        """What the session attaches, in order."""
        return tuple(a for a in self.attachments if a.attached)

    def observations(self) -> set[Type]:
        """What this plan can observe."""
        return {seen for a in self.active() for seen, _ in a.point.sees}

    def rows(self) -> list[Row]:
        """The plan for a capture's header and for --dry-run, by observation."""
        rows = [
            Row(
                observation=seen.name,
                site=site.name,
                attachment=f"{a.method or 'none'}:{a.target}",
                attached=a.attached,
                reason=a.reason,
            )
            for a in self.attachments
            for seen, site in a.point.sees
        ]
        return sorted(rows, key=lambda row: Type[row["observation"]])


def make_plan(
    btf: KernelBtf,
    symbols: Symbols,
    methods: Mapping[Method, str | None],
    refused: Mapping[str, str] | None = None,
) -> Plan:
    """Choose the attachments this kernel can give.

    Args:
        btf: the kernel's types; a point whose prototype is not the expected one is not used.
        symbols: the kernel's symbols; a function that is not one (inlined, renamed) is not used.
        methods: for each way to probe functions None when it works here, else why not.
        refused: targets that a trial showed can't be attached, with the reason.

    Raises:
        HostError: not even the tracepoints that everything rests on are there.

    """
    refused = refused or {}
    functions = [_choose_function(p, btf, symbols, methods, refused) for p in FUNCTIONS]
    played = {a.point.role for a in functions if isinstance(a.point, FunctionPoint) and a.attached}
    tracepoints = [_choose_tracepoint(p, btf, played, refused) for p in TRACEPOINTS]
    plan = Plan((*functions, *tracepoints))
    missing = {Type.EMULATE, Type.MMIO} - plan.observations()
    if missing:
        reasons = "; ".join(
            f"{a.target}: {a.reason}"
            for a in plan.attachments
            if not a.attached and missing & {seen for seen, _ in a.point.sees}
        )
        raise HostError(f"KVM's tracepoints can't be used: {reasons}")
    return plan


def _choose_function(
    point: FunctionPoint,
    btf: KernelBtf,
    symbols: Symbols,
    methods: Mapping[Method, str | None],
    refused: Mapping[str, str],
) -> Attachment:
    reasons = []
    for name in point.functions:
        prototype = btf.function(name)
        variants = [v for v in symbols.variants(name) if v != name]
        if not symbols.has(name):
            why = f"only as {variants[0]}" if variants else "inlined or not in this kernel"
            reasons.append(f"{name}: {why}")
        elif prototype is None:
            reasons.append(f"{name}: not in BTF")
        elif not _matches(prototype, point.signature):
            reasons.append(f"{name}: another prototype ({_parameters(prototype)})")
        elif name in refused:
            reasons.append(f"{name}: {refused[name]}")
        else:
            for method, problem in methods.items():
                if problem is None:
                    return Attachment(point, method, name, "", len(prototype.parameters))
                reasons.append(f"{method}: {problem}")
    return Attachment(point, None, point.functions[0], "; ".join(reasons))


def _choose_tracepoint(
    point: TracepointPoint, btf: KernelBtf, played: set[str], refused: Mapping[str, str]
) -> Attachment:
    prototype = btf.tracepoint(point.name)
    if point.instead_of in played:
        reason = "not needed: a function probe sees more"
    elif prototype is None:
        reason = "no such tracepoint in BTF"
    elif not _matches(prototype, point.signature):
        reason = f"another prototype ({_parameters(prototype)})"
    elif point.name in refused:
        reason = refused[point.name]
    else:
        return Attachment(point, "raw_tracepoint", point.name, "")
    return Attachment(point, None, point.name, reason)


def _matches(prototype: Prototype, signature: tuple[tuple[str, ...], ...]) -> bool:
    return len(prototype.parameters) >= len(signature) and all(
        parameter.type in types
        for parameter, types in zip(prototype.parameters, signature, strict=False)
    )


def _parameters(prototype: Prototype) -> str:
    return ", ".join(p.type for p in prototype.parameters)
