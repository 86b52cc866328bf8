// SPDX-License-Identifier: BSL-1.0
#include "backends.hpp"

#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include <vmstate/migrate.hpp>
#include <vmstate/ram/merged_log.hpp>

namespace live {

using namespace vmstate::vhost_user;
using vmstate::result;

namespace {

/// The payload of SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE.
struct vring_state {
    std::uint32_t index;
    std::uint32_t number;
};

result<vmstate::unique_fd> connect_to(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path)
        return vmstate::error(vmstate::errc::invalid_argument, "a path of a socket", path);
    std::memcpy(address.sun_path, path.data(), path.size());
    vmstate::unique_fd connected(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!connected || ::connect(connected.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
        return vmstate::error(vmstate::errc::io, {}, path + ": " + std::system_category().message(errno));
    return connected;
}

/// The last bytes of RAM.
std::vector<shared_region> end_of_ram(vm& of, std::uint64_t size) {
    const std::uint64_t all = of.machine().ram()->find("ram")->memory.size();
    const std::uint64_t offset = size < all ? all - size : 0;
    return {{"ram", offset, 0, of.ram_base() + offset}};
}

} // namespace

backends::backends(vm& of, const std::vector<std::string>& sockets, std::uint64_t shared_memory, report& said)
    : vm_(of)
    , report_(said)
    , regions_(end_of_ram(of, shared_memory))
    , clients_(regions_, [&said](const std::string& name, const vmstate::error& why) { said.failed(name, why.message()); })
    , log_(*of.machine().ram(), regions_) {
    for (const std::string& socket : sockets) {
        all_.push_back(std::make_unique<backend>(backend{.socket = socket, .state = {}, .connection = {}}));
        of.machine().add_device<vmstate_backend>(
            all_.back()->state, {.instance_id = vmstate::instance_id_any});
    }
    vmstate::migration::guest& guest = of.guest();
    guest.stop = [this, stop_guest = std::move(guest.stop)]() -> result<void> {
        // First the guest, which could have more work for them.
        if (result<void> stopped = stop_guest(); !stopped) return stopped;
        return stop_all();
    };
    guest.start = [this, start_guest = std::move(guest.start)]() -> result<void> {
        start_all();
        return start_guest();
    };
    std::vector<vmstate::any_dirty_log> logs;
    if (const auto own = guest.dirty_logs.find("ram"); own != guest.dirty_logs.end()) logs.push_back(std::move(own->second));
    logs.emplace_back(log_.of("ram"));
    guest.dirty_logs.insert_or_assign("ram", vmstate::merged_log(std::move(logs)));
}

result<void> backends::connect() {
    for (const std::unique_ptr<backend>& one : all_)
        if (result<void> connected = connect(*one); !connected) return connected;
    return {};
}

result<void> backends::connect(backend& one) {
    if (one.connection) {
        clients_.remove(one.client);
        log_.remove(*one.connection);
        one.connection.reset();
    }
    one.has_memory = false;
    result<vmstate::unique_fd> connected = connect_to(one.socket);
    if (!connected) return connected.error();
    auto connection = std::make_shared<front_end>(std::move(*connected), one.socket);
    if (result<void> agreed = connection->negotiate(
            0, protocol_feature::pagefault | protocol_feature::reply_ack | protocol_feature::log_shmfd);
        !agreed)
        return agreed;
    const result<unsigned> added = clients_.add(connection);
    if (!added) return added.error();
    if (result<void> logs = log_.add(connection); !logs) return logs;
    one.client = *added;
    one.connection = std::move(connection);
    return {};
}

/// One without which the guest has to get along is no reason for the guest not to run.
void backends::start_all() {
    if (std::exchange(running_, true)) return;
    for (const std::unique_ptr<backend>& one : all_)
        if (const result<void> started = start(*one); !started) report_.failed(one->socket, started.error().message());
}

result<void> backends::start(backend& one) {
    // In postcopy, it was told of the memory when that began.
    for (const client_status& each : clients_.status())
        if (each.number == one.client && each.phase == client_phase::listening) one.has_memory = true;
    if (!one.has_memory) {
        const result<shared_memory> shared = shared_memory::find(*vm_.machine().ram(), regions_);
        if (!shared) return shared.error();
        result<message> table = shared->make_table();
        if (!table) return table.error();
        if (result<void> told = one.connection->tell(std::move(*table)); !told) return told;
        one.has_memory = true;
    }
    result<void> told = one.connection->tell(make_message(request::set_vring_base, vring_state{0, one.state.vring_base}));
    if (told) told = one.connection->tell(make_message(request::set_vring_enable, vring_state{0, 1}));
    return told;
}

result<void> backends::stop_all() {
    if (!std::exchange(running_, false)) return {};
    // All of them: the guest may go on, and start them again.
    result<void> done;
    for (const std::unique_ptr<backend>& one : all_)
        if (result<void> stopped = stop(*one); !stopped && done) done = std::move(stopped);
    return done;
}

result<void> backends::stop(backend& one) {
    const result<message> answer = one.connection->ask(make_message(request::get_vring_base, vring_state{0, 0}));
    if (!answer) return answer.error();
    const result<vring_state> state = answer->as<vring_state>();
    if (!state) return one.connection->within(request::get_vring_base, state.error());
    one.state.vring_base = state->number;
    return {};
}

} // namespace live
