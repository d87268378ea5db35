/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef LAB_SLOT_H
#define LAB_SLOT_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* size 0 deletes the slot; hva comes back: where the slot's memory is in the caller's process. */
struct lab_slot_region {
	__s32 vm_fd;
	__u32 size;
	__u64 gpa;
	__u64 hva;
};

#define LAB_SLOT_SET _IOWR(0xAE, 0xF0, struct lab_slot_region)

#endif
