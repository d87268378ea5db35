# SPDX-License-Identifier: MIT
"""Plan, layout and program text on the BTF of three Debian kernels."""

from __future__ import annotations

import dataclasses
import json
import lzma
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmprobe.capture.layout import MEMBERS, read_layout
from kvmprobe.capture.plan import Attachment, Method, Plan, make_plan
from kvmprobe.capture.points import FUNCTIONS, TRACEPOINTS
from kvmprobe.capture.source import Options, program_text
from kvmprobe.errors import BtfError, HostError
from kvmprobe.host.btf import KernelBtf, Member, Parameter, Prototype
from kvmprobe.host.symbols import Symbols
from kvmprobe.probes.schema import Site, Type
from kvmprobe.store.format import check_header, new_header

DATA = Path(__file__).parents[1] / "data" / "btf"
KERNELS = ("6.1", "6.12", "7.2")
ROLES = [point.role for point in FUNCTIONS]
FAULTIN = {"6.1": "kvm_faultin_pfn", "6.12": "kvm_faultin_pfn", "7.2": "kvm_mmu_faultin_pfn"}
NOSLOT = {
    "6.1": "handle_abnormal_pfn",
    "6.12": "kvm_handle_noslot_fault",
    "7.2": "kvm_handle_noslot_fault",
}
NO_FUNCTIONS: dict[Method, str | None] = {"kprobe": "no kprobes here", "fentry": "not allowed"}
KPROBES: dict[Method, str | None] = {"kprobe": None, "fentry": "not needed"}

# kernel.md's offsets, from struct kvm_vcpu where it is nested, kernel by kernel.
OFFSETS = {
    "OFF_VCPU_KVM": (0, 0, 0),
    "OFF_VCPU_ID": (36, 36, 36),
    "OFF_VCPU_GUEST_MODE": (5352 + 1088, 5280 + 1088, 5520 + 1088),
    "OFF_VCPU_MMU": (296 + 376, 296 + 376, 296 + 376),
    "OFF_VCPU_GUEST_MMU": (296 + 768, 296 + 760, 296 + 752),
    "OFF_VCPU_NESTED_MMU": (296 + 1152, 296 + 1136, 296 + 1120),
    "OFF_VCPU_WALK_MMU": (296 + 1536, 296 + 1512, 296 + 1488),
    "OFF_VCPU_MMIO_CACHE": (296 + 2840, 296 + 2688, 296 + 2832),
    "OFF_MMU_ROOT_ROLE": (80, 72, 80),
    "OFF_KVM_MEMSLOTS": (4376, 4376, 4360),
    "OFF_MEMSLOTS_GENERATION": (0, 0, 0),
    "OFF_MEMSLOTS_GFN_TREE": (32, 32, 32),
    "OFF_MEMSLOTS_ID_HASH": (40, 40, 40),
    "OFF_MEMSLOTS_NODE_IDX": (1064, 1064, 1064),
    "OFF_SLOT_BASE_GFN": (176, 176, 176),
    "OFF_SLOT_NPAGES": (184, 184, 184),
    "OFF_SLOT_FLAGS": (256, 256, 256),
    "OFF_SLOT_ID": (260, 260, 260),
    "OFF_SLOT_GFN_NODE": (128, 128, 128),
    "OFF_SLOT_ID_NODE": (0, 0, 0),
    "OFF_FAULT_GFN": (24, 32, 32),
    "OFF_FAULT_SLOT": (32, 40, 40),
    "OFF_FAULT_PFN": (48, 56, 56),
    "SIZE_GFN_NODE": (24, 24, 24),
    "SIZE_ID_NODE": (16, 16, 16),
    "ADDRESS_SPACES": (2, 2, 2),
}


@dataclass(frozen=True)
class Kernel:
    version: str
    btf: KernelBtf

    def symbols(self, *without: str, extra: Iterable[str] = ()) -> Symbols:
        """All functions of the points that are in this BTF but some, and others."""
        names = {n for p in FUNCTIONS for n in p.functions if self.btf.function(n)} - {*without}
        return Symbols(f"0000000000000000 t {name}\t[kvm]" for name in [*sorted(names), *extra])

    def plan(
        self,
        methods: Mapping[Method, str | None] = KPROBES,
        refused: Mapping[str, str] | None = None,
    ) -> Plan:
        return make_plan(self.btf, self.symbols(), methods, refused)


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    version = request.param
    directory = tmp_path_factory.mktemp(f"btf-{version}")
    for packed in (DATA / version).glob("*.xz"):
        (directory / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    return Kernel(version, KernelBtf.live(directory))


class Changed(KernelBtf):
    """A kernel's BTF with some answers changed."""

    def __init__(
        self,
        btf: KernelBtf,
        *,
        functions: Mapping[str, Prototype | None] | None = None,
        tracepoints: Mapping[str, Prototype | None] | None = None,
        without: tuple[str, str] | None = None,
        moved: tuple[str, str] | None = None,
    ) -> None:
        self._btf = btf
        self._functions = functions or {}
        self._tracepoints = tracepoints or {}
        self._without = without
        self._moved = moved

    def function(self, name: str) -> Prototype | None:
        return self._functions[name] if name in self._functions else self._btf.function(name)

    def tracepoint(self, name: str) -> Prototype | None:
        return self._tracepoints[name] if name in self._tracepoints else self._btf.tracepoint(name)

    def member(self, struct: str, path: str) -> Member:
        if (struct, path) == self._without:
            # What a kernel without it answers.
            return self._btf.member(struct, path + "_of_another_kernel")
        found = self._btf.member(struct, path)
        return found._replace(offset=found.offset + 8) if (struct, path) == self._moved else found


def of(plan: Plan, name: str) -> Attachment:
    """What became of a role or tracepoint."""
    (found,) = [a for a in plan.attachments if name in (getattr(a.point, "role", ""), a.target)]
    return found


def test_functions_are_chosen_by_role(kernel: Kernel) -> None:
    plan = kernel.plan()
    chosen = {a.point.role: a for a in map(plan.function, ROLES) if a}  # type: ignore[union-attr]
    assert {role: a.target for role, a in chosen.items()} == {
        "fault": "kvm_mmu_page_fault",
        "faultin": FAULTIN[kernel.version],
        "noslot": NOSLOT[kernel.version],
        "commit_memslot": "kvm_arch_commit_memory_region",
        "memslots_updated": "kvm_arch_memslots_updated",
        "vcpu_destroy": "kvm_arch_vcpu_destroy",
        "vm_destroy": "kvm_destroy_vm",
    }
    assert {a.method for a in chosen.values()} == {"kprobe"}
    assert chosen["faultin"].arguments == (2 if kernel.version == "6.1" else 3)
    assert not of(plan, "kvm_page_fault").attached
    assert "function probe sees more" in of(plan, "kvm_mmu_spte_requested").reason


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ({"kprobe": None, "fentry": None}, "kprobe"),
        ({"kprobe": "no kprobes here", "fentry": None}, "fentry"),
        ({"kprobe": None, "fentry": "not allowed"}, "kprobe"),
    ],
)
def test_kprobe_goes_before_fentry(
    kernel: Kernel, methods: dict[Method, str | None], expected: str
) -> None:
    plan = kernel.plan(methods)
    assert {a.method for a in map(plan.function, ROLES) if a} == {expected}
    assert sum(a.attached for a in plan.attachments) == len(FUNCTIONS) + len(TRACEPOINTS) - 2


def test_without_function_probes_tracepoints_see_the_rest(kernel: Kernel) -> None:
    plan = kernel.plan(NO_FUNCTIONS)
    assert [plan.function(role) for role in ROLES] == [None] * len(ROLES)
    assert [a.target for a in plan.active()] == [point.name for point in TRACEPOINTS]
    assert {a.method for a in plan.active()} == {"raw_tracepoint"}
    for role in ROLES:
        reason = of(plan, role).reason
        assert "kprobe: no kprobes here" in reason
        assert "fentry: not allowed" in reason


@pytest.mark.parametrize("methods", [KPROBES, NO_FUNCTIONS], ids=["kprobes", "tracepoints"])
def test_every_observation_has_an_attachment(
    kernel: Kernel, methods: dict[Method, str | None]
) -> None:
    # LOSS is made by the drain.
    assert kernel.plan(methods).observations() == set(Type) - {Type.LOSS}


def test_every_point_of_every_site_is_known() -> None:
    sites = {site for point in (*FUNCTIONS, *TRACEPOINTS) for _, site in point.sees}
    assert sites == set(Site) - {Site.DRAIN, Site.NESTED_TP}


@pytest.mark.parametrize("suffix", ["isra.0", "constprop.0", "part.0"])
def test_a_function_of_which_only_a_variant_exists(kernel: Kernel, suffix: str) -> None:
    target = FAULTIN[kernel.version]
    symbols = kernel.symbols(target, extra=[f"{target}.{suffix}", "kvm_mmu_page_fault.cold"])
    plan = make_plan(kernel.btf, symbols, KPROBES)
    assert plan.function("faultin") is None
    assert f"{target}: only as {target}.{suffix}" in of(plan, "faultin").reason
    # Its observation is made by the tracepoint then; .cold is no variant.
    assert of(plan, "kvm_mmu_spte_requested").attached
    assert plan.function("fault") is not None


def test_a_function_that_is_not_there(kernel: Kernel) -> None:
    plan = make_plan(kernel.btf, kernel.symbols("kvm_mmu_page_fault"), KPROBES)
    assert of(plan, "fault").reason == "kvm_mmu_page_fault: inlined or not in this kernel"
    assert of(plan, "kvm_page_fault").attached
    assert Type.FAULT in plan.observations()


def test_a_function_without_btf(kernel: Kernel) -> None:
    btf = Changed(kernel.btf, functions={"kvm_destroy_vm": None})
    plan = make_plan(btf, kernel.symbols(), KPROBES)
    assert of(plan, "vm_destroy").reason == "kvm_destroy_vm: not in BTF"


@pytest.mark.parametrize(
    "types",
    [
        ["struct kvm *", "gfn_t", "bool"],  # as kernels before 5.17 had it
        ["struct kvm_vcpu *"],
        [],
    ],
)
def test_another_prototype_is_another_function(kernel: Kernel, types: list[str]) -> None:
    target = FAULTIN[kernel.version]
    wrong = Prototype(target, "int", tuple(Parameter("", t) for t in types), "kvm")
    plan = make_plan(Changed(kernel.btf, functions={target: wrong}), kernel.symbols(), KPROBES)
    assert plan.function("faultin") is None
    assert f"{target}: another prototype ({', '.join(types)})" in of(plan, "faultin").reason
    assert of(plan, "kvm_mmu_spte_requested").attached


def test_the_older_name_is_taken_where_the_newer_is_something_else(kernel: Kernel) -> None:
    fits = kernel.btf.function(FAULTIN[kernel.version])
    assert fits is not None
    other = Prototype("kvm_mmu_faultin_pfn", "int", (Parameter("", "int"),), "kvm")
    btf = Changed(kernel.btf, functions={"kvm_mmu_faultin_pfn": other, "kvm_faultin_pfn": fits})
    names = ["kvm_mmu_faultin_pfn", "kvm_faultin_pfn"]
    plan = make_plan(btf, kernel.symbols(*names, extra=names), KPROBES)
    assert of(plan, "faultin").target == "kvm_faultin_pfn"


def test_refused_targets_are_planned_anew(kernel: Kernel) -> None:
    why = "refused: it is on the kernel's blacklist"
    plan = kernel.plan(refused={"kvm_mmu_page_fault": why, "check_mmio_spte": why})
    assert of(plan, "fault").reason == f"kvm_mmu_page_fault: {why}"
    assert of(plan, "check_mmio_spte").reason == why
    assert of(plan, "kvm_page_fault").attached
    assert plan.observations() == set(Type) - {Type.LOSS}


def test_another_tracepoint_prototype_is_not_used(kernel: Kernel) -> None:
    old = Prototype(  # as v5.15 had it
        "kvm_page_fault", "void", (Parameter("", "unsigned long"), Parameter("", "u32")), "kvm"
    )
    btf = Changed(kernel.btf, tracepoints={"kvm_page_fault": old, "kvm_entry": None})
    plan = make_plan(btf, kernel.symbols(), NO_FUNCTIONS)
    assert of(plan, "kvm_page_fault").reason == "another prototype (unsigned long, u32)"
    assert of(plan, "kvm_entry").reason == "no such tracepoint in BTF"
    assert Type.FAULT not in plan.observations()


@pytest.mark.parametrize("missing", ["kvm_emulate_insn", "kvm_mmio"])
def test_nothing_works_without_the_first_tracepoints(kernel: Kernel, missing: str) -> None:
    with pytest.raises(HostError, match=f"{missing}: no such tracepoint in BTF") as error:
        make_plan(Changed(kernel.btf, tracepoints={missing: None}), kernel.symbols(), KPROBES)
    assert "\n" not in str(error.value)
    refused = {missing: "refused: Operation not permitted"}
    with pytest.raises(HostError, match="Operation not permitted"):
        kernel.plan(refused=refused)


@pytest.mark.parametrize("methods", [KPROBES, NO_FUNCTIONS], ids=["kprobes", "tracepoints"])
def test_rows_are_fit_for_a_captures_header(
    kernel: Kernel, methods: dict[Method, str | None]
) -> None:
    plan = kernel.plan(methods)
    rows = plan.rows()
    header = {**new_header("live"), "plan": rows, "layout": read_layout(kernel.btf).values}
    check_header(header)
    assert json.loads(json.dumps(header)) == header
    assert [Type[r["observation"]] for r in rows] == sorted(Type[r["observation"]] for r in rows)
    for row in rows:
        assert Site[row["site"]]
        method, _, target = row["attachment"].partition(":")
        assert (method != "none") == row["attached"] == (row["reason"] == "")
        assert re.fullmatch(r"[a-z_]+", target)
    seen = sum(len(a.point.sees) for a in plan.attachments)
    assert len(rows) == seen
    assert {Type[r["observation"]] for r in rows if r["attached"]} == plan.observations()


def test_layout_is_what_is_known_of_these_kernels(kernel: Kernel) -> None:
    values = read_layout(kernel.btf).values
    column = KERNELS.index(kernel.version)
    assert {name: values[name] for name in OFFSETS} == {n: v[column] for n, v in OFFSETS.items()}
    assert values["OFF_RB_LEFT"] == 16
    assert values["OFF_RB_RIGHT"] == 8


@pytest.mark.parametrize(
    ("struct", "path"), sorted({*MEMBERS.values(), ("kvm_vcpu", "arch.mmio_gen")})
)
def test_a_missing_member_is_named(kernel: Kernel, struct: str, path: str) -> None:
    with pytest.raises(BtfError, match=rf"struct {struct} has no member {path}"):
        read_layout(Changed(kernel.btf, without=(struct, path)))


@pytest.mark.parametrize(
    ("struct", "path"),
    [
        ("kvm_vcpu", "arch.mmio_access"),
        ("kvm_vcpu", "arch.mmio_gfn"),
        ("kvm_vcpu", "arch.mmio_gen"),
        ("kvm_memory_slot", "npages"),
        ("kvm_memory_slot", "as_id"),
    ],
)
def test_neighbours_that_lie_apart_are_refused(kernel: Kernel, struct: str, path: str) -> None:
    with pytest.raises(BtfError, match=rf"struct {struct}: {path} is not \d+ bytes after") as error:
        read_layout(Changed(kernel.btf, moved=(struct, path)))
    assert "\n" not in str(error.value)


OPTIONS = Options(64 * 4096, 8 * 4096, watch=False, flight=True)


def definitions(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#define (\w+) (\S+)$", text, re.MULTILINE))


def test_program_text_defines_what_the_plan_needs(kernel: Kernel) -> None:
    layout = read_layout(kernel.btf)
    defined = definitions(program_text(layout, kernel.plan(), OPTIONS))
    assert {name: defined[name] for name in layout.values} == {
        name: str(value) for name, value in layout.values.items()
    }
    assert (defined["RING_PAGES"], defined["RING_RECORDS"]) == ("64", "4096")
    assert (defined["RESERVE_PAGES"], defined["RESERVE_RECORDS"]) == ("8", "512")
    assert (defined["WATCH"], defined["FLIGHT"]) == ("0", "1")
    assert defined["NOSLOT_IS_HANDLE_ABNORMAL_PFN"] == str(int(kernel.version == "6.1"))
    assert defined["FAULTIN_ARGS"] == ("2" if kernel.version == "6.1" else "3")


def test_program_text_holds_no_more_than_is_attached(kernel: Kernel) -> None:
    layout = read_layout(kernel.btf)
    optional = ("WITH_KPROBE", "WITH_FENTRY", "WITH_PAGE_FAULT_TP", "WITH_SPTE_REQUESTED")

    def options(plan: Plan) -> list[str]:
        text = program_text(layout, plan, OPTIONS)
        return [name for name in optional if re.search(rf"^#define {name}$", text, re.MULTILINE)]

    assert options(kernel.plan()) == ["WITH_KPROBE"]
    assert options(kernel.plan({"kprobe": "no", "fentry": None})) == ["WITH_FENTRY"]
    assert options(kernel.plan(NO_FUNCTIONS)) == ["WITH_PAGE_FAULT_TP", "WITH_SPTE_REQUESTED"]


def test_fentry_programs_are_named_after_their_targets(kernel: Kernel) -> None:
    plan = kernel.plan({"kprobe": "no", "fentry": None})
    defined = definitions(program_text(read_layout(kernel.btf), plan, OPTIONS, "kvm__"))
    assert defined["FENTRY_FAULTIN"] == f"kfunc__kvm__{FAULTIN[kernel.version]}"
    assert defined["FEXIT_NOSLOT"] == f"kretfunc__kvm__{NOSLOT[kernel.version]}"
    names = [value for name, value in defined.items() if re.match("FENTRY_|FEXIT_", name)]
    assert len(set(names)) == 2 * len(FUNCTIONS)


def test_every_offset_of_the_layout_is_used_and_every_one_used_is_in_it(kernel: Kernel) -> None:
    layout = read_layout(kernel.btf)
    text = program_text(dataclasses.replace(layout, values={}), kernel.plan(), OPTIONS)
    used = set(re.findall(r"\b(?:OFF_\w+|SIZE_\w+|ADDRESS_SPACES)\b", text))
    assert used == set(layout.values)
