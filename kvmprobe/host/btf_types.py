# SPDX-License-Identifier: MIT
"""Parsing of BTF: the type table and the strings of one BTF object.

The format is Documentation/bpf/btf.rst of the kernel; the checks follow kernel/bpf/btf.c.  Only
x86-64 kernels run KVM/x86, so the data is little-endian and a pointer has 8 bytes.
"""

import struct
from collections.abc import Collection, Iterator
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvmprobe.errors import BtfError

MAX_NAME = 511
"""The longest identifier the kernel accepts, in bytes (KSYM_NAME_LEN - 1)."""

MAX_CHAIN = 64
"""More typedefs, qualifiers or pointers in a row than any C code has: a cycle."""

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_ENUM = struct.Struct("<II")
_ENUM64 = struct.Struct("<III")
_ARRAY = struct.Struct("<III")
_PARAMETER = struct.Struct("<II")
_INT = struct.Struct("<I")


class Kind(IntEnum):
    """BTF_KIND_* of include/uapi/linux/btf.h."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


TRANSPARENT = frozenset((Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG))
"""Kinds that only give another type a name or a qualifier."""

# 32-bit words of a type of each kind: (without its members, for each member).  A kind that is not
# here has unknown length, so nothing behind it could be read.
_WORDS: list[tuple[int, int]] = [(0, 0)] * 128
for _kind, _fixed, _each in (
    (Kind.INT, 4, 0),
    (Kind.PTR, 3, 0),
    (Kind.ARRAY, 6, 0),
    (Kind.STRUCT, 3, 3),
    (Kind.UNION, 3, 3),
    (Kind.ENUM, 3, 2),
    (Kind.FWD, 3, 0),
    (Kind.TYPEDEF, 3, 0),
    (Kind.VOLATILE, 3, 0),
    (Kind.CONST, 3, 0),
    (Kind.RESTRICT, 3, 0),
    (Kind.FUNC, 3, 0),
    (Kind.FUNC_PROTO, 3, 2),
    (Kind.VAR, 4, 0),
    (Kind.DATASEC, 3, 3),
    (Kind.FLOAT, 3, 0),
    (Kind.DECL_TAG, 4, 0),
    (Kind.TYPE_TAG, 3, 0),
    (Kind.ENUM64, 3, 3),
):
    _WORDS[_kind] = (_fixed, _each)


class Type(NamedTuple):
    """One type: where it stands (byte offset in `owner`'s data) and its 12-byte head."""

    owner: "TypeTable"
    at: int
    kind: int
    name: int  # string offset
    vlen: int
    flag: bool
    ref: int  # size in bytes, or the id of the type it refers to


class RawMember(NamedTuple):
    """A member as it stands in a STRUCT or UNION; offsets in bits."""

    at: int
    name: str
    type: int
    bit_offset: int
    bit_size: int  # 0: not a bit-field, or an old one described by its INT


class Reference(NamedTuple):
    """A named reference to a type: a parameter of a FUNC_PROTO."""

    at: int
    name: str
    type: int


class TypeTable:
    """Types and strings of one BTF object, split BTF on top of its base.

    `parse` checks the header, every type's head (known kind, inside the type section, name inside
    the strings); members and references are checked when they are read.
    """

    def __init__(self, data: bytes, base: "TypeTable | None", name: str) -> None:
        """See `parse`."""
        self.name = name
        self.base = base
        self._data = data
        self._types, types_end, self._strings, strings_end = self._sections()
        self._first_string: int = base.string_end if base else 0
        self.string_end: int = self._first_string + strings_end - self._strings
        self.first_id: int = base.end_id if base else 1
        self._check_strings(strings_end)

        positions = self._walk(types_end)
        self.end_id: int = self.first_id + len(positions)
        words = np.frombuffer(data, "<u4", (types_end - self._types) // 4, self._types)
        at = np.array(positions, np.int64)
        self._position: npt.NDArray[np.int64] = at * 4 + self._types
        self._name: npt.NDArray[np.uint32] = words[at]
        self._kind: npt.NDArray[np.uint32] = words[at + 1] >> np.uint32(24) & np.uint32(0x7F)
        outside = np.flatnonzero(self._name >= self.string_end)
        if outside.size:
            first = int(outside[0])
            raise self.error(
                f"name offset {self._name[first]} is past the strings", int(self._position[first])
            )

    @classmethod
    def parse(cls, data: bytes, base: "TypeTable | None" = None, name: str = "BTF") -> Self:
        """Parse a BTF object; `base` is what split BTF continues, `name` is for messages.

        Raises BtfError naming the byte offset where the data is not BTF.
        """
        return cls(data, base, name)

    def error(self, what: str, at: int) -> BtfError:
        """The error for malformed data at byte offset `at`."""
        return BtfError(f"malformed BTF in {self.name}: {what} (byte {at})")

    def _sections(self) -> tuple[int, int, int, int]:
        """Start and end of the types and of the strings, in bytes from the start of the data."""
        data = self._data
        if len(data) < _HEADER.size:
            raise self.error(f"{len(data)} bytes are too few for a header", len(data))
        magic, version, _flags, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(
            data
        )
        if magic != _MAGIC:
            big = magic == _MAGIC >> 8 | (_MAGIC & 0xFF) << 8
            raise self.error("big-endian" if big else f"magic is {magic:#06x}, not 0xeb9f", 0)
        if version != 1:
            raise self.error(f"version {version} is unknown", 2)
        if not _HEADER.size <= header <= len(data):
            raise self.error(f"header length {header} is impossible", 4)
        types, strings = header + type_off, header + str_off
        if type_off % 4 or type_len % 4:
            raise self.error("the type section is not aligned to 4 bytes", 8)
        if types + type_len > len(data):
            raise self.error("the type section ends past the data", 12)
        if strings + str_len > len(data):
            raise self.error("the string section ends past the data", 20)
        return types, types + type_len, strings, strings + str_len

    def _check_strings(self, end: int) -> None:
        data, start = self._data, self._strings
        if self.base is None:
            if start == end:
                raise self.error("there are no strings", 20)
            if data[start] != 0:
                raise self.error("the first string is not empty (split BTF without base?)", start)
        if start < end and data[end - 1] != 0:
            raise self.error("the last string has no end", end - 1)

    def _walk(self, end: int) -> list[int]:
        """Positions of all types, in 32-bit words from the start of the type section."""
        words = memoryview(self._data)[self._types : end].cast("I")
        count = len(words)
        positions: list[int] = []
        append = positions.append
        table = _WORDS
        at = 0
        try:
            while at < count:
                append(at)
                info = words[at + 1]
                fixed, each = table[info >> 24 & 0x7F]
                if not fixed:
                    kind = info >> 24 & 0x7F
                    raise self.error(f"kind {kind} is unknown", self._types + 4 * at + 4)
                # Reserved bits count as parts of the kind and the length: where they are not zero,
                # one of the two can't be right.
                at += fixed + each * (info & 0xFFFFFF)
        except IndexError:
            at = count + 1
        if at != count:
            raise self.error("the type ends past the type section", self._types + 4 * positions[-1])
        return positions

    def type(self, number: int, at: int) -> Type:
        """The type with this id (0: void); `at` is the byte offset that refers to it.

        Raises BtfError for an id out of range.
        """
        if number < self.first_id:
            if number == 0 or self.base is None:
                return Type(self, 0, Kind.VOID, 0, 0, False, 0)
            return self.base.type(number, at)
        if number >= self.end_id:
            raise self.error(f"type id {number} is out of range", at)
        where = int(self._position[number - self.first_id])
        name, info, ref = _TYPE.unpack_from(self._data, where)
        return Type(self, where, info >> 24 & 0x7F, name, info & 0xFFFFFF, bool(info >> 31), ref)

    def strip(self, number: int, at: int) -> Type:
        """The type behind typedefs, qualifiers and type tags.

        Raises BtfError for a cycle.
        """
        start = at
        for _ in range(MAX_CHAIN):
            found = self.type(number, at)
            if found.kind not in TRANSPARENT:
                return found
            number, at = found.ref, found.at
        raise self.error("typedefs or qualifiers form a cycle", start)

    def string(self, offset: int, at: int) -> str:
        """The string at this offset of the strings; `at` is the byte offset that refers to it.

        Raises BtfError for an offset out of range, or a name that is too long for an identifier.
        """
        if offset < self._first_string and self.base is not None:
            return self.base.string(offset, at)
        if offset >= self.string_end:
            raise self.error(f"string offset {offset} is out of range", at)
        start = self._strings + offset - self._first_string
        end = self._data.find(b"\0", start, start + MAX_NAME + 1)
        if end < 0:
            raise self.error(f"a name has more than {MAX_NAME} bytes", at)
        return self._data[start:end].decode("utf-8", "surrogateescape")

    def size(self, number: int, at: int) -> int:
        """Bytes a value of this type takes.

        Raises BtfError for a type without a size (void, a function, a forward declaration).
        """
        elements = 1
        for _ in range(MAX_CHAIN):
            found = self.strip(number, at)
            if found.kind == Kind.PTR:
                return elements * 8
            if found.kind != Kind.ARRAY:
                break
            number, count = self.array(found)
            elements, at = elements * count, found.at
        if found.kind not in (
            Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64, Kind.FLOAT, Kind.DATASEC,
        ):  # fmt: skip
            raise self.error("a type that must have a size has none", at)
        return elements * found.ref

    def array(self, found: Type) -> tuple[int, int]:
        """The id of an ARRAY's element type, and the number of elements."""
        element, _index, count = _ARRAY.unpack_from(found.owner._data, found.at + _TYPE.size)
        return element, count

    def int_bits(self, found: Type) -> tuple[int, int]:
        """Bit offset and width of an INT in its bytes (not 0 and all: an old bit-field)."""
        (word,) = _INT.unpack_from(found.owner._data, found.at + _TYPE.size)
        return word >> 16 & 0xFF, word & 0xFF

    def members(self, found: Type) -> Iterator[RawMember]:
        """The members of a STRUCT or UNION, in order."""
        at = found.at + _TYPE.size
        for _ in range(found.vlen):
            name, number, offset = _MEMBER.unpack_from(found.owner._data, at)
            bits = offset & 0xFFFFFF if found.flag else offset
            width = offset >> 24 if found.flag else 0
            yield RawMember(at, found.owner.string(name, at), number, bits, width)
            at += _MEMBER.size

    def parameters(self, found: Type) -> Iterator[Reference]:
        """The parameters of a FUNC_PROTO; a last one of void and without name is `...`."""
        at = found.at + _TYPE.size
        for _ in range(found.vlen):
            name, number = _PARAMETER.unpack_from(found.owner._data, at)
            yield Reference(at, found.owner.string(name, at), number)
            at += _PARAMETER.size

    def find(self, name: str, kinds: Collection[int]) -> list[int]:
        """Ids of this object's own types (not its base's) of this name and one of these kinds."""
        numbers, names = self._by_name
        number = numbers.get(name.encode("utf-8", "surrogateescape"))
        if number is None or not name:
            return []
        found = np.flatnonzero(names == number)
        return [int(i) + self.first_id for i in found if self._kind[i] in kinds]

    @cached_property
    def _by_name(self) -> tuple[dict[bytes, int], npt.NDArray[np.int32]]:
        """A number for each name, and the number of every type's name.

        Two string offsets may hold the same name: BTF that was never deduplicated is legal.
        """
        offsets, which = np.unique(self._name, return_inverse=True)
        numbers: dict[bytes, int] = {}
        number = numbers.setdefault
        canonical = [number(s, i) for i, s in enumerate(self._names(offsets.tolist()))]
        return numbers, np.array(canonical, np.int32)[which]

    def _names(self, offsets: list[int]) -> Iterator[bytes]:
        """The strings at these ascending offsets; empty for what is too long for an identifier."""
        if self.base is not None:
            own = np.searchsorted(offsets, self._first_string)
            yield from self.base._names(offsets[:own])
            offsets = offsets[own:]
        data, find, shift = self._data, self._data.find, self._strings - self._first_string
        for offset in offsets:
            start = offset + shift
            end = find(b"\0", start, start + MAX_NAME + 1)
            yield data[start:end] if end >= 0 else b""

    @cached_property
    def enumerators(self) -> dict[str, set[int]]:
        """Every enumerator of this object's own enums, with the values it has in them.

        Raises BtfError for a name out of range.
        """
        found: list[tuple[int, int]] = []
        for index in np.flatnonzero((self._kind == Kind.ENUM) | (self._kind == Kind.ENUM64)):
            at = int(self._position[index])
            _name, info, _size = _TYPE.unpack_from(self._data, at)
            wide = info >> 24 & 0x7F == Kind.ENUM64
            layout, sign = (_ENUM64, 1 << 63) if wide else (_ENUM, 1 << 31)
            at += _TYPE.size
            end = at + layout.size * (info & 0xFFFFFF)
            for name, low, *high in layout.iter_unpack(self._data[at:end]):
                value = low | high[0] << 32 if wide else low
                # The kind flag says that the values are signed.
                if info >> 31 and value & sign:
                    value -= 2 * sign
                if name >= self.string_end:
                    raise self.error(f"string offset {name} is out of range", at)
                found.append((name, value))
        offsets = sorted({name for name, _ in found})
        names = dict(zip(offsets, self._names(offsets), strict=True))
        values: dict[str, set[int]] = {}
        for name, value in found:
            values.setdefault(names[name].decode("utf-8", "surrogateescape"), set()).add(value)
        return values
