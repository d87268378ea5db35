# SPDX-License-Identifier: MIT
"""The header directory that BCC compiles against, so that no kernel headers are needed.

BCC compiles with -nostdinc inside the directory named by BCC_KERNEL_SOURCE, forces in
include/linux/kconfig.h (whose existence is its test for "headers found") and then includes its own
bpf.h and helpers.h, which include seven more files.  All they need is in kconfig.h.  Probes take
nothing from kernel headers: offsets come from BTF.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_KCONFIG = """\
/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Generated: all that BCC's own headers and kvmprobe's probes need of a kernel's headers. */
#ifndef KVMPROBE_KCONFIG_H
#define KVMPROBE_KCONFIG_H

#define CONFIG_BPF_SYSCALL 1

/* BCC only asks whether the kernel is 4.8 or newer, which has BPF_F_CURRENT_CPU. */
#ifndef LINUX_VERSION_CODE
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
#endif

typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __s8 s8;
typedef __u8 u8;
typedef __s16 s16;
typedef __u16 u16;
typedef __s32 s32;
typedef __u32 u32;
typedef __s64 s64;
typedef __u64 u64;
typedef u8 uint8_t;
typedef u16 uint16_t;
typedef u32 uint32_t;
typedef u64 uint64_t;
typedef s8 int8_t;
typedef s16 int16_t;
typedef s32 int32_t;
typedef s64 int64_t;
typedef __u16 __be16;
typedef __u16 __le16;
typedef __u32 __be32;
typedef __u32 __le32;
typedef __u64 __be64;
typedef __u64 __le64;
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef unsigned long size_t;
typedef long ssize_t;
typedef unsigned long uintptr_t;
typedef int pid_t;
typedef _Bool bool;

#define __aligned_u64 __u64 __attribute__((aligned(8)))
#define __always_inline inline __attribute__((always_inline))
#define NULL ((void *)0)
#define true 1
#define false 0
#define offsetof(type, member) __builtin_offsetof(type, member)
#define PAGE_SIZE 4096
#define BPF_MAXINSNS 4096

/* The registers a kprobe sees: arch/x86/include/asm/ptrace.h, 64 bit. */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx;
	unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};

#endif
"""

_EMPTY = "/* SPDX-License-Identifier: GPL-2.0-only OR MIT */\n/* Nothing: see linux/kconfig.h. */\n"

_FILES = {
    "linux/kconfig.h": _KCONFIG,
    "linux/types.h": _EMPTY,
    "linux/bpf_common.h": _EMPTY,
    "linux/version.h": _EMPTY,
    "linux/log2.h": _EMPTY,
    "uapi/linux/bpf.h": _EMPTY,
    "uapi/linux/if_packet.h": _EMPTY,
    "asm/page.h": _EMPTY,
}


@contextmanager
def header_directory() -> Iterator[Path]:
    """A fresh directory (mode 0700) for BCC_KERNEL_SOURCE, which the caller sets.

    It is removed at the end of the `with`, and must exist until the last program is compiled.
    """
    with tempfile.TemporaryDirectory(prefix="kvmprobe-headers-") as directory:
        root = Path(directory)
        for name, text in _FILES.items():
            path = root / "include" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")
        yield root
