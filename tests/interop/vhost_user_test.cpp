// SPDX-License-Identifier: BSL-1.0
// Our vhost-user backend at a real QEMU: a Linux has its disk in examples/vhost_user_disk, writes and reads it all the time
// and verifies what it reads, while it migrates from one QEMU and backend to another, and from there to a third one:
// precopy, for which the backend logs what it writes, and postcopy, in which the backend's own accesses wait for pages.
#include "support/catch.hpp"
#include "support/huge_pages.hpp"
#include "support/linux_guest.hpp"
#include "support/qemu.hpp"

#include <vmstate/ram/userfault.hpp>

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
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

/// Runs examples/vhost_user_disk until its VMM is gone.
class backend {
public:
    backend(const temporary_directory& where, std::string name, const std::vector<std::string>& more)
        : socket_(where.file(name + ".sock")), output_(where.file(name + ".txt")) {
        std::vector<std::string> words{VHOST_USER_DISK, "--socket-path", socket_, "--blk-file", where.file("disk")};
        words.insert(words.end(), more.begin(), more.end());
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
            ::execv(arguments[0], arguments.data());
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
/// Slow, so that most of memory is still to come when the guest runs there, until the backend has waited for a page.
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
        CHECK((faults_of_backend(*machine) > 0) == postcopy);
    }
    CHECK(machine->quit() == 0);
    CHECK(disk->wait() == 0);
    CHECK_THAT(disk->output(), contains("postcopy yes"));
}
