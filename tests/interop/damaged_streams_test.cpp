// SPDX-License-Identifier: BSL-1.0
// What a stream can do to whoever loads it: nothing. Real streams, damaged in every way that damages one thing, are loaded
// into machines; each load ends with an error that names the place, or with a machine that has loaded every section of the
// undamaged stream, and can be saved and loaded again. Under the sanitizers it is also a proof that nothing else happens.
// Memory is counted, time is CTest's. [.pc] is over half of the work: CTest runs it beside the rest.
#include "support/catch.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"

#include <vmstate/machine/carry.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

// ---- memory that is asked for ---------------------------------------------------------------------------------

namespace {

std::size_t largest_request = 0;
std::size_t requested_in_all = 0;

void* counted_allocation(std::size_t size) noexcept {
    largest_request = std::max(largest_request, size);
    requested_in_all += size;
    return std::malloc(size == 0 ? 1 : size);
}
void* counted_allocation_or_throw(std::size_t size) {
    if (void* memory = counted_allocation(size)) return memory;
    throw std::bad_alloc();
}

} // namespace

void* operator new(std::size_t size) { return counted_allocation_or_throw(size); }
void* operator new[](std::size_t size) { return counted_allocation_or_throw(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return counted_allocation(size); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return counted_allocation(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

// ---- streams ----------------------------------------------------------------------------------------------------

using namespace vmstate::tests;
using vmstate::errc;

namespace {

struct specimen {
    std::string name;
    recorded_stream stream;
};

recorded_stream record_programmed(const std::string& machine) {
    qemu source({.machine = machine, .rom = guest_rom("devices")});
    source.wait_serial("READY\n");
    if (machine != "microvm") {
        source.human("sendkey ctrl-alt-delete");
        source.human("mouse_move 10 -20 3");
    }
    return recorded_stream(with_little_memory(record(source)));
}

/// Devices in states with many subsections, and hardly any memory. Recorded once.
const std::vector<specimen>& specimens() {
    static const std::vector<specimen> all = [] {
        std::vector<specimen> made;
        for (const char* machine : {"microvm", "isapc", "pc"})
            made.push_back({machine, record_programmed(machine)});
        return made;
    }();
    return all;
}

const recorded_stream& of_machine(std::string_view name) {
    return std::find_if(specimens().begin(), specimens().end(), [&](const specimen& one) {
        return one.name == name;
    })->stream;
}

// ---- one load ---------------------------------------------------------------------------------------------------

struct tally {
    std::size_t loads = 0;
    std::size_t errors = 0;
    std::size_t largest_request = 0;
    std::size_t most_in_all = 0;
};

/// What a load has brought: if it is "ok", these are what they are without the damage.
struct loaded_state {
    std::vector<std::string> sections;      ///< in the order of the stream, with section ids
    std::vector<std::string> not_in_stream; ///< sections and RAM blocks
    std::map<std::string, std::vector<std::byte>> memory;

    explicit loaded_state(const replica& from) : not_in_stream(from.machine.not_in_stream()), memory(from.memory) {
        for (const auto& entry : from.machine.sections())
            if (entry->load_section_id)
                sections.push_back(vmstate::section_path(*entry) + " id " + std::to_string(*entry->load_section_id));
    }
};

/// The parts of a stream in which a change may go unnoticed, since the format has no checksum; everywhere else it is an
/// error.
enum class damage {
    instance,           ///< one bit makes an instance 0 the 0x20, 0x40 or 0x70 that old streams have, its alias
    version,            ///< a section's version may be any that the device still reads
    body,               ///< a device's values are what they are
    memory,             ///< as are a page, its place in its block, and the length of a resizable block
    description,        ///< it says where carried bodies end, and nothing else; its text is loaded into nothing
    description_length, ///< where the description is known beforehand, how much of it is passed over
    elsewhere,          ///< magic, configuration, the sections' types, ids, names, other instances, footers, the end
};

damage damage_at(const recorded_stream& stream, std::uint64_t at) {
    if (at >= stream.location.offset) return damage::description;
    if (at + 4 >= stream.location.offset) return damage::description_length;
    if (at >= stream.ram.begin && at < stream.ram.end) return damage::memory;
    for (const recorded_section& section : stream.sections) {
        const std::uint64_t body = section.header.body_offset;
        if (at >= body && at < body + section.body.size()) return damage::body;
        if (at >= body - 4 && at < body) return damage::version;
        const std::string& id = section.header.idstr;
        if (at >= body - 8 && at < body - 4 && (id == "i8259" || id == "i8254" || id == "mc146818rtc"))
            return damage::instance;
    }
    return damage::elsewhere;
}

/// Loads damaged bytes, and says what is wrong with the outcome; empty where nothing is.
class victim {
public:
    explicit victim(const recorded_stream& original) : original_(original), undamaged_(load_undamaged(original)) {}

    /// With the description that the stream had before it was damaged at `where`, or by its own.
    std::string load(
        std::span<const std::byte> stream, std::optional<std::uint64_t> where, bool own_description = false) {
        replica machine(original_);
        largest_request = requested_in_all = 0;
        vmstate::load_options options = vmstate::carry_unknown();
        options.description = own_description ? nullptr : &original_.description;
        options.ram_limit = 1 << 20;
        vmstate::memory_reader in(stream);
        const auto outcome = vmstate::load(machine.machine, in, options);
        ++tally_.loads;
        tally_.largest_request = std::max(tally_.largest_request, largest_request);
        tally_.most_in_all = std::max(tally_.most_in_all, requested_in_all);
        if (largest_request > 2 * stream.size() + 65536)
            return "an allocation of " + std::to_string(largest_request) + " bytes";
        if (requested_in_all > (own_description ? 64 : 8) * stream.size() + 65536)
            return "allocations of " + std::to_string(requested_in_all) + " bytes";
        if (!outcome) {
            ++tally_.errors;
            return complaint_about(outcome.error(), stream.size());
        }
        if (std::string complaint = complaint_about_loading(machine, where); !complaint.empty()) return complaint;
        return resave_ ? complaint_about_saving(machine, own_description || tally_.loads % 32 == 0) : "";
    }
    /// Whether what was loaded is also saved and loaded again.
    void resave(bool on) { resave_ = on; }
    const tally& counts() const { return tally_; }

private:
    static loaded_state load_undamaged(const recorded_stream& original) {
        replica machine(original);
        if (const auto outcome = machine.load(original.bytes, &original.description); !outcome)
            throw std::runtime_error(outcome.error().message());
        return loaded_state(machine);
    }
    /// Nothing that the stream has may be left out without a word, nor come from a place that wasn't damaged.
    std::string complaint_about_loading(const replica& machine, std::optional<std::uint64_t> where) const {
        const damage part = where ? damage_at(original_, *where) : damage::elsewhere;
        const loaded_state now(machine);
        if (now.sections != undamaged_.sections)
            return "loaded with " + std::to_string(now.sections.size()) + " sections of " +
                   std::to_string(undamaged_.sections.size());
        if (now.not_in_stream != undamaged_.not_in_stream) return "loaded without a block of memory";
        if (part != damage::memory && now.memory != undamaged_.memory) return "loaded with other memory";
        if (where && part == damage::elsewhere) return "loaded as if nothing were wrong";
        return {};
    }
    static std::string complaint_about(const vmstate::error& failure, std::size_t size) {
        if (failure.code() == errc::ok) return "an error without a code";
        if (failure.path().empty()) return "an error without a path: " + failure.message();
        if (failure.offset() == vmstate::error::no_offset)
            return "an error without an offset: " + failure.message();
        if (failure.offset() > size) return "an error behind the end: " + failure.message();
        return {};
    }
    /// To read the description anew takes longer than all the rest; where it is the stream's, now and then is enough.
    std::string complaint_about_saving(replica& machine, bool own_description) const {
        const auto saved = machine.save();
        if (!saved) return "what was loaded can't be saved: " + saved.error().message();
        replica again(original_);
        if (const auto outcome = again.load(*saved, own_description ? nullptr : &original_.description);
            !outcome)
            return "what was saved can't be loaded: " + outcome.error().message();
        const auto twice = again.save();
        if (!twice) return "what was loaded again can't be saved: " + twice.error().message();
        return *twice == *saved ? "" : "what is saved is not what was loaded";
    }

    const recorded_stream& original_;
    loaded_state undamaged_;
    tally tally_;
    bool resave_ = true;
};

void check_no_memory_hog(const victim& machine) {
    INFO(machine.counts().loads << " loads, " << machine.counts().errors << " errors; at most "
                                << machine.counts().largest_request << " bytes at once, "
                                << machine.counts().most_in_all << " in all");
    CHECK(machine.counts().loads > 0);
    CHECK(machine.counts().errors > 0);
}

/// What decides how much of something there is, or might: every integer of a body, and all of its headers.
class integers_of_a_body final : public vmstate::vmdesc_visitor {
public:
    struct place {
        std::uint64_t offset;
        std::size_t size;
    };
    std::vector<place> places;

    void value(const vmstate::vmdesc_value& found) override {
        using kind = vmstate::vmdesc_kind;
        if (found.kind == kind::buffer || found.kind == kind::unused || found.kind == kind::opaque ||
            found.kind == kind::bitmap)
            return;
        for (std::size_t i = 0; i < found.count(); ++i)
            if (i < 4 || i + 1 == found.count()) // of a long array some elements
                places.push_back({found.offset + i * found.element_size(), found.element_size()});
    }
    void begin_list(const vmstate::vmdesc_field&, std::uint64_t, std::uint64_t offset) override {
        places.push_back({offset, 1});
    }
    void begin_subsection(const vmstate::vmdesc_body& body, std::uint64_t offset) override {
        places.push_back({offset, 1});
        places.push_back({offset + 1, 1});
        places.push_back({offset + 2 + body.vmsd_name.size(), 4});
    }
};

std::vector<integers_of_a_body::place> integers_of(const recorded_stream& stream) {
    integers_of_a_body found;
    auto& places = found.places;
    places.push_back({9, 4});                          // length of the machine's name
    places.push_back({stream.location.offset - 4, 4}); // length of the description
    for (const recorded_section& section : stream.sections) {
        const auto& header = section.header;
        places.push_back({header.offset, 1});
        places.push_back({header.offset + 1, 4});                            // section id
        places.push_back({header.offset + 5, 1});                            // length of the name
        places.push_back({header.offset + 6 + header.idstr.size(), 4});      // instance
        places.push_back({header.offset + 10 + header.idstr.size(), 4});     // version
        places.push_back({header.body_offset + section.body.size() + 1, 4}); // the footer's id
        vmstate::memory_reader in(section.body, header.body_offset);
        if (section.description == nullptr || !vmstate::walk_body(*section.description, in, found))
            throw std::runtime_error(header.idstr + " can't be walked");
    }
    // The RAM part is small: each of its bytes may be a length.
    for (std::uint64_t at = stream.ram.begin; at < stream.ram.begin + 256 && at < stream.ram.end; ++at)
        places.push_back({at, 1});
    return places;
}

} // namespace

TEST_CASE("an undamaged stream loads, and is saved as it was") {
    VMSTATE_REQUIRE_QEMU();
    for (const specimen& one : specimens()) {
        CAPTURE(one.name);
        victim machine(one.stream);
        CHECK(machine.load(one.stream.bytes, std::nullopt) == "");
        CHECK(machine.load(one.stream.bytes, std::nullopt, true) == "");
        CHECK(machine.counts().errors == 0);
    }
}

TEST_CASE("every strict prefix of the sections is an error that says where the stream ends") {
    VMSTATE_REQUIRE_QEMU();
    const std::string name = GENERATE("microvm", "pc");
    CAPTURE(name);
    const recorded_stream& stream = of_machine(name);
    victim machine(stream);
    for (std::size_t size = 0; size <= stream.end_of_sections; ++size) {
        const auto errors = machine.counts().errors;
        // A buffer of its own size, so that a sanitizer sees the first byte behind it.
        const std::vector<std::byte> prefix(
            stream.bytes.begin(), stream.bytes.begin() + static_cast<std::ptrdiff_t>(size));
        const std::string complaint = machine.load(prefix, std::nullopt);
        if (complaint != "" || machine.counts().errors != errors + 1) {
            CAPTURE(size);
            FAIL((complaint != "" ? complaint : "a part of a stream was loaded"));
        }
    }
    check_no_memory_hog(machine);
}

TEST_CASE("every prefix that ends in the description, too") {
    VMSTATE_REQUIRE_QEMU();
    const recorded_stream& stream = of_machine("microvm");
    victim machine(stream);
    for (std::size_t size = static_cast<std::size_t>(stream.end_of_sections); size < stream.bytes.size();
         size += 61) {
        CAPTURE(size);
        const std::vector<std::byte> prefix(
            stream.bytes.begin(), stream.bytes.begin() + static_cast<std::ptrdiff_t>(size));
        REQUIRE(machine.load(prefix, size, true) == "");
    }
    check_no_memory_hog(machine);
}

namespace {

void flip_everywhere(const std::string& name) {
    const recorded_stream& stream = of_machine(name);
    victim machine(stream);
    std::vector<std::byte> damaged = stream.bytes;
    for (std::size_t at = 0; at < stream.location.offset; ++at) {
        // Inside a page of memory one byte is as good as another.
        if (at > stream.ram.begin + 256 && at + 256 < stream.ram.end && at % 97 != 0) continue;
        for (unsigned bit = 0; bit <= 8; ++bit) {
            // Of the longer stream two bits of each byte, all of them in turn, and the byte as a whole.
            if (name == "pc" && bit != 8 && bit != at % 8 && bit != (at + 3) % 8) continue;
            const auto mask = static_cast<std::byte>(bit == 8 ? 0xff : 1u << bit);
            damaged[at] = stream.bytes[at] ^ mask;
            machine.resave(bit == at % 8); // not all of them: it takes three times as long
            const std::string complaint = machine.load(damaged, at);
            if (complaint != "") {
                CAPTURE(at, std::to_integer<int>(mask));
                FAIL(complaint);
            }
        }
        damaged[at] = stream.bytes[at];
    }
    check_no_memory_hog(machine);
}

} // namespace

TEST_CASE("flipped bits and bytes of a microvm, one at a time, up to the description") {
    VMSTATE_REQUIRE_QEMU();
    flip_everywhere("microvm");
}

TEST_CASE("flipped bits and bytes of a pc, one at a time, up to the description", "[.pc]") {
    VMSTATE_REQUIRE_QEMU();
    flip_everywhere("pc");
}

TEST_CASE("flipped bytes of the description") {
    VMSTATE_REQUIRE_QEMU();
    const recorded_stream& stream = of_machine("microvm");
    victim machine(stream);
    std::vector<std::byte> damaged = stream.bytes;
    std::size_t turn = 0;
    for (auto at = static_cast<std::size_t>(stream.end_of_sections); at < damaged.size(); at += 5) {
        damaged[at] = stream.bytes[at] ^ static_cast<std::byte>(1u << (turn++ % 8));
        CAPTURE(at);
        REQUIRE(machine.load(damaged, at, true) == "");
        damaged[at] = stream.bytes[at];
    }
    check_no_memory_hog(machine);
}

TEST_CASE("every length, and every other number, at its largest") {
    VMSTATE_REQUIRE_QEMU();
    const std::string name = GENERATE("microvm", "isapc", "pc");
    CAPTURE(name);
    const recorded_stream& stream = of_machine(name);
    victim machine(stream);
    std::vector<std::byte> damaged = stream.bytes;
    const auto places = integers_of(stream);
    CHECK(places.size() > 300);
    for (const auto& place : places) {
        const auto first = damaged.begin() + static_cast<std::ptrdiff_t>(place.offset);
        const auto last = first + static_cast<std::ptrdiff_t>(place.size);
        for (const unsigned top : {0xffu, 0x7fu, 0x80u}) { // unsigned, signed, most negative
            machine.resave(top == 0x7f);
            std::fill(first, last, top == 0x80 ? std::byte{0} : std::byte{0xff});
            *first = static_cast<std::byte>(top);
            const std::string complaint = machine.load(damaged, place.offset);
            if (complaint != "") {
                CAPTURE(place.offset, place.size, top);
                FAIL(complaint);
            }
        }
        std::copy_n(stream.bytes.begin() + static_cast<std::ptrdiff_t>(place.offset), place.size, first);
    }
    check_no_memory_hog(machine);
}

/// `interop_damaged_streams "[.seeds]"` writes what tests/fuzz/corpus/machine has: the streams of this file, from the QEMU
/// that is installed, to the directory that $VMSTATE_SEEDS names.
TEST_CASE("seeds for the fuzzer are written where they are asked for", "[.seeds]") {
    VMSTATE_REQUIRE_QEMU();
    const char* directory = std::getenv("VMSTATE_SEEDS");
    REQUIRE(directory != nullptr);
    std::filesystem::create_directories(directory);
    for (const specimen& one : specimens())
        write_file(std::filesystem::path(directory) / (one.name + ".state"), one.stream.bytes);
}
