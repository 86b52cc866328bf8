// SPDX-License-Identifier: BSL-1.0
//
// <linux/kvm.h> as C++ needs it. Some versions of the kernel's headers put an empty struct before a flexible array; in
// C++ it has a size, and with it change the structs' layouts and the ioctls' numbers. Here those arrays are left out:
// the elements are behind the struct. Include this one before any other that includes <linux/kvm.h>. Depends on Linux.
#pragma once
#pragma GCC system_header // a lone semicolon stays where an array was

#include <linux/stddef.h>
#include <linux/types.h>

#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(type, name)
#include <linux/kvm.h>

static_assert(sizeof(kvm_xsave) == 4096 && sizeof(kvm_cpuid2) == 8 && sizeof(kvm_msr_list) == 4 && sizeof(kvm_msrs) == 8);
