// SPDX-License-Identifier: BSL-1.0
// Our vhost-user backend at a real QEMU: a Linux has its disk in examples/vhost_user_disk, writes and reads it all the time
// and verifies what it reads, while it migrates from one QEMU and backend to another, and from there to a third one:
// precopy, for which the backend logs what it writes, and postcopy, in which the backend's own accesses wait for pages.
#include "support/catch.hpp"
#include "support/huge_pages.hpp"
#include "support/linux_guest.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"

#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/vhost_user/backend_log.hpp>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#ifndef VHOST_USER_DISK
#    define VHOST_USER_DISK ""
#endif

using namespace vmstate::tests;
using namespace std::chrono_literals;

namespace {

constexpr const char* memory_size = "128M";
constexpr long huge_pages_per_guest = 64;

/// Three at once: one writes files, and reads them back from the disk; one reads a large file; and one reads the disk into a
/// buffer that the guest itself never touches, so that it is the backend that first does so where the guest has arrived.
/// That buffer is the first of all that takes memory, and so it is of huge pages, and has them for itself. No page of the
/// disk is zero, or the buffer would arrive at once however slow the migration is.
constexpr const char* guest_script = R"sh(
while true; do
    dd if=/dev/vda of=/dev/null bs=32M iflag=direct 2>/dev/null || echo BAD direct
done &
mke2fs -F /dev/vda 65536 >/dev/null
mount -t ext4 /dev/vda /mnt || echo BAD mount
dd if=/dev/urandom of=/mnt/large bs=1M count=4 2>/dev/null
sync
sum=$(md5sum < /mnt/large)
echo READY
n=0
while true; do
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(md5sum < /mnt/large)" = "$sum" ] && echo READ $n || echo BAD READ $n
    n=$((n + 1))
done &
n=0
while true; do
    dd if=/dev/urandom of=/written bs=64k count=2 2>/dev/null
    written=$(md5sum < /written)
    cp /written /mnt/file$((n % 4))
    sync
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(md5sum < /mnt/file$((n % 4)))" = "$written" ] && echo WROTE $n || echo BAD WROTE $n
    n=$((n + 1))
done
)sh";

std::size_t count_of(std::string_view text, std::string_view part) {
    std::size_t count = 0;
    for (std::size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size()))
        ++count;
    return count;
}

/// Runs a backend until its VMM is gone.
class backend {
public:
    /// examples/vhost_user_disk.
    backend(const temporary_directory& where, const std::string& name, const std::vector<std::string>& more)
        : backend(where.file(name + ".sock"), where.file(name + ".txt"), [&] {
            std::vector<std::string> words{VHOST_USER_DISK, "--socket-path", where.file(name + ".sock"), "--blk-file", where.file("disk")};
            words.insert(words.end(), more.begin(), more.end());
            return words;
        }()) {}
    /// A program that listens at the socket.
    backend(std::string socket, std::string output, std::vector<std::string> words)
        : socket_(std::move(socket)), output_(std::move(output)) {
        std::vector<char*> arguments;
        for (std::string& word : words) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        child_ = ::fork();
        if (child_ < 0) throw std::runtime_error("fork");
        if (child_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            const int out = ::open(output_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
            ::dup2(out, STDOUT_FILENO);
            ::dup2(out, STDERR_FILENO);
            ::execvp(arguments[0], arguments.data());
            ::_exit(127);
        }
        for (int i = 0; i < 1000 && !std::filesystem::exists(socket_); ++i)
            std::this_thread::sleep_for(10ms);
    }
    backend(const backend&) = delete;
    backend& operator=(const backend&) = delete;
    ~backend() {
        if (child_ <= 0) return;
        ::kill(child_, SIGKILL);
        ::waitpid(child_, nullptr, 0);
    }

    /// QEMU's part of it.
    std::vector<std::string> arguments() const {
        return {"-chardev", "socket,id=disk,path=" + socket_, "-device", "vhost-user-blk-pci,chardev=disk"};
    }
    std::string output() const {
        const std::vector<std::byte> bytes = read_file(output_);
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }
    /// Its exit status, when its VMM has closed the connection.
    int wait() {
        int status = -1;
        for (int i = 0; i < 3000; ++i) {
            if (::waitpid(child_, &status, WNOHANG) == child_) {
                child_ = -1;
                return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
            }
            std::this_thread::sleep_for(10ms);
        }
        return -1;
    }

private:
    std::string socket_, output_;
    pid_t child_ = -1;
};

struct bench {
    bench(const linux_guest& a_guest, bool huge_pages, std::vector<std::string> options)
        : guest(a_guest), huge(huge_pages), backend_options(std::move(options)) {
        std::ofstream disk(where / "disk", std::ios::binary);
        const std::string no_zeros(std::size_t{1} << 20, 'v');
        for (int mebibytes = 0; mebibytes != 512; ++mebibytes) disk << no_zeros;
        if (!disk.flush()) throw std::runtime_error("no space for a disk of 512 MiB");
        guest.write_initramfs(where / "initramfs", {"virtio_pci", "virtio_blk", "ext4"}, guest_script);
    }
    qemu start(const backend& disk, const std::string& incoming, const std::vector<std::string>& capabilities) const {
        std::vector<std::string> arguments = disk.arguments();
        const std::string kind = huge ? ",hugetlb=on,hugetlbsize=2M" : "";
        for (const std::string& one : {std::string("-object"),
                 "memory-backend-memfd,id=memory,share=on,size=" + std::string(memory_size) + kind, std::string("-kernel"),
                 guest.kernel.string(), std::string("-initrd"), where.file("initramfs"), std::string("-append"),
                 // What the kernel gives out isn't filled with zeros first: the disk is the first to write it.
                 std::string("console=ttyS0 quiet panic=-1 init_on_alloc=0"), std::string("-trace"),
                 std::string("vhost_user_postcopy_fault_handler_found")})
            arguments.push_back(one);
        return qemu({.machine = "pc,memory-backend=memory", .memory = memory_size, .incoming = incoming,
            .capabilities = capabilities, .arguments = arguments});
    }

    const linux_guest& guest;
    bool huge;
    std::vector<std::string> backend_options;
    temporary_directory where;
};

/// It writes and reads on, and finds what it wrote.
void check_progress(qemu& running, std::size_t more = 2) {
    const std::size_t written = count_of(running.serial(), "WROTE"), read = count_of(running.serial(), "READ ");
    const std::string said = running.wait_serial(
        [&](std::string_view text) {
            return text.find("BAD") != text.npos
                || (count_of(text, "WROTE") >= written + more && count_of(text, "READ ") >= read + 1);
        },
        "the guest to write and read");
    CHECK_THAT(said, !contains("BAD"));
}

std::string status_of_migration(qemu& from) {
    std::string status(from.execute("query-migrate").at("status").as_string());
    if (status == "failed" || status == "postcopy-paused") FAIL(status << ": " << from.complaints());
    return status;
}
void wait_completed(qemu& from) {
    while (status_of_migration(from) != "completed")
        std::this_thread::sleep_for(10ms);
}

void set_postcopy(qemu& who, bool on) {
    who.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{boost::json::object{{"capability", "postcopy-ram"}, {"state", on}}}}});
}
void migrate_precopy(qemu& from, qemu& to, const std::string& uri) {
    set_postcopy(from, false);
    from.execute("migrate-set-parameters", {{"max-bandwidth", 1 << 30}});
    const migration_outcome left = from.migrate(uri);
    INFO(left.error);
    REQUIRE(left.completed);
    REQUIRE(to.wait_incoming().completed);
}
/// QEMU's own account of the pages that its backend waited for.
std::size_t faults_of_backend(const qemu& who) {
    return count_of(who.complaints(), "vhost_user_postcopy_fault_handler_found");
}
/// Slow, so that most of memory is still to come when the guest runs there, until the backend has waited for a page. Then the
/// machine is stopped and goes on, while the backend's pages are still to come.
void migrate_postcopy(qemu& from, qemu& to, const std::string& uri, bool huge) {
    set_postcopy(from, true);
    from.execute("migrate-set-parameters",
        {{"max-bandwidth", 1 << 20}, {"max-postcopy-bandwidth", huge ? 2 << 20 : 8 << 20}});
    from.execute("migrate", {{"uri", uri}});
    while (status_of_migration(from) != "active")
        std::this_thread::sleep_for(10ms);
    from.execute("migrate-start-postcopy");
    while (faults_of_backend(to) == 0 && status_of_migration(from) != "completed")
        std::this_thread::sleep_for(10ms);
    to.execute("stop");
    to.execute("cont");
    from.execute("migrate-set-parameters", {{"max-postcopy-bandwidth", 1 << 30}});
    wait_completed(from);
    REQUIRE(to.wait_incoming().completed);
}

} // namespace

TEST_CASE("a Linux finds its disk and all that is on it, while it and its disk's backend migrate") {
    VMSTATE_REQUIRE_QEMU();
    if (std::string_view(VHOST_USER_DISK).empty()) return skip("examples/vhost_user_disk was not built");
    std::string why;
    const std::optional<linux_guest> guest = linux_guest::find(why);
    if (!guest) return skip(why);
    if (const auto faults = vmstate::userfault::open(vmstate::userfault_scope::user_and_kernel, 0); !faults)
        return skip("no userfaultfd for QEMU: " + faults.error().message());

    // Small pages with regions that are added one by one; huge ones with a table that comes as a whole.
    const bool huge = GENERATE(false, true);
    INFO((huge ? "huge pages" : "small pages"));
    const huge_pages reserved(huge ? 2 * huge_pages_per_guest : 0);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    const bench b(*guest, huge, huge ? std::vector<std::string>{"--whole-tables"} : std::vector<std::string>{});
    const std::string uri = "unix:" + b.where.file("migration");

    // The machine that runs, and the backend of its disk.
    auto disk = std::make_unique<backend>(b.where, "disk0", b.backend_options);
    auto machine = std::make_unique<qemu>(b.start(*disk, "", {}));
    machine->wait_serial("READY");
    check_progress(*machine, 1);

    const int migrations = std::getenv("VMSTATE_SOAK") != nullptr ? 12 : 2;
    std::size_t faults_in_postcopy = 0;
    for (int i = 1; i <= migrations; ++i) {
        const bool postcopy = i % 2 == 0;
        INFO("migration " << i << (postcopy ? ": postcopy" : ": precopy"));
        auto next_disk = std::make_unique<backend>(b.where, "disk" + std::to_string(i), b.backend_options);
        std::vector<std::string> capabilities;
        if (postcopy) capabilities.emplace_back("postcopy-ram");
        auto next = std::make_unique<qemu>(b.start(*next_disk, uri, capabilities));
        if (postcopy)
            migrate_postcopy(*machine, *next, uri, huge);
        else
            migrate_precopy(*machine, *next, uri);
        CHECK(machine->quit() == 0);
        CHECK(disk->wait() == 0);
        // Of its arrival: every other one came by precopy.
        CHECK_THAT(disk->output(), contains(!postcopy && i > 1 ? "postcopy yes" : "postcopy no"));
        machine = std::move(next);
        disk = std::move(next_disk);
        check_progress(*machine);
        if (postcopy) faults_in_postcopy += faults_of_backend(*machine);
        else CHECK(faults_of_backend(*machine) == 0);
    }
    // One alone may have none by chance, where pages are huge.
    CHECK(faults_in_postcopy > 0);
    CHECK(machine->quit() == 0);
    CHECK(disk->wait() == 0);
    CHECK_THAT(disk->output(), contains("postcopy yes"));
}

namespace {

using namespace vmstate::vhost_user;

/// A VMM's part of a disk of one queue: a driver that reads a sector, in a memory of 16 pages with a page for each thing.
class small_vmm {
public:
    static constexpr std::uint64_t page = 4096;
    static constexpr std::uint64_t guest = 3 * page; // where RAM begins
    enum : std::uint64_t { descriptors = 1, available = 2, used = 3, header = 4, data = 5, status = 7 };

    explicit small_vmm(const std::string& socket)
        : memory(vmstate::ram_memory::memfd("guest", 16 * page).value()), log(ram), disk(std::make_shared<front_end>(connect(socket), "disk")) {
        vmstate::ram_options options;
        options.file = memory.file();
        options.guest_address = guest;
        ram.insert(std::make_unique<vmstate::ram_block>(vmstate::ram_block{"ram", memory.span(), memory.span().size(), options}));
    }

    /// What the page holds, from its beginning on.
    template <class T>
    T& at(std::uint64_t number, std::uint64_t offset = 0) {
        return *reinterpret_cast<T*>(memory.span().data() + number * page + offset);
    }
    vmstate::result<void> set_up() {
        constexpr std::uint64_t version_1 = std::uint64_t{1} << 32;
        vmstate::result<void> done = disk->negotiate(version_1, protocol_feature::reply_ack | protocol_feature::log_shmfd);
        if (!done) return done;
        vmstate::result<message> table = shared_memory::find(ram, {}).value().make_table();
        if (!table) return table.error();
        if (done = disk->tell(std::move(*table)); !done) return done;
        for (const auto& [what, number] : {std::pair(request::set_vring_num, 8u), std::pair(request::set_vring_base, 0u)})
            if (done = disk->tell(make_message(what, vring_state{0, number})); !done) return done;
        if (done = tell_ring(false); !done) return done;
        for (const auto& [what, event] : {std::pair(request::set_vring_call, &call_), std::pair(request::set_vring_kick, &kick_)}) {
            message m = make_message(what, std::uint64_t{0});
            m.descriptors.emplace_back(::fcntl(event->get(), F_DUPFD_CLOEXEC, 0));
            if (done = disk->tell(std::move(m)); !done) return done;
        }
        return disk->tell(make_message(request::set_vring_enable, vring_state{0, 1}));
    }
    /// SET_VRING_ADDR, with where the used ring is logged.
    vmstate::result<void> tell_ring(bool logged) {
        struct {
            std::uint32_t index, flags;
            std::uint64_t descriptors, used, available, log;
        } const ring{0, logged ? 1u : 0u, address_here(descriptors), address_here(used), address_here(available), guest + used * page};
        return disk->tell(make_message(request::set_vring_addr, ring));
    }
    /// Reads so many bytes from the disk's beginning, by virtio-blk's request of three descriptors; whether it came.
    bool read(std::uint32_t size) {
        struct descriptor {
            std::uint64_t address;
            std::uint32_t length;
            std::uint16_t flags, next;
        };
        constexpr std::uint16_t has_next = 1, is_written = 2;
        std::memset(&at<char>(header), 0, 16); // VIRTIO_BLK_T_IN, sector 0
        at<descriptor>(descriptors) = {guest + header * page, 16, has_next, 1};
        at<descriptor>(descriptors, 16) = {guest + data * page, size, has_next | is_written, 2};
        at<descriptor>(descriptors, 32) = {guest + status * page, 1, is_written, 0};
        at<std::uint8_t>(status) = 0xff;
        at<std::uint16_t>(available, 4 + 2 * (reads_ % 8)) = 0;
        std::atomic_ref(at<std::uint16_t>(available, 2)).store(static_cast<std::uint16_t>(++reads_), std::memory_order_seq_cst);
        std::uint64_t count = 1;
        if (::write(kick_.get(), &count, sizeof count) != sizeof count) return false;
        pollfd called{call_.get(), POLLIN, 0};
        while (std::atomic_ref(at<std::uint16_t>(used, 2)).load(std::memory_order_acquire) != reads_) {
            if (::poll(&called, 1, 10'000) != 1) return false;
            static_cast<void>(!::read(call_.get(), &count, sizeof count));
        }
        return at<std::uint8_t>(status) == 0;
    }
    /// How many requests it has taken, when it has stopped.
    std::uint32_t stop() {
        const vmstate::result<message> answer = disk->ask(make_message(request::get_vring_base, vring_state{0, 0}));
        return answer ? answer->as<vring_state>().value().number : ~0u;
    }

    vmstate::ram_memory memory;
    vmstate::ram_section ram;
    backend_log log;
    const std::shared_ptr<front_end> disk;

private:
    struct vring_state {
        std::uint32_t index, number;
    };
    std::uint64_t address_here(std::uint64_t number) { return reinterpret_cast<std::uintptr_t>(&at<char>(number)); }
    static vmstate::unique_fd connect(const std::string& path) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.data(), std::min(path.size(), sizeof address.sun_path - 1));
        for (int i = 0; i < 1000; ++i) {
            vmstate::unique_fd made(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
            if (::connect(made.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return made;
            std::this_thread::sleep_for(10ms);
        }
        throw std::runtime_error("nobody listens at " + path);
    }

    vmstate::unique_fd kick_{::eventfd(0, EFD_CLOEXEC)}, call_{::eventfd(0, EFD_CLOEXEC)};
    std::uint16_t reads_ = 0;
};

} // namespace

TEST_CASE("a backend of QEMU's logs for a VMM of ours what it writes to guest memory, and where its queue stands") {
    const temporary_directory where;
    if (std::system("qemu-storage-daemon --version > /dev/null 2>&1") != 0) return skip("no qemu-storage-daemon");
    const std::string content(16 << 10, 'd');
    std::ofstream(where.file("disk"), std::ios::binary) << content;
    const std::string socket = where.file("disk.sock");
    backend daemon(socket, where.file("disk.txt"),
        {"qemu-storage-daemon", "--blockdev", "driver=file,node-name=disk,read-only=on,filename=" + where.file("disk"), "--export",
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=" + socket});
    small_vmm vmm(socket);
    const vmstate::result<void> ready = vmm.set_up();
    CAPTURE(daemon.output());
    REQUIRE(message_of(ready) == "");
    auto log = vmm.log.of("ram");
    REQUIRE(message_of(vmm.log.add(vmm.disk)) == "");
    const auto written = [&] {
        vmstate::page_bitmap dirty(16);
        CHECK(message_of(log.collect(dirty)) == "");
        std::vector<std::uint64_t> pages;
        for (std::size_t i = 0; i != dirty.size(); ++i)
            if (dirty.test(i)) pages.push_back(i);
        return pages;
    };
    using pages = std::vector<std::uint64_t>;

    REQUIRE(vmm.read(8192));
    REQUIRE(message_of(log.start()) == "");
    CHECK(written() == pages{});
    // The buffers, of which one is two pages, and the used ring.
    REQUIRE(message_of(vmm.tell_ring(true)) == "");
    REQUIRE(vmm.read(8192));
    CHECK(written() == pages{small_vmm::used, small_vmm::data, small_vmm::data + 1, small_vmm::status});
    REQUIRE(vmm.read(512));
    CHECK(written() == pages{small_vmm::used, small_vmm::data, small_vmm::status});
    CHECK(vmm.at<char>(small_vmm::data) == 'd');
    CHECK(written() == pages{});
    REQUIRE(message_of(log.stop()) == "");
    REQUIRE(vmm.read(8192));
    REQUIRE(message_of(log.start()) == "");
    CHECK(written() == pages{});
    CHECK(vmm.stop() == 4);
    CHECK(message_of(log.stop()) == "");
}
