// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/lab_slot: gives any VM an internal memslot, made as kvm_intel makes its hidden TSS: through
 * __x86_set_memory_region, in the process of the VMM.  kvm_amd makes no such slot itself.
 *
 * For the lab only.  Loads where KVM exports that function to all (up to 6.12 at least; later
 * kernels export it to KVM's own modules alone).
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "lab_slot.h"

/* The first internal slot: the one kvm_intel uses for the hidden TSS. */
#define LAB_SLOT_ID KVM_USER_MEM_SLOTS

static long lab_slot_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct lab_slot_region region;
	void __user *address;
	struct fd vm;
	struct kvm *kvm;

	if (command != LAB_SLOT_SET)
		return -ENOTTY;
	if (copy_from_user(&region, (void __user *)argument, sizeof(region)))
		return -EFAULT;
	vm = fdget(region.vm_fd);
#ifdef fd_file
	file = fd_file(vm);
#else
	file = vm.file;
#endif
	if (!file)
		return -EBADF;
	if (!file_is_kvm(file)) {
		fdput(vm);
		return -EINVAL;
	}
	kvm = file->private_data;
	mutex_lock(&kvm->slots_lock);
	address = __x86_set_memory_region(kvm, LAB_SLOT_ID, region.gpa, region.size);
	mutex_unlock(&kvm->slots_lock);
	fdput(vm);
	if (IS_ERR(address))
		return PTR_ERR(address);
	region.hva = (unsigned long)address;
	return copy_to_user((void __user *)argument, &region, sizeof(region)) ? -EFAULT : 0;
}

static const struct file_operations lab_slot_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = lab_slot_ioctl,
};

static struct miscdevice lab_slot_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "lab_slot",
	.fops = &lab_slot_operations,
	.mode = 0600,
};

module_misc_device(lab_slot_device);
MODULE_DESCRIPTION("An internal KVM memslot on request, for tests");
MODULE_LICENSE("GPL");
