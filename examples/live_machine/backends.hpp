// SPDX-License-Identifier: BSL-1.0
//
// The machine's vhost-user backends: processes that share a part of its RAM, at its end, and work there while the guest
// runs. What a migration needs for them is here: they stop and start with the guest, the pages that they write are
// logged, and in postcopy they wait for theirs as the guest does. Depends on vm.hpp, report.hpp and vmstate's vhost_user/.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <vmstate/describe.hpp>
#include <vmstate/postcopy/observer.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/backend_log.hpp>
#include <vmstate/vhost_user/front_end.hpp>
#include <vmstate/vhost_user/postcopy_clients.hpp>

#include "report.hpp"
#include "vm.hpp"

namespace live {

/// What the machine knows of a backend's device, and takes with it: where its only queue is.
struct backend_state {
    std::uint32_t vring_base = 0;
};
inline constexpr auto vmstate_backend =
    vmstate::describe<backend_state>({.name = "vhost-user-backend"}, vmstate::field<&backend_state::vring_base>);
static_assert(vmstate::completeness_checked<vmstate_backend>);

class backends {
public:
    /// `sockets`: where they listen. They share the last `shared_memory` bytes of RAM. The machine's `guest` and its
    /// description are changed for good; the machine is neither run nor migrated after this has gone.
    backends(vm& of, const std::vector<std::string>& sockets, std::uint64_t shared_memory, report& said);
    backends(const backends&) = delete;
    backends& operator=(const backends&) = delete;

    /// Before the guest starts or comes, each time: as new as the machine then is, they know nothing of its memory.
    vmstate::result<void> connect();
    /// For the destination of a migration.
    vmstate::postcopy_observer& postcopy() { return clients_; }

private:
    struct backend {
        std::string socket;
        backend_state state;
        std::shared_ptr<vmstate::vhost_user::front_end> connection;
        unsigned client = 0; ///< its number at clients_
        bool has_memory = false;
    };

    vmstate::result<void> connect(backend& one);
    vmstate::result<void> start(backend& one);
    vmstate::result<void> stop(backend& one);
    vmstate::result<void> stop_all();
    void start_all();

    vm& vm_;
    report& report_;
    const std::vector<vmstate::vhost_user::shared_region> regions_;
    std::vector<std::unique_ptr<backend>> all_;
    bool running_ = false;
    vmstate::vhost_user::postcopy_clients clients_;
    vmstate::vhost_user::backend_log log_;
};

} // namespace live
