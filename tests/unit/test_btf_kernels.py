# SPDX-License-Identifier: MIT
"""The BTF reader against bpftool's answers and against known offsets, on three Debian kernels."""

import json
import lzma
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvmprobe.errors import BtfError
from kvmprobe.host.btf import Btf, KernelBtf, Member

DATA = Path(__file__).parents[1] / "data" / "btf"
NAMES = ("vmlinux", "kvm", "kvm_intel")
STRUCTS = (
    "kvm_vcpu",
    "kvm_vcpu_arch",
    "kvm_vcpu_stat",
    "kvm",
    "kvm_arch",
    "kvm_memslots",
    "kvm_memory_slot",
    "kvm_page_fault",
    "kvm_mmu",
    "kvm_run",
    "task_struct",
)

# Read in these kernels by other means (pahole, running systems), kernel by kernel.
KNOWN: dict[str, tuple[int, int, int]] = {
    "kvm_vcpu.kvm": (0, 0, 0),
    "kvm_vcpu.vcpu_id": (36, 36, 36),
    "kvm_vcpu.run": (104, 104, 96),
    "kvm_vcpu.arch": (296, 296, 296),
    "kvm_vcpu.stat": (5352, 5280, 5520),
    "kvm_vcpu_arch.hflags": (216, 216, 224),
    "kvm_vcpu_arch.mmu": (376, 376, 376),
    "kvm_vcpu_arch.root_mmu": (384, 384, 384),
    "kvm_vcpu_arch.guest_mmu": (768, 760, 752),
    "kvm_vcpu_arch.nested_mmu": (1152, 1136, 1120),
    "kvm_vcpu_arch.walk_mmu": (1536, 1512, 1488),
    "kvm_vcpu_arch.mmio_gva": (2840, 2688, 2832),
    "kvm_vcpu_arch.mmio_gfn": (2856, 2704, 2848),
    "kvm_vcpu_arch.mmio_gen": (2864, 2712, 2856),
    "kvm_vcpu_stat.guest_mode": (1088, 1088, 1088),
    "kvm_mmu.root_role": (80, 72, 80),
    "kvm.memslots": (4376, 4376, 4360),
    "kvm_memslots.generation": (0, 0, 0),
    "kvm_memslots.last_used_slot": (8, 8, 8),
    "kvm_memslots.hva_tree": (16, 16, 16),
    "kvm_memslots.gfn_tree": (32, 32, 32),
    "kvm_memslots.id_hash": (40, 40, 40),
    "kvm_memslots.node_idx": (1064, 1064, 1064),
    "kvm_memory_slot.id_node": (0, 0, 0),
    "kvm_memory_slot.hva_node": (32, 32, 32),
    "kvm_memory_slot.gfn_node": (128, 128, 128),
    "kvm_memory_slot.base_gfn": (176, 176, 176),
    "kvm_memory_slot.npages": (184, 184, 184),
    "kvm_memory_slot.userspace_addr": (248, 248, 248),
    "kvm_memory_slot.flags": (256, 256, 256),
    "kvm_memory_slot.id": (260, 260, 260),
    "kvm_memory_slot.as_id": (262, 262, 262),
    "kvm_page_fault.addr": (0, 0, 0),
    "kvm_page_fault.error_code": (8, 8, 8),
    "kvm_page_fault.prefetch": (12, 16, 16),
    "kvm_page_fault.exec": (13, 17, 17),
    "kvm_page_fault.write": (14, 18, 18),
    "kvm_page_fault.present": (15, 19, 19),
    "kvm_page_fault.rsvd": (16, 20, 20),
    "kvm_page_fault.user": (17, 21, 21),
    "kvm_page_fault.is_tdp": (18, 22, 22),
    "kvm_page_fault.gfn": (24, 32, 32),
    "kvm_page_fault.slot": (32, 40, 40),
    "kvm_page_fault.mmu_seq": (40, 48, 48),
    "kvm_page_fault.pfn": (48, 56, 56),
    "kvm_page_fault.map_writable": (64, 72, 72),
}
SIZES = {
    "kvm_page_fault": (72, 80, 80),
    "kvm_memslots": (1072, 1072, 1072),
    "kvm_memory_slot": (264, 280, 280),
}
KERNELS = ("6.1", "6.12", "7.2")


class Kernel(NamedTuple):
    column: int
    directory: Path
    btf: KernelBtf
    layers: dict[str, Btf]


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    version = request.param
    directory = tmp_path_factory.mktemp(f"btf-{version}")
    for name in NAMES:
        (directory / name).write_bytes(
            lzma.decompress((DATA / version / f"{name}.xz").read_bytes())
        )
    btf = KernelBtf.live(directory)
    return Kernel(KERNELS.index(version), directory, btf, {x.name: x for x in btf._layers})


class Oracle:
    """bpftool's raw dump of vmlinux and the modules, resolved in the plainest way."""

    def __init__(self, directory: Path) -> None:
        self.types: dict[str, dict[int, dict[str, Any]]] = {}
        base: dict[int, dict[str, Any]] = {}
        for name in NAMES:
            command = ["bpftool", "-j", "btf", "dump", "file", str(directory / name)]
            command += ["-B", str(directory / "vmlinux")] if name != "vmlinux" else []
            done = subprocess.run(
                [*command, "format", "raw"], check=True, stdout=subprocess.PIPE, timeout=60
            )
            own = {t["id"]: t for t in json.loads(done.stdout)["types"]}
            if name == "vmlinux":
                base = own
            else:
                own = {i: t for i, t in own.items() if i not in base}
            self.types[name] = own
        self.base = base

    def get(self, name: str, number: int) -> dict[str, Any]:
        found = self.types[name].get(number) or self.base.get(number)
        return found or {"kind": "VOID", "name": "void"}

    def named(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        return [
            t for t in self.types[name].values() if t["kind"] in kinds and t["name"] != "(anon)"
        ]

    def strip(self, name: str, number: int) -> dict[str, Any]:
        found = self.get(name, number)
        if found["kind"] in ("TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG"):
            return self.strip(name, found["type_id"])
        return found

    def size(self, name: str, number: int) -> int:
        found = self.strip(name, number)
        if found["kind"] == "PTR":
            return 8
        if found["kind"] == "ARRAY":
            return int(found["nr_elems"]) * self.size(name, found["type_id"])
        return int(found["size"])

    def members(
        self, name: str, found: dict[str, Any], bits: int = 0
    ) -> Iterator[tuple[str, Member]]:
        for member in found["members"]:
            at = bits + member["bits_offset"]
            if member["name"] == "(anon)":
                inner = self.strip(name, member["type_id"])
                if "members" in inner:
                    yield from self.members(name, inner, at)
                continue
            width = member.get("bitfield_size", 0)
            size = self.size(name, member["type_id"])
            yield member["name"], Member(at // 8, size, at % 8 if width else 0, width)

    def c(self, name: str, number: int) -> str | None:
        """The type in C where it is a base type, a pointer or const; None for the rest."""
        found = self.get(name, number)
        kind = found["kind"]
        if kind == "PTR":
            inner = self.c(name, found["type_id"])
            return inner and inner + ("*" if inner.endswith("*") else " *")
        if kind == "CONST":
            inner = self.c(name, found["type_id"])
            return None if inner is None or inner.endswith("*") else f"const {inner}"
        if kind in ("STRUCT", "UNION", "ENUM", "ENUM64") and found["name"] != "(anon)":
            return f"{kind.lower().removesuffix('64')} {found['name']}"
        if kind == "FWD":
            return f"{found['fwd_kind']} {found['name']}"
        if kind in ("INT", "FLOAT", "TYPEDEF", "VOID"):
            return str(found["name"])
        return None


@pytest.fixture(scope="module")
def oracle(kernel: Kernel) -> Oracle:
    if shutil.which("bpftool") is None:
        pytest.skip("bpftool is not installed")
    return Oracle(kernel.directory)


def test_known_offsets(kernel: Kernel) -> None:
    for name, offsets in KNOWN.items():
        struct, _, path = name.partition(".")
        assert kernel.btf.member(struct, path).offset == offsets[kernel.column], name
    for name, sizes in SIZES.items():
        assert kernel.btf.size(name) == sizes[kernel.column], name
    offset = kernel.btf.member("kvm_vcpu", "arch.mmio_gfn").offset
    assert offset == 296 + KNOWN["kvm_vcpu_arch.mmio_gfn"][kernel.column]


def test_known_enumerators(kernel: Kernel) -> None:
    names = ["CONTINUE", "RETRY", "EMULATE", "WRITE_PROTECTED", "INVALID", "FIXED", "SPURIOUS"]
    if kernel.column == 0:
        names.remove("WRITE_PROTECTED")
    expected = {f"RET_PF_{name}": value for value, name in enumerate(names)}
    assert kernel.btf.enumerators("RET_PF_") == expected
    assert kernel.btf.enumerator("RET_PF_EMULATE") == 2
    assert kernel.btf.enumerators("KVM_MR_") == {
        "KVM_MR_CREATE": 0,
        "KVM_MR_DELETE": 1,
        "KVM_MR_MOVE": 2,
        "KVM_MR_FLAGS_ONLY": 3,
    }


def test_known_prototypes(kernel: Kernel) -> None:
    fault = kernel.btf.function("kvm_mmu_page_fault")
    assert fault is not None
    assert fault.returns == "int"
    assert [p.type for p in fault.parameters] == [
        "struct kvm_vcpu *",
        "gpa_t",
        "u64",
        "void *",
        "int",
    ]
    assert fault.module == "kvm"
    onepage = kernel.btf.function("emulator_read_write_onepage")
    assert onepage is not None
    assert [p.name for p in onepage.parameters] == [
        "addr",
        "val",
        "bytes",
        "exception",
        "vcpu",
        "ops",
    ]
    assert onepage.parameters[5].type == "const struct read_write_emulator_ops *"
    ept = kernel.btf.function("handle_ept_violation")
    assert ept is not None
    assert ept.module == "kvm_intel"
    schedule = kernel.btf.function("schedule")
    assert schedule is not None
    assert schedule.module == "vmlinux"
    assert kernel.btf.function("handle_mmio_page_fault") is None
    # The same name means another function from 6.13 on: only the prototype tells.
    faultin = kernel.btf.function("kvm_faultin_pfn")
    assert (faultin is None) == (kernel.column == 2)
    noslot = ("handle_abnormal_pfn", "kvm_handle_noslot_fault", "kvm_handle_noslot_fault")
    assert kernel.btf.function(noslot[kernel.column]) is not None


def test_known_tracepoints(kernel: Kernel) -> None:
    def types(name: str) -> list[str]:
        found = kernel.btf.tracepoint(name)
        assert found is not None
        assert found.module == "kvm"
        return [p.type for p in found.parameters]

    assert types("kvm_entry") == ["struct kvm_vcpu *", "bool"]
    assert types("kvm_page_fault") == ["struct kvm_vcpu *", "u64", "u64"]
    assert types("kvm_mmio") == ["int", "int", "u64", "void *"]
    assert types("vcpu_match_mmio") == ["gva_t", "gpa_t", "bool", "bool"]
    assert types("mark_mmio_spte") == ["u64 *", "gfn_t", "u64"]
    assert len(types("kvm_nested_vmenter")) == 9
    assert kernel.btf.tracepoint("kvm_nested_vmrun") is None


def test_missing_names_are_named(kernel: Kernel) -> None:
    with pytest.raises(BtfError, match=r"struct kvm_vcpu has no member arch\.mmio_nothing"):
        kernel.btf.member("kvm_vcpu", "arch.mmio_nothing")
    with pytest.raises(BtfError, match="no struct kvm_nothing"):
        kernel.btf.member("kvm_nothing", "x")
    with pytest.raises(BtfError, match="no struct kvm_nothing"):
        kernel.btf.size("kvm_nothing")
    with pytest.raises(BtfError, match="no enumerator RET_PF_NOTHING"):
        kernel.btf.enumerator("RET_PF_NOTHING")
    assert kernel.btf.has_member("kvm_vcpu", "arch.mmio_gen")
    # A pointer is not followed.
    assert not kernel.btf.has_member("kvm_vcpu", "kvm.memslots")
    assert not kernel.btf.has_member("kvm_nothing", "x")


def test_every_member_agrees_with_bpftool(kernel: Kernel, oracle: Oracle) -> None:
    checked = 0
    for struct in STRUCTS:
        layer, found = next(
            (name, t)
            for name in ("kvm", "kvm_intel", "vmlinux")
            for t in oracle.named(name, "STRUCT")
            if t["name"] == struct
        )
        for path, expected in oracle.members(layer, found):
            assert kernel.btf.member(struct, path) == expected, f"{struct}.{path}"
            checked += 1
    arch = next(t for t in oracle.named("vmlinux", "STRUCT") if t["name"] == "kvm_vcpu_arch")
    for path, expected in oracle.members("vmlinux", arch):
        found_member = kernel.btf.member("kvm_vcpu", f"arch.{path}")
        assert found_member == expected._replace(offset=expected.offset + 296), path
    assert checked > 600


def test_every_module_struct_agrees_with_bpftool(kernel: Kernel, oracle: Oracle) -> None:
    for name in ("kvm", "kvm_intel"):
        layer = kernel.layers[name]
        for found in oracle.named(name, "STRUCT", "UNION"):
            assert layer.size(found["name"]) == found["size"]
            for path, expected in oracle.members(name, found):
                assert layer.member(found["name"], path) == expected, f"{found['name']}.{path}"


def test_bit_fields_agree_with_bpftool(kernel: Kernel, oracle: Oracle) -> None:
    structs = oracle.named("vmlinux", "STRUCT", "UNION")
    names = Counter(found["name"] for found in structs)
    fields = 0
    for found in structs[::40]:
        for path, expected in oracle.members("vmlinux", found):
            if names[found["name"]] == 1:
                answer = kernel.layers["vmlinux"].member(found["name"], path)
                assert answer == expected, f"{found['name']}.{path}"
                fields += expected.bit_size > 0
    assert fields > 20


def test_prototypes_agree_with_bpftool(kernel: Kernel, oracle: Oracle) -> None:
    compared = 0
    for name in NAMES:
        step = 20 if name == "vmlinux" else 1
        functions: dict[str, set[int]] = {}
        for found in oracle.named(name, "FUNC"):
            functions.setdefault(found["name"], set()).add(found["type_id"])
        for found in oracle.named(name, "FUNC")[::step]:
            if len(functions[found["name"]]) > 1:
                continue
            prototype = kernel.layers[name].function(found["name"])
            assert prototype is not None
            assert prototype.module == name
            raw = oracle.get(name, found["type_id"])
            names = ["" if p["name"] == "(anon)" else p["name"] for p in raw["params"]]
            assert [p.name for p in prototype.parameters] == names, found["name"]
            pairs = [(prototype.returns, raw["ret_type_id"])]
            pairs += zip(
                (p.type for p in prototype.parameters),
                (p["type_id"] for p in raw["params"]),
                strict=True,
            )
            for text, number in pairs:
                expected = oracle.c(name, number)
                if text == "...":
                    assert number == 0
                elif expected is not None:
                    assert text == expected, found["name"]
                    compared += 1
    assert compared > 5000


def test_tracepoints_agree_with_bpftool(kernel: Kernel, oracle: Oracle) -> None:
    seen = 0
    for name in NAMES:
        for found in oracle.named(name, "TYPEDEF"):
            event = found["name"].removeprefix("btf_trace_")
            if event == found["name"]:
                continue
            raw = oracle.get(name, oracle.get(name, found["type_id"])["type_id"])
            prototype = kernel.layers[name].tracepoint(event)
            assert prototype is not None
            assert len(prototype.parameters) == len(raw["params"]) - 1, event
            seen += event.startswith("kvm")
    assert seen > 60


def test_enumerators_agree_with_bpftool(kernel: Kernel, oracle: Oracle) -> None:
    for name in NAMES:
        expected: dict[str, set[int]] = {}
        for found in oracle.types[name].values():
            if found["kind"] in ("ENUM", "ENUM64"):
                # bpftool's JSON extends the sign of unsigned 32-bit values.
                narrow = found["kind"] == "ENUM" and found["encoding"] == "UNSIGNED"
                for value in found["values"]:
                    number = value["val"] & 0xFFFF_FFFF if narrow else value["val"]
                    expected.setdefault(value["name"], set()).add(number)
        answers = kernel.layers[name].enumerators("")
        for enumerator, values in expected.items():
            if len(values) == 1:
                assert answers[enumerator] == min(values)
            else:
                with pytest.raises(BtfError, match="values"):
                    kernel.layers[name].enumerator(enumerator)
