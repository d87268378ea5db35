# SPDX-License-Identifier: MIT
"""The BTF reader on hand-built BTF: every kind, and everything that can be wrong with it."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmprobe.errors import BtfError
from kvmprobe.host.btf import Btf, KernelBtf, Member, Parameter, Prototype
from kvmprobe.host.btf_types import Kind

HEADER = struct.Struct("<HBBIIIII")
SIGNED = 1 << 31
CHAR, INT, UNSIGNED, LONG, VOID = 1, 2, 3, 4, 0


class Builder:
    """Writes BTF; `add` gives the new type's id.  Without `base`, ids 1 to 4 are C's integers."""

    def __init__(self, base: "Builder | None" = None) -> None:
        self.types = b""
        self.strings = b"" if base else b"\0"
        self.first_string = base.next_string if base else 0
        self.next_id: int = base.next_id if base else 1
        if base is None:
            for name, size in (("char", 1), ("int", 4), ("unsigned int", 4), ("u64", 8)):
                self.add(Kind.INT, name, size, struct.pack("<I", size * 8))

    @property
    def next_string(self) -> int:
        return self.first_string + len(self.strings)

    def string(self, text: str) -> int:
        if not text:
            return 0
        at = self.next_string
        self.strings += text.encode() + b"\0"
        return at

    def add(
        self, kind: int, name: str, ref: int, extra: bytes = b"", vlen: int = 0, flag: int = 0
    ) -> int:
        self.types += struct.pack("<III", self.string(name), flag | kind << 24 | vlen, ref) + extra
        self.next_id += 1
        return self.next_id - 1

    def struct(
        self,
        name: str,
        size: int,
        *members: tuple[str, int, int],
        flag: int = 0,
        kind: int = Kind.STRUCT,
    ) -> int:
        extra = b"".join(struct.pack("<III", self.string(n), t, o) for n, t, o in members)
        return self.add(kind, name, size, extra, len(members), flag)

    def function(self, name: str, returns: int, *parameters: tuple[str, int]) -> int:
        extra = b"".join(struct.pack("<II", self.string(n), t) for n, t in parameters)
        proto = self.add(Kind.FUNC_PROTO, "", returns, extra, len(parameters))
        return self.add(Kind.FUNC, name, proto) if name else proto

    def array(self, element: int, count: int) -> int:
        return self.add(Kind.ARRAY, "", 0, struct.pack("<III", element, INT, count))

    def build(self) -> bytes:
        header = HEADER.pack(
            0xEB9F, 1, 0, HEADER.size, 0, len(self.types), len(self.types), len(self.strings)
        )
        return header + self.types + self.strings

    def parse(self, base: Btf | None = None, name: str = "BTF") -> Btf:
        return Btf.parse(self.build(), base, name)


def rendered(build: Callable[[Builder], int]) -> str:
    """How a parameter of the type that `build` adds reads."""
    b = Builder()
    b.function("f", VOID, ("p", build(b)))
    found = b.parse().function("f")
    assert found is not None
    return found.parameters[0].type


def test_members_through_anonymous_members_and_typedefs() -> None:
    b = Builder()
    inner = b.struct("inner", 16, ("a", LONG, 0), ("b", INT, 64))
    alias = b.add(Kind.TYPEDEF, "inner_t", b.add(Kind.CONST, "", inner))
    union = b.struct("", 8, ("x", LONG, 0), ("y", INT, 32), kind=Kind.UNION)
    anonymous = b.struct("", 16, ("", union, 0), ("z", CHAR, 64))
    many = b.array(b.array(INT, 3), 2)
    pointer = b.add(Kind.PTR, "", inner)
    members = (("head", INT, 0), ("", anonymous, 64), ("in", alias, 192))
    b.struct("outer", 64, *members, ("many", many, 320), ("p", pointer, 0))
    btf = b.parse()
    assert btf.member("outer", "head") == Member(0, 4, 0, 0)
    assert btf.member("outer", "x") == Member(8, 8, 0, 0)
    assert btf.member("outer", "y") == Member(12, 4, 0, 0)
    assert btf.member("outer", "z") == Member(16, 1, 0, 0)
    assert btf.member("outer", "in") == Member(24, 16, 0, 0)
    assert btf.member("outer", "in.b") == Member(32, 4, 0, 0)
    assert btf.member("outer", "many") == Member(40, 24, 0, 0)
    assert btf.member("outer", "p") == Member(0, 8, 0, 0)
    assert btf.size("outer") == 64
    for path in ("", "w", "in.", ".in", "in.c", "p.a", "head.x", "many.x", "in.a.b"):
        assert not btf.has_member("outer", path)
        with pytest.raises(BtfError, match="has no member"):
            btf.member("outer", path)


def test_bit_fields_of_both_encodings() -> None:
    b = Builder()
    b.struct("new", 8, ("a", UNSIGNED, 3 << 24 | 5), ("b", UNSIGNED, 7 << 24 | 42), flag=SIGNED)
    old = b.add(Kind.INT, "unsigned int", 4, struct.pack("<I", 3 << 16 | 6))
    b.struct("old", 4, ("a", old, 8))
    btf = b.parse()
    assert btf.member("new", "a") == Member(0, 4, 5, 3)
    assert btf.member("new", "b") == Member(5, 4, 2, 7)
    assert btf.member("old", "a") == Member(1, 4, 3, 6)


def test_enumerators_keep_their_sign() -> None:
    def wide(*values: tuple[str, int]) -> bytes:
        return b"".join(
            struct.pack("<III", b.string(n), v & 0xFFFF_FFFF, v >> 32 & 0xFFFF_FFFF)
            for n, v in values
        )

    b = Builder()
    b.add(Kind.ENUM, "", 4, struct.pack("<Ii", b.string("E_A"), -5), 1, SIGNED)
    b.add(Kind.ENUM, "e", 4, struct.pack("<II", b.string("E_B"), 0xFFFF_FFFF), 1)
    b.add(Kind.ENUM64, "", 8, wide(("E_C", -1), ("E_D", -(1 << 63))), 2, SIGNED)
    b.add(Kind.ENUM64, "", 8, wide(("E_E", (1 << 64) - 2), ("F", 7)), 2)
    btf = b.parse()
    assert btf.enumerators("E_") == {
        "E_A": -5,
        "E_B": 0xFFFF_FFFF,
        "E_C": -1,
        "E_D": -(1 << 63),
        "E_E": (1 << 64) - 2,
    }
    assert btf.enumerator("F") == 7


def test_an_enumerator_with_two_values_is_refused() -> None:
    b = Builder()
    for value in (1, 1, 2):
        b.add(Kind.ENUM, "", 4, struct.pack("<II", b.string("X"), value), 1)
    b.add(Kind.ENUM, "", 4, struct.pack("<II", b.string("XY"), 3), 1)
    btf = b.parse()
    with pytest.raises(BtfError, match="X has 2 values"):
        btf.enumerator("X")
    assert btf.enumerators("X") == {"XY": 3}


def test_types_read_as_in_c() -> None:
    def pointer(b: Builder, to: int) -> int:
        return b.add(Kind.PTR, "", to)

    def const(b: Builder, of: int) -> int:
        return b.add(Kind.CONST, "", of)

    def named(b: Builder) -> int:
        return b.struct("kvm_vcpu", 8, ("a", LONG, 0))

    assert rendered(lambda b: LONG) == "u64"
    assert rendered(lambda b: pointer(b, named(b))) == "struct kvm_vcpu *"
    assert rendered(lambda b: pointer(b, const(b, CHAR))) == "const char *"
    assert rendered(lambda b: const(b, pointer(b, CHAR))) == "char *const"
    assert rendered(lambda b: pointer(b, const(b, pointer(b, CHAR)))) == "char *const *"
    assert rendered(lambda b: pointer(b, pointer(b, VOID))) == "void **"
    volatile = Kind.VOLATILE
    assert rendered(lambda b: pointer(b, const(b, b.add(volatile, "", INT)))) == (
        "const volatile int *"
    )
    assert rendered(lambda b: b.add(Kind.RESTRICT, "", pointer(b, VOID))) == "void *restrict"
    assert rendered(lambda b: pointer(b, b.add(Kind.TYPE_TAG, "user", VOID))) == "void *"
    assert rendered(lambda b: b.add(Kind.TYPEDEF, "gpa_t", LONG)) == "gpa_t"
    assert rendered(lambda b: b.add(Kind.ENUM, "mr", 4)) == "enum mr"
    assert rendered(lambda b: b.add(Kind.ENUM64, "", 8)) == "enum {...}"
    assert rendered(lambda b: b.add(Kind.FLOAT, "double", 8)) == "double"
    assert rendered(lambda b: pointer(b, b.add(Kind.FWD, "s", 0))) == "struct s *"
    assert rendered(lambda b: pointer(b, b.add(Kind.FWD, "u", 0, flag=SIGNED))) == "union u *"
    assert rendered(lambda b: b.array(b.array(INT, 3), 2)) == "int [2][3]"
    assert rendered(lambda b: pointer(b, b.array(INT, 3))) == "int (*)[3]"
    assert rendered(lambda b: pointer(b, b.function("", INT, ("x", LONG)))) == "int (*)(...)"


def test_prototypes_of_functions_and_tracepoints() -> None:
    b = Builder()
    data = b.add(Kind.PTR, "", VOID)
    b.function("f", INT, ("a", LONG), ("", VOID))
    b.add(
        Kind.TYPEDEF,
        "btf_trace_t",
        b.add(Kind.PTR, "", b.function("", VOID, ("", data), ("", INT))),
    )
    b.add(Kind.TYPEDEF, "btf_trace_bad", INT)
    b.add(Kind.TYPEDEF, "btf_trace_short", b.add(Kind.PTR, "", b.function("", VOID)))
    btf = b.parse(name="kvm")
    expected = (Parameter("a", "u64"), Parameter("", "..."))
    assert btf.function("f") == Prototype("f", "int", expected, "kvm")
    assert btf.tracepoint("t") == Prototype("t", "void", (Parameter("", "int"),), "kvm")
    assert btf.function("g") is None
    assert btf.tracepoint("f") is None
    with pytest.raises(BtfError, match=r"not a pointer \(byte \d+\)"):
        btf.tracepoint("bad")
    with pytest.raises(BtfError, match=r"does not take void \* first \(byte \d+\)"):
        btf.tracepoint("short")


def test_several_types_of_one_name_must_agree() -> None:
    b = Builder()
    b.function("same", INT, ("a", LONG))
    b.function("same", INT, ("a", LONG))
    b.function("other", INT, ("a", LONG))
    b.function("other", INT, ("a", INT))
    b.struct("s", 8, ("a", INT, 0), ("b", INT, 32))
    b.struct("s", 16, ("a", INT, 0), ("b", INT, 64))
    for _ in range(33):
        b.struct("crowd", 4, ("a", INT, 0))
    btf = b.parse()
    assert btf.function("same") is not None
    with pytest.raises(BtfError, match=r"2 different prototypes of other\(\)"):
        btf.function("other")
    assert btf.member("s", "a") == Member(0, 4, 0, 0)
    with pytest.raises(BtfError, match=r"2 different offsets of s\.b"):
        btf.member("s", "b")
    with pytest.raises(BtfError, match="2 different sizes of struct s"):
        btf.size("s")
    with pytest.raises(BtfError, match="33 types named crowd"):
        btf.member("crowd", "a")


def test_a_module_answers_before_vmlinux(tmp_path: Path) -> None:
    kernel = Builder()
    kernel.struct("kvm", 8, ("a", LONG, 0))
    kernel.struct("shared", 8, ("a", LONG, 0))
    kernel.function("f", INT)
    kernel.function("g", INT)
    module = Builder(kernel)
    shared = module.struct("shared", 16, ("b", LONG, 64))
    module.function("f", LONG, ("s", module.add(Kind.PTR, "", shared)))
    (tmp_path / "vmlinux").write_bytes(kernel.build())
    (tmp_path / "kvm").write_bytes(module.build())
    btf = KernelBtf.live(tmp_path)
    assert btf.names == ("kvm", "vmlinux")
    assert btf.member("shared", "b") == Member(8, 8, 0, 0)
    assert not btf.has_member("shared", "a")
    assert btf.size("kvm") == 8
    f, g = btf.function("f"), btf.function("g")
    assert f == Prototype("f", "u64", (Parameter("s", "struct shared *"),), "kvm")
    assert g == Prototype("g", "int", (), "vmlinux")
    assert Btf.load(tmp_path / "kvm", Btf.load(tmp_path / "vmlinux")).function("g") == g


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BtfError, match="CONFIG_DEBUG_INFO_BTF"):
        KernelBtf.live(tmp_path)
    with pytest.raises(BtfError, match="No such file"):
        Btf.load(tmp_path / "vmlinux")
    with pytest.raises(BtfError, match="Is a directory"):
        Btf.load(tmp_path)


def test_the_running_kernel() -> None:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel gives no BTF")
    btf = KernelBtf.live()
    assert btf.names[-1] == "vmlinux"
    assert btf.member("task_struct", "pid").size == 4
    schedule = btf.function("schedule")
    assert schedule == Prototype("schedule", "void", (), "vmlinux")


def header(**changes: int) -> bytes:
    """A header with some of its fields changed, in front of an otherwise good object."""
    names = ("magic", "version", "flags", "length", "type_off", "type_len", "str_off", "str_len")
    data = sample()
    values = dict(zip(names, HEADER.unpack_from(data), strict=True)) | changes
    return HEADER.pack(*values.values()) + data[HEADER.size :]


def sample() -> bytes:
    """A small object with every kind of type in it."""
    b = Builder()
    inner = b.struct("", 8, ("x", LONG, 0), kind=Kind.UNION)
    flags = b.struct("flags", 4, ("f", UNSIGNED, 3 << 24 | 5), flag=SIGNED)
    alias = b.add(Kind.TYPEDEF, "flags_t", b.add(Kind.VOLATILE, "", flags))
    outer = b.struct("outer", 32, ("", inner, 0), ("in", alias, 64), ("a", b.array(INT, 4), 128))
    pointer = b.add(Kind.PTR, "", b.add(Kind.CONST, "", outer))
    b.add(Kind.ENUM, "e", 4, struct.pack("<II", b.string("E_A"), 1), 1)
    b.add(Kind.ENUM64, "e64", 8, struct.pack("<III", b.string("E_B"), 1, 1), 1)
    b.function("f", INT, ("p", pointer), ("q", b.add(Kind.RESTRICT, "", pointer)))
    proto = b.function("", VOID, ("", b.add(Kind.PTR, "", VOID)), ("", pointer))
    b.add(Kind.TYPEDEF, "btf_trace_t", b.add(Kind.PTR, "", proto))
    b.add(Kind.FWD, "later", 0)
    b.add(Kind.FLOAT, "double", 8)
    variable = b.add(Kind.VAR, "v", INT, struct.pack("<I", 1))
    b.add(Kind.DATASEC, ".data", 4, struct.pack("<III", variable, 0, 4), 1)
    b.add(Kind.DECL_TAG, "tag", outer, struct.pack("<i", -1))
    b.add(Kind.TYPE_TAG, "user", INT)
    return b.build()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"too few for a header \(byte 0\)"),
        (b"\x9f\xeb\x01", r"too few for a header \(byte 3\)"),
        (header(magic=0x1234), r"magic is 0x1234, not 0xeb9f \(byte 0\)"),
        (header(magic=0x9FEB), r"big-endian \(byte 0\)"),
        (header(version=2), r"version 2 is unknown \(byte 2\)"),
        (header(length=8), r"header length 8 is impossible \(byte 4\)"),
        (header(length=1 << 31), r"is impossible \(byte 4\)"),
        (header(type_off=2), r"not aligned to 4 bytes \(byte 8\)"),
        (header(type_len=0xFFFF_FFFC), r"type section ends past the data \(byte 12\)"),
        (header(str_off=0xFFFF_FFFF), r"string section ends past the data \(byte 20\)"),
        (header(str_len=0xFFFF_FFFF), r"string section ends past the data \(byte 20\)"),
        (header(str_len=0), r"there are no strings \(byte 20\)"),
        (header(str_len=3), r"the last string has no end \(byte \d+\)"),
        (header(str_off=0), r"the first string is not empty"),
    ],
)  # fmt: skip
def test_a_wrong_header_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BtfError, match=message):
        Btf.parse(data)


def test_wrong_types_are_refused() -> None:
    b = Builder()
    at = HEADER.size + len(b.types)
    b.add(25, "unknown", 0)
    with pytest.raises(BtfError, match=rf"kind 25 is unknown \(byte {at + 4}\)"):
        b.parse()
    b = Builder()
    b.add(Kind.STRUCT, "s", 8, b"", 2)
    with pytest.raises(BtfError, match=rf"ends past the type section \(byte {at}\)"):
        b.parse()
    b = Builder()
    b.types += struct.pack("<III", 1 << 20, Kind.PTR << 24, VOID)
    with pytest.raises(BtfError, match=rf"name offset 1048576 is past the strings \(byte {at}\)"):
        b.parse()


def test_wrong_references_are_refused() -> None:
    b = Builder()
    b.struct("far", 8, ("a", 999, 0))
    b.struct("void", 8, ("a", VOID, 0))
    b.add(Kind.STRUCT, "nameless", 8, struct.pack("<III", 1 << 20, INT, 0), 1)
    b.struct("x" * 511, 8, ("a", INT, 0))
    b.struct("long", 8, ("y" * 512, INT, 0))
    loop = b.next_id
    b.add(Kind.TYPEDEF, "loop", loop + 1)
    b.add(Kind.CONST, "", loop)
    b.struct("typedefs", 8, ("a", loop, 0))
    b.add(Kind.PTR, "", b.next_id)
    b.function("pointers", b.next_id - 1)
    b.add(Kind.STRUCT, "members", 8, struct.pack("<III", 0, b.next_id, 0), 1)
    wide = b.array(INT, 0xFFFF_FFFF)
    for _ in range(70):
        wide = b.array(wide, 0xFFFF_FFFF)
    b.struct("arrays", 8, ("a", wide, 0))
    b.add(Kind.FUNC, "no_prototype", INT)
    b.function("section", b.add(Kind.DATASEC, ".data", 4))
    b.add(Kind.ENUM, "e", 4, struct.pack("<II", 1 << 20, 0), 1)
    btf = b.parse()
    assert btf.has_member("x" * 511, "a")
    for struct_name, message in (
        ("far", "type id 999 is out of range"),
        ("void", "must have a size has none"),
        ("nameless", "string offset 1048576 is out of range"),
        ("long", "more than 511 bytes"),
        ("typedefs", "form a cycle"),
        ("members", "members form a cycle or are too many"),
        ("arrays", "has none"),
    ):
        with pytest.raises(BtfError, match=rf"{message} \(byte \d+\)"):
            btf.member(struct_name, "a")
    for name, message in (
        ("pointers", "form a cycle"),
        ("no_prototype", "is not a function prototype"),
        ("section", "can't have this type"),
    ):
        with pytest.raises(BtfError, match=rf"{message} \(byte \d+\)"):
            btf.function(name)
    with pytest.raises(BtfError, match=r"string offset 1048576 is out of range \(byte \d+\)"):
        btf.enumerators("")


def test_anonymous_members_that_multiply_are_refused() -> None:
    b = Builder()
    inner = b.struct("", 8, ("a", INT, 0), ("b", INT, 0))
    for _ in range(40):
        inner = b.struct("", 8, ("", inner, 0), ("", inner, 0))
    b.struct("bomb", 8, ("", inner, 0))
    with pytest.raises(BtfError, match=r"too many \(byte \d+\)"):
        b.parse().member("bomb", "c")


@given(
    cut=st.integers(0, len(sample())),
    changes=st.lists(st.tuples(st.integers(0, len(sample()) - 1), st.integers(0, 255)), max_size=6),
    words=st.lists(
        st.tuples(st.integers(0, len(sample()) // 4 - 1), st.integers(0, 40)), max_size=4
    ),
)
@settings(max_examples=400, deadline=None)
def test_damaged_btf_gives_answers_or_errors(
    cut: int, changes: list[tuple[int, int]], words: list[tuple[int, int]]
) -> None:
    data = bytearray(sample())
    for at, value in changes:
        data[at] = value
    # Whole words too, so that the ids of types change for others that exist.
    for at, value in words:
        data[4 * at : 4 * at + 4] = value.to_bytes(4, "little")
    _ask_everything(bytes(data))
    _ask_everything(bytes(data[:cut]))


def _ask_everything(data: bytes) -> None:
    btf = _answer(lambda: Btf.parse(data))
    if not isinstance(btf, Btf):
        assert "(byte " in str(btf)
        return
    for answer, expected in (
        (_answer(lambda: btf.member("outer", "x")), Member),
        (_answer(lambda: btf.member("outer", "in.f")), Member),
        (_answer(lambda: btf.member("outer", "a")), Member),
        (_answer(lambda: btf.size("outer")), int),
        (_answer(lambda: btf.enumerators("")), dict),
        (_answer(lambda: btf.function("f")), Prototype | None),
        (_answer(lambda: btf.tracepoint("t")), Prototype | None),
    ):
        assert isinstance(answer, expected | BtfError)


def _answer(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except BtfError as error:
        return error
