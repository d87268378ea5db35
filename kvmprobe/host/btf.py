# SPDX-License-Identifier: MIT
"""What BTF says: layouts, enumerators and prototypes of the running kernel or of a file.

`Btf` is one BTF object (split BTF with its base), `KernelBtf` the kernel and its KVM modules.
Both answer the same questions.  Layouts and prototypes are always asked here, never derived from a
kernel version.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from kvmprobe.errors import BtfError
from kvmprobe.host.btf_types import MAX_CHAIN, Kind, RawMember, Type, TypeTable

BTF_DIRECTORY = Path("/sys/kernel/btf")
KVM_MODULES = ("kvm", "kvm_intel", "kvm_amd")

# Far more members than a kernel struct has, and far more types of one name than there are, so that
# malformed BTF can't multiply them without bound.
_MAX_MEMBERS = 1 << 14
_MAX_SAME_NAME = 32

_QUALIFIERS = {Kind.CONST: "const", Kind.VOLATILE: "volatile", Kind.RESTRICT: "restrict"}
_TAGS = {Kind.STRUCT: "struct", Kind.UNION: "union", Kind.ENUM: "enum", Kind.ENUM64: "enum"}

_Answer = TypeVar("_Answer")


class Member(NamedTuple):
    """Where a member of a struct is."""

    offset: int
    """Bytes from the start of the struct (of a bit-field: of the byte its first bit is in)."""
    size: int
    """Bytes of the member's type."""
    bit_offset: int
    """Of a bit-field: its first bit in the byte at `offset`, 0 to 7; else 0."""
    bit_size: int
    """Of a bit-field: its width in bits; else 0."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: its name ("" where BTF has none) and its type in C ("..." for variable ones)."""

    name: str
    type: str


@dataclass(frozen=True)
class Prototype:
    """A function's or tracepoint's prototype.

    Types read as in C with typedef names kept: "u64", "struct kvm_vcpu *", "const char *".  Type
    tags (__user) are left out, and a pointer to a function is "int (*)(...)".
    """

    name: str
    returns: str
    parameters: tuple[Parameter, ...]
    module: str
    """The BTF object it is in: "vmlinux", or the module's name."""


class _Queries:
    """The questions; `_layers` are asked in order, the first that knows a name answers."""

    _layers: tuple["Btf", ...]

    def member(self, struct: str, path: str) -> Member:
        """Where a member of a struct or union is.

        `path` is dotted ("arch.mmio_gfn") and goes through anonymous members and typedefs; it does
        not follow pointers or index arrays.  Raises BtfError that names what is missing.
        """

        def answer(layer: Btf, number: int) -> Member | None:
            return layer._member(number, path)

        for layer in self._layers:
            numbers = layer._find(struct, (Kind.STRUCT, Kind.UNION))
            if numbers:
                found = _the_one(f"offsets of {struct}.{path}", layer, numbers, answer)
                if found is None:
                    raise BtfError(f"BTF of {layer.name}: struct {struct} has no member {path}")
                return found
        raise BtfError(f"BTF of {self._names()}: there is no struct {struct}")

    def has_member(self, struct: str, path: str) -> bool:
        """Whether the struct exists and has the member.

        Raises BtfError for malformed BTF.
        """
        for layer in self._layers:
            numbers = layer._find(struct, (Kind.STRUCT, Kind.UNION))
            if numbers:
                return any(layer._member(number, path) is not None for number in numbers)
        return False

    def size(self, struct: str) -> int:
        """Bytes of a struct or union.

        Raises BtfError if it does not exist.
        """

        def answer(layer: Btf, number: int) -> int:
            return layer._types.size(number, 0)

        for layer in self._layers:
            numbers = layer._find(struct, (Kind.STRUCT, Kind.UNION))
            if numbers:
                found = _the_one(f"sizes of struct {struct}", layer, numbers, answer)
                if found is not None:
                    return found
        raise BtfError(f"BTF of {self._names()}: there is no struct {struct}")

    def enumerator(self, name: str) -> int:
        """The value of an enumerator of any enum, signed where the enum is.

        Raises BtfError if it does not exist, or has several values in one BTF object.
        """
        for layer in self._layers:
            values = layer._types.enumerators.get(name)
            if values:
                if len(values) > 1:
                    raise BtfError(f"BTF of {layer.name}: {name} has {len(values)} values")
                return next(iter(values))
        raise BtfError(f"BTF of {self._names()}: there is no enumerator {name}")

    def enumerators(self, prefix: str) -> dict[str, int]:
        """All enumerators whose name starts with `prefix`, sorted by name.

        A name with several values in one BTF object is left out.
        """
        found: dict[str, set[int]] = {}
        for layer in self._layers:
            for name, values in layer._types.enumerators.items():
                if name.startswith(prefix):
                    found.setdefault(name, values)
        return {name: next(iter(v)) for name, v in sorted(found.items()) if len(v) == 1}

    def function(self, name: str) -> Prototype | None:
        """The prototype of a function, or None if BTF has no function of this name.

        Raises BtfError if one BTF object has several functions of this name and they differ.
        """

        def answer(layer: Btf, number: int) -> Prototype:
            found = layer._types.type(number, 0)
            return layer._prototype(name, found.ref, found.at)

        for layer in self._layers:
            numbers = layer._find(name, (Kind.FUNC,))
            if numbers:
                return _the_one(f"prototypes of {name}()", layer, numbers, answer)
        return None

    def tracepoint(self, name: str) -> Prototype | None:
        """The prototype of a raw tracepoint's arguments, or None if there is no such tracepoint.

        It comes from the typedef btf_trace_<name> (include/trace/bpf_probe.h), without its first
        parameter, `void *__data`, which is no argument of the event.
        """

        def answer(layer: Btf, number: int) -> Prototype:
            return layer._tracepoint(name, number)

        for layer in self._layers:
            numbers = layer._find(f"btf_trace_{name}", (Kind.TYPEDEF,))
            if numbers:
                return _the_one(f"prototypes of tracepoint {name}", layer, numbers, answer)
        return None

    def _names(self) -> str:
        return ", ".join(layer.name for layer in self._layers)


class Btf(_Queries):
    """One BTF object; split BTF also answers with what is in its base."""

    def __init__(self, types: TypeTable, base: "Btf | None") -> None:
        """See `parse` and `load`."""
        self._types = types
        self._layers = (self, *(base._layers if base else ()))
        self._flat: dict[int, dict[str, RawMember]] = {}

    @classmethod
    def parse(cls, data: bytes, base: "Btf | None" = None, name: str = "BTF") -> Self:
        """Parse a BTF object; `base` is the BTF that split BTF (a module's) continues.

        Raises BtfError naming the byte offset where the data is malformed.  Every question may
        raise it too: what is behind the types' heads is checked when it is read.
        """
        return cls(TypeTable.parse(data, base._types if base else None, name), base)

    @classmethod
    def load(cls, path: Path, base: "Btf | None" = None) -> Self:
        """Parse the BTF in a file.

        Raises BtfError if the file can't be read or is malformed.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BtfError(f"{path}: {error.strerror}") from error
        return cls.parse(data, base, path.name)

    @property
    def name(self) -> str:
        """The name of the BTF object, for messages: "vmlinux", the module's, or the file's."""
        return self._types.name

    def _find(self, name: str, kinds: Iterable[int]) -> list[int]:
        numbers = self._types.find(name, frozenset(kinds))
        if len(numbers) > _MAX_SAME_NAME:
            raise BtfError(f"BTF of {self.name}: there are {len(numbers)} types named {name}")
        return numbers

    def _member(self, number: int, path: str) -> Member | None:
        """The member at a dotted path in the struct with this type id; None if there is none."""
        types, at, bits, width = self._types, 0, 0, 0
        for part in path.split("."):
            found = types.strip(number, at)
            if found.kind not in (Kind.STRUCT, Kind.UNION):
                return None
            member = self._members(number, found).get(part) if part else None
            if member is None:
                return None
            number, at, width = member.type, member.at, member.bit_size
            bits += member.bit_offset
        last = types.strip(number, at)
        if last.kind == Kind.INT and not width:
            shift, wide = types.int_bits(last)
            if shift or wide != last.ref * 8:
                bits, width = bits + shift, wide
        return Member(bits >> 3, types.size(number, at), bits & 7 if width else 0, width)

    def _members(self, number: int, found: Type) -> dict[str, RawMember]:
        """The members of a struct by name, those of anonymous members included."""
        if number not in self._flat:
            flat: dict[str, RawMember] = {}
            self._flatten(found, 0, MAX_CHAIN, flat, _MAX_MEMBERS)
            self._flat[number] = flat
        return self._flat[number]

    def _flatten(
        self, found: Type, shift: int, depth: int, flat: dict[str, RawMember], budget: int
    ) -> int:
        """Add the members of `found`, which begins at bit `shift`; returns the budget left."""
        types = self._types
        for member in types.members(found):
            budget -= 1
            if not depth or budget < 0:
                raise types.error("members form a cycle or are too many", member.at)
            if member.name:
                flat.setdefault(member.name, member._replace(bit_offset=member.bit_offset + shift))
                continue
            inner = types.strip(member.type, member.at)
            if inner.kind in (Kind.STRUCT, Kind.UNION):
                budget = self._flatten(inner, shift + member.bit_offset, depth - 1, flat, budget)
        return budget

    def _prototype(self, name: str, number: int, at: int) -> Prototype:
        """The prototype of the FUNC_PROTO with this id, to which byte offset `at` refers."""
        types = self._types
        found = types.type(number, at)
        if found.kind != Kind.FUNC_PROTO:
            raise types.error(f"type id {number} is not a function prototype", at)
        parameters = tuple(
            Parameter(p.name, self._render(p.type, p.at) if p.type or p.name else "...")
            for p in types.parameters(found)
        )
        return Prototype(name, self._render(found.ref, found.at), parameters, self.name)

    def _tracepoint(self, name: str, number: int) -> Prototype:
        types = self._types
        pointer = types.strip(number, 0)
        if pointer.kind != Kind.PTR:
            raise types.error(f"btf_trace_{name} is not a pointer", pointer.at)
        whole = self._prototype(name, pointer.ref, pointer.at)
        if not whole.parameters or whole.parameters[0].type != "void *":
            raise types.error(f"btf_trace_{name} does not take void * first", pointer.at)
        return Prototype(name, whole.returns, whole.parameters[1:], whole.module)

    def _render(self, number: int, at: int) -> str:
        """The type with this id as C.

        BTF leads from the outermost pointer or array to the base type, so the declarator grows from
        the inside while the references are followed.
        """
        types, start, declarator = self._types, at, ""
        qualifiers: list[str] = []
        for _ in range(MAX_CHAIN):
            found = types.type(number, at)
            number, at = found.ref, found.at
            if found.kind in _QUALIFIERS:
                qualifiers.append(_QUALIFIERS[Kind(found.kind)])
            elif found.kind == Kind.PTR:
                # Qualifiers on the way to a pointer are the pointer's own.
                declarator = " ".join(filter(None, ("*" + " ".join(qualifiers), declarator)))
                declarator = declarator.replace("* *", "**")
                qualifiers = []
            elif found.kind == Kind.ARRAY:
                number, count = types.array(found)
                inner = f"({declarator})" if declarator.startswith("*") else declarator
                declarator = f"{inner}[{count}]"
            elif found.kind == Kind.FUNC_PROTO:
                declarator, qualifiers = f"({declarator})(...)", []
            elif found.kind != Kind.TYPE_TAG:
                return " ".join(filter(None, (*qualifiers, self._word(found), declarator)))
        raise types.error("pointers or qualifiers form a cycle", start)

    def _word(self, found: Type) -> str:
        """The base type of a declaration."""
        if found.kind == Kind.VOID:
            return "void"
        name = self._types.string(found.name, found.at)
        if found.kind == Kind.FWD:
            return f"{'union' if found.flag else 'struct'} {name}"
        if found.kind in _TAGS:
            return f"{_TAGS[Kind(found.kind)]} {name or '{...}'}"
        if found.kind in (Kind.INT, Kind.FLOAT, Kind.TYPEDEF):
            return name
        raise self._types.error("a value can't have this type", found.at)


class KernelBtf(_Queries):
    """The kernel's BTF and that of its KVM modules; a module's answer goes before vmlinux's.

    Where KVM is a module, struct kvm_vcpu is in vmlinux's BTF all the same (other code uses it),
    while struct kvm_page_fault and the RET_PF_* enumerators are in kvm's alone.
    """

    def __init__(self, vmlinux: Btf, modules: Iterable[Btf] = ()) -> None:
        """`modules` are split BTF on top of `vmlinux`, in the order in which they are asked."""
        self._layers = (*(module._layers[0] for module in modules), vmlinux)

    @classmethod
    def live(cls, directory: Path = BTF_DIRECTORY) -> Self:
        """The BTF of the running kernel and of those KVM modules that are loaded.

        Raises BtfError if the kernel gives no BTF, or it is malformed.
        """
        path = directory / "vmlinux"
        if not path.exists():
            raise BtfError(
                f"{path} does not exist: boot a kernel built with CONFIG_DEBUG_INFO_BTF, as the "
                "kernels of current distributions are"
            )
        vmlinux = Btf.load(path)
        paths = (directory / name for name in KVM_MODULES)
        return cls(vmlinux, [Btf.load(path, vmlinux) for path in paths if path.exists()])

    @property
    def names(self) -> tuple[str, ...]:
        """The BTF objects asked, in order."""
        return tuple(layer.name for layer in self._layers)


def _the_one(
    what: str, layer: Btf, numbers: list[int], answer: Callable[[Btf, int], _Answer | None]
) -> _Answer | None:
    """The answer on which all types of one name agree; None if none of them has one."""
    answers = {found for number in numbers if (found := answer(layer, number)) is not None}
    if len(answers) > 1:
        raise BtfError(f"BTF of {layer.name}: there are {len(answers)} different {what}")
    return next(iter(answers), None)
