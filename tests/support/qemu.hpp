// SPDX-License-Identifier: BSL-1.0
// A real QEMU, run by a test: started in a temporary directory, spoken to over QMP, its serial port and its complaints
// kept in files, killed when the object goes. Every wait is bounded; what goes wrong is an exception that ends with
// QEMU's own stderr. Depends on Boost.JSON; Boost.Asio only behind it.
#pragma once

#include "support/catch.hpp"
#include "support/temporary_directory.hpp"

#include <boost/json.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vmstate::tests {

struct qemu_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The program to run: $VMSTATE_QEMU, or qemu-system-x86_64 in $PATH. Empty when there is none.
std::filesystem::path find_qemu();

/// In a test case that needs a QEMU: leaves it, and says so, where there is none.
#define VMSTATE_REQUIRE_QEMU()                                                                  \
    do {                                                                                        \
        if (::vmstate::tests::find_qemu().empty()) {                                            \
            ::vmstate::tests::skip(                                                             \
                "no qemu-system-x86_64 in $PATH (Debian: qemu-system-x86), nor $VMSTATE_QEMU"); \
            return;                                                                             \
        }                                                                                       \
    } while (false)

/// A guest program of tests/guests/, built with the tests. The disk is a boot sector and what it loads, for a machine
/// with a firmware (`if=floppy` or `if=ide`); the ROM takes the place of the firmware (`-bios`) on any machine.
std::filesystem::path guest_disk(std::string_view name);
std::filesystem::path guest_rom(std::string_view name);

std::vector<std::byte> read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes);

struct qemu_options {
    std::string machine = "pc"; // -M
    std::string memory = "16M"; // -m
    std::string accelerator = "tcg";
    std::filesystem::path rom{};    // -bios, where not empty
    std::filesystem::path floppy{}; // a read-only first floppy, where not empty (pc, isapc)
    std::filesystem::path disk{};   // a first IDE or AHCI disk, where not empty; what is written is lost
    std::filesystem::path incoming_file{};       // -incoming "exec:cat ...", where not empty
    std::string incoming{};                      // -incoming, where not empty
    std::vector<std::string> capabilities{};     // of migration, switched on before
    bool stopped = false;                        // -S
    std::vector<std::string> arguments{};        // and whatever else
    std::chrono::milliseconds patience{120'000}; // the longest that any single wait may take
};

/// How a migration ended. `error` is QEMU's reason: error-desc on the source; stderr on the destination, which exits.
struct migration_outcome {
    bool completed = false;
    std::string error;
};

class qemu {
public:
    /// Starts it with -nodefaults and no display, and returns when QMP is ready. With an incoming migration that is
    /// before, during or after the loading: see wait_incoming(). Throws qemu_error when it doesn't start.
    explicit qemu(qemu_options options);
    ~qemu();
    qemu(qemu&&) noexcept;
    qemu& operator=(qemu&&) noexcept;

    /// A QMP command and its "return" value. Throws qemu_error with the command and the "desc" of an error.
    boost::json::value execute(std::string_view command, boost::json::object arguments = {});

    /// A command of the human monitor, and what it printed.
    std::string human(std::string_view line);

    /// The oldest event of that name that nobody has taken yet; waits for it.
    boost::json::object wait_event(std::string_view name);

    /// 702 for QEMU 7.2.
    int version();

    /// "running", "paused", "inmigrate", ... as query-status says.
    std::string status();
    void stop();
    void cont();

    /// Starts an outgoing migration and waits until it has ended, well or badly.
    migration_outcome migrate(std::string_view uri);
    migration_outcome migrate_to_file(const std::filesystem::path& path);

    /// On a destination: waits until the incoming migration has ended. QEMU 7.2 exits when it failed.
    migration_outcome wait_incoming();

    /// Guest physical memory, by pmemsave. Stop the machine first, or it is not of one moment.
    std::vector<std::byte> memory(std::uint64_t address, std::size_t size);

    /// An access to an I/O port as the guest's processor would make it, through the monitor.
    void outb(std::uint16_t port, std::uint8_t value);
    std::uint8_t inb(std::uint16_t port);

    /// All that the guest wrote to its first serial port.
    std::string serial() const;
    /// Waits until serial() satisfies `enough`, and returns it. The second form waits for a text.
    std::string wait_serial(const std::function<bool(std::string_view)>& enough, std::string_view what);
    std::string wait_serial(std::string_view text);

    /// Its stderr so far.
    std::string complaints() const;
    bool alive();
    /// Asks it to quit, and returns its exit status.
    int quit();
    /// Waits for it to exit by itself, and returns its exit status (128 + n for signal n).
    int wait_exit();

    const std::filesystem::path& directory() const noexcept;

private:
    struct implementation;
    std::unique_ptr<implementation> self_;
};

} // namespace vmstate::tests
