// SPDX-License-Identifier: BSL-1.0
// Memory for a guest, of each kind that can be registered.
#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/ram_memory.hpp>

#include <support/catch.hpp>
#include <support/qemu.hpp>

using namespace vmstate;
using namespace vmstate::tests;

namespace {

constexpr std::uint64_t page = ram_memory::small_page;
constexpr std::uint64_t huge_page = std::uint64_t{2} << 20;

void set_first_byte(const ram_memory& memory, int value) { memory.span()[0] = static_cast<std::byte>(value); }
int first_byte(const ram_memory& memory) { return std::to_integer<int>(memory.span()[0]); }

} // namespace

TEST_CASE("anonymous memory is zero, and moves with its owner") {
    ram_memory memory = ram_memory::anonymous(16 * page).value();
    CHECK(memory.span().size() == 16 * page);
    CHECK(memory.page_size() == page);
    CHECK(memory.file().fd == -1);
    CHECK(first_byte(memory) == 0);
    set_first_byte(memory, 7);
    const std::byte* const where = memory.span().data();
    ram_memory other = std::move(memory);
    CHECK(other.span().data() == where);
    CHECK(first_byte(other) == 7);
    other = ram_memory::anonymous(page).value();
    CHECK(first_byte(other) == 0);
}

TEST_CASE("a memfd is the same memory for whoever maps its descriptor") {
    const ram_memory memory = ram_memory::memfd("ram", 4 * page).value();
    const ram_memory again = ram_memory::file(memory.file().fd, page, 2 * page).value();
    CHECK(again.file().offset == page);
    CHECK(again.file().fd != memory.file().fd);
    set_first_byte(again, 9);
    CHECK(std::to_integer<int>(memory.span()[page]) == 9);
}

TEST_CASE("a file is made, lengthened, and kept") {
    const temporary_directory directory;
    const std::string path = (directory / "ram").string();
    {
        const ram_memory memory = ram_memory::file(path, 2 * page).value();
        set_first_byte(memory, 3);
    }
    CHECK(std::filesystem::file_size(path) == 2 * page);
    const ram_memory longer = ram_memory::file(path, 4 * page).value();
    CHECK(std::filesystem::file_size(path) == 4 * page);
    CHECK(first_byte(longer) == 3);
    // A part beyond its end would be SIGBUS.
    const result<ram_memory> outside = ram_memory::file(longer.file().fd, 3 * page, 2 * page);
    REQUIRE(outside.has_error());
    CHECK(outside.error() == errc::bad_ram);
    CHECK_THAT(outside.error().message(), contains("a file of at least 20480 bytes"));
    const result<ram_memory> nowhere = ram_memory::file((directory / "no" / "ram").string(), page);
    REQUIRE(nowhere.has_error());
    CHECK_THAT(nowhere.error().message(), contains("No such file"));
}

TEST_CASE("sizes that aren't whole pages are refused") {
    CHECK(ram_memory::anonymous(0).has_error());
    CHECK(ram_memory::anonymous(page + 1).has_error());
    CHECK(ram_memory::memfd("ram", huge_page + page, huge_page).has_error());
    CHECK(ram_memory::anonymous(page, 1000).has_error());
    CHECK(ram_memory::file(-1, 0, page).has_error());
    const ram_memory memory = ram_memory::memfd("ram", 4 * page).value();
    CHECK(ram_memory::file(memory.file().fd, 17, page).has_error());
}

TEST_CASE("huge pages are what was asked for, or an error that says so") {
    const bool shared = GENERATE(true, false);
    const result<ram_memory> memory =
        shared ? ram_memory::memfd("ram", huge_page, huge_page) : ram_memory::anonymous(huge_page, huge_page);
    if (!memory) {
        CHECK(memory.error() == errc::bad_ram);
        CHECK_THAT(memory.error().message(), contains("in pages of 2097152 bytes"));
        return skip("no huge pages: " + memory.error().message());
    }
    CHECK(memory->page_size() == huge_page);
    CHECK(first_byte(*memory) == 0);
    if (shared) CHECK(ram_memory::file(memory->file().fd, 0, huge_page).value().page_size() == huge_page);
}

TEST_CASE("a machine takes what the memory knows of itself") {
    const ram_memory memory = ram_memory::memfd("ram", 4 * page).value();
    machine some{{.name = "small"}};
    REQUIRE(some.add_ram("ram", memory, {.guest_address = 0x1000}));
    const ram_block& block = *some.ram()->find("ram");
    CHECK(block.memory.data() == memory.span().data());
    CHECK(block.options.file.fd == memory.file().fd);
    CHECK(block.options.host_page_size == page);
    CHECK(block.options.guest_address == 0x1000);
}
