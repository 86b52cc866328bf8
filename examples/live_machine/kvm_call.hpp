// SPDX-License-Identifier: BSL-1.0
//
// KVM's ioctls, with errors that say which of them it was. Depends on kvm_api.hpp and vmstate's support/.
#pragma once

#include "kvm_api.hpp"

#include <sys/ioctl.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <vmstate/support/result.hpp>

namespace live {

inline vmstate::error kvm_failure(std::string what, int number = errno) {
    return vmstate::error(vmstate::errc::io, {}, std::move(what) + ": " + std::system_category().message(number));
}

/// What the ioctl returns, or an error with its name. One that takes no argument wants a 0.
template <class Argument>
vmstate::result<int> kvm_call(int fd, const char* name, unsigned long request, Argument argument) {
    const int returned = ::ioctl(fd, request, argument);
    if (returned < 0) return kvm_failure(name);
    return returned;
}
#define LIVE_KVM_CALL(fd, request, argument) ::live::kvm_call(fd, #request, request, argument)

/// A header of KVM's and the elements behind it.
template <class Header, class Element>
class kvm_list {
public:
    explicit kvm_list(std::size_t count) : bytes_(sizeof(Header) + count * sizeof(Element)) {}

    Header* header() { return reinterpret_cast<Header*>(bytes_.data()); }
    /// Copies; what comes out of a buffer of bytes isn't an object of its own.
    Element get(std::size_t i) const {
        Element element;
        std::memcpy(&element, bytes_.data() + sizeof(Header) + i * sizeof(Element), sizeof element);
        return element;
    }
    void set(std::size_t i, const Element& element) {
        std::memcpy(bytes_.data() + sizeof(Header) + i * sizeof(Element), &element, sizeof element);
    }

private:
    std::vector<std::byte> bytes_; // operator new aligns it for both
};
using kvm_msr_batch = kvm_list<kvm_msrs, kvm_msr_entry>;

} // namespace live
