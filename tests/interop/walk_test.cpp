// SPDX-License-Identifier: BSL-1.0
// Streams that a QEMU wrote, walked to the last byte: of every machine, stopped and running, with many devices, and in
// postcopy; and what becomes of the walk when such a stream is cut off or changed.
#include "support/catch.hpp"
#include "support/qemu.hpp"

#include <vmstate/machine/stream_walk.hpp>
#include <vmstate/machine/vmdesc_parse.hpp>
#include <vmstate/support/unique_fd.hpp>

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace vmstate;
using namespace vmstate::tests;

namespace {

/// Checks that items follow each other without a gap, and counts them.
class tiling_visitor final : public stream_visitor {
public:
    explicit tiling_visitor(std::span<const std::byte> stream) : stream_(stream) {}

    void configuration(const stream_configuration& found) override {
        machine = found.machine;
        uuid = found.uuid;
        capabilities = found.capabilities.value_or(std::vector<std::string>());
        cover(found.offset, found.offset + found.size);
    }
    void command(const stream_command& found) override {
        commands.emplace_back(found.name());
        cover(found.offset, found.offset + 5 + found.payload.size());
    }
    void discard(const ram_discard& range) override { discards.push_back(range); }
    void begin_package(std::uint64_t offset, std::uint64_t size) override {
        CHECK(offset == next_);
        package_end_ = offset + size;
    }
    void end_package() override { CHECK(next_ == package_end_); }
    void begin_ram(const stream_section& section, std::size_t) override { ram_begin_ = section.offset; }
    void ram_block(const stream_ram_block& block, std::size_t index) override {
        CHECK(index == blocks.size());
        blocks.push_back(block);
    }
    void ram_page(const ram_record& record, std::size_t block, std::span<const std::byte>) override {
        ++pages;
        pages_outside += record.value + 4096 > blocks.at(block).used_length;
    }
    void end_ram(std::uint64_t end) override { cover(ram_begin_, end); }
    void device(const stream_section& section, const vmdesc_device* description,
        std::span<const std::byte> body, body_extent extent) override {
        if (description != nullptr) {
            CHECK(extent == body_extent::described);
            CHECK(body.size() == body_size(*description));
            described.push_back(description);
        }
        sizes[section.name()] = body.size();
        ++devices;
        CHECK(body.data() == stream_.data() + section.body_offset);
        cover(section.offset, section.body_offset + body.size() + 5);
    }
    void end_of_sections(std::uint64_t offset) override { cover(offset, offset + 1); }
    void description(const vmdesc_location& found) override {
        CHECK(found.offset == next_ + 5);
        next_ = found.offset + found.size;
    }
    void problem(const error& found) override { problems.push_back(found.message()); }

    bool is_whole() const { return next_ == stream_.size(); }

    std::string machine;
    std::optional<std::array<std::uint8_t, 16>> uuid;
    std::vector<std::string> capabilities;
    std::vector<std::string> commands;
    std::vector<ram_discard> discards;
    std::vector<stream_ram_block> blocks;
    std::vector<const vmdesc_device*> described;
    std::map<std::string, std::size_t> sizes;
    std::size_t devices = 0;
    std::uint64_t pages = 0;
    std::uint64_t pages_outside = 0;
    std::vector<std::string> problems;

private:
    void cover(std::uint64_t begin, std::uint64_t end) {
        CHECK(begin == next_);
        next_ = end;
    }

    std::span<const std::byte> stream_;
    std::uint64_t next_ = 8;
    std::uint64_t ram_begin_ = 0;
    std::uint64_t package_end_ = 0;
};

struct described_stream {
    vmdesc description;
    vmdesc_location location;
};
described_stream described_by(std::span<const std::byte> stream) {
    described_stream found;
    const result<vmdesc_location> location = find_vmdesc(stream);
    if (!location)
        FAIL(location.error().message());
    found.location = *location;
    result<vmdesc> parsed = parse_vmdesc(location->text_in(stream), {}, location->offset);
    if (!parsed)
        FAIL(parsed.error().message());
    found.description = std::move(*parsed);
    return found;
}

void check_whole(std::span<const std::byte> stream, tiling_visitor& seen) {
    const described_stream own = described_by(stream);
    stream_walk_options options;
    options.description = &own.description;
    options.location = own.location;
    const result<void> walked = walk_stream(stream, options, seen);
    if (!walked)
        FAIL(walked.error().message());
    CHECK(seen.is_whole());
    CHECK(seen.pages > 0);
    CHECK(seen.pages_outside == 0);
    // The description lists the sections in the order of the stream.
    REQUIRE(seen.described.size() == own.description.devices.size());
    for (std::size_t i = 0; i < seen.described.size(); ++i) {
        CHECK(seen.described[i] == &own.description.devices[i]);
        CHECK(parse_vmdesc(R"({"devices": [)" + seen.described[i]->raw_json + "]}").has_value());
    }
}

void switch_on(qemu& machine, std::initializer_list<std::string_view> capabilities) {
    boost::json::array list;
    for (const std::string_view capability : capabilities)
        list.push_back(boost::json::object{{"capability", capability}, {"state", true}});
    machine.execute("migrate-set-capabilities", {{"capabilities", std::move(list)}});
}

std::vector<std::byte> stream_of(qemu& machine) {
    const std::filesystem::path file = machine.directory() / "vm.state";
    const migration_outcome outcome = machine.migrate_to_file(file);
    if (!outcome.completed)
        FAIL(outcome.error);
    return read_file(file);
}

/// The error that a walk with whatever description can be found begins with; none where the stream is whole.
/// `items` are the blocks and sections that it comes by, each section with its place.
std::optional<error> first_problem(
    std::span<const std::byte> stream, std::vector<std::string>* items = nullptr) {
    struct quiet : stream_visitor {
        std::vector<std::string> items;
        void ram_block(const stream_ram_block& block, std::size_t) override { items.push_back(block.name); }
        void begin_ram(const stream_section& section, std::size_t) override { add(section, 0); }
        void device(const stream_section& section, const vmdesc_device*, std::span<const std::byte> body,
            body_extent) override {
            add(section, body.size());
        }
        void add(const stream_section& section, std::size_t size) {
            items.push_back(section.name() + " at " + std::to_string(section.offset) + ": " + std::to_string(size));
        }
    } seen;
    vmdesc tree;
    stream_walk_options options;
    if (const result<vmdesc_location> location = find_vmdesc(stream)) {
        result<vmdesc> parsed = parse_vmdesc(location->text_in(stream), {}, location->offset);
        if (!parsed)
            return parsed.error();
        tree = std::move(*parsed);
        options.description = &tree;
        options.location = *location;
    }
    const result<void> walked = walk_stream(stream, options, seen);
    if (items != nullptr)
        *items = std::move(seen.items);
    if (!walked)
        return walked.error();
    return std::nullopt;
}

} // namespace

TEST_CASE(
    "the stream of every machine is walked to its last byte, stopped at the start and after the firmware ran") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "isapc", "microvm", "q35", "none");
    const bool stopped = GENERATE(true, false);
    CAPTURE(machine, stopped);
    qemu source({.machine = machine, .stopped = stopped});
    if (!stopped) {
        std::this_thread::sleep_for(std::chrono::seconds(3));
        source.stop();
    }
    const std::vector<std::byte> stream = stream_of(source);
    tiling_visitor seen(stream);
    check_whole(stream, seen);
    CHECK(seen.machine.find(machine) != std::string::npos);
    CHECK(seen.sizes.at("globalstate") == 104);
    CHECK(seen.sizes.at("timer") == 24);
    CHECK(seen.devices >= (machine == "none" ? 2 : machine == "microvm" ? 14 : 20));
    CHECK(seen.blocks.at(0).used_length == 16 << 20);
}

TEST_CASE("a stream with many kinds of devices is walked to its last byte") {
    VMSTATE_REQUIRE_QEMU();
    const std::vector<std::string> arguments{"-uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "-smp", "2",
        "-blockdev", "null-co,node-name=d,read-zeroes=on", "-device", "virtio-blk-pci,drive=d", "-device",
        "virtio-net-pci", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci", "-device",
        "virtio-scsi-pci", "-device", "virtio-serial-pci", "-device", "virtserialport", "-device",
        "qemu-xhci", "-device", "usb-tablet", "-device", "usb-kbd", "-device", "ich9-usb-ehci1", "-device",
        "e1000e", "-device", "rtl8139", "-device", "vmxnet3", "-device", "pcie-root-port,id=root1", "-device",
        "virtio-iommu-pci", "-device", "intel-hda", "-device", "i6300esb", "-device", "VGA", "-serial",
        "null"};
    qemu source({.machine = "q35", .memory = "32M", .arguments = arguments});
    switch_on(source, {"validate-uuid", "x-ignore-shared"});
    std::this_thread::sleep_for(std::chrono::seconds(2));
    source.stop();
    const std::vector<std::byte> stream = stream_of(source);
    tiling_visitor seen(stream);
    check_whole(stream, seen);
    CHECK(seen.devices > 45);
    CHECK(seen.sizes.count("cpu#1") == 1);
    REQUIRE(seen.uuid.has_value());
    CHECK(seen.uuid->at(0) == 0x6b);
    CHECK(seen.uuid->at(15) == 0xc8);
    CHECK(seen.capabilities == std::vector<std::string>{"x-ignore-shared"});
    CHECK(std::all_of(seen.blocks.begin(), seen.blocks.end(),
        [](const stream_ram_block& block) { return block.guest_address.has_value(); }));
}

TEST_CASE("a stream that is cut off anywhere is an error at a place within it") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("microvm", "pc");
    CAPTURE(machine);
    qemu source({.machine = machine, .stopped = true});
    const std::vector<std::byte> stream = stream_of(source);
    const described_stream own = described_by(stream);
    const std::uint64_t end_of_sections = own.location.offset - 5;
    const std::uint64_t first_device = [&] {
        struct : stream_visitor {
            std::uint64_t offset = 0;
            void device(const stream_section& section, const vmdesc_device*, std::span<const std::byte>,
                body_extent) override {
                if (offset == 0)
                    offset = section.offset;
            }
        } seen;
        stream_walk_options options;
        options.description = &own.description;
        (void)walk_stream(stream, options, seen);
        return seen.offset;
    }();
    REQUIRE(first_device != 0);

    const auto check = [&](std::uint64_t size) {
        const std::optional<error> problem =
            first_problem(std::span<const std::byte>(stream).first(static_cast<std::size_t>(size)));
        // Without its description a stream is whole, though nobody can know where its devices end.
        if (size == end_of_sections)
            return;
        if (!problem)
            FAIL("a stream of " << size << " bytes is taken as whole");
        if (problem->offset() > size)
            FAIL(problem->message() << " with " << size << " bytes");
    };
    for (std::uint64_t size = 0; size < 400; ++size)
        check(size);
    for (std::uint64_t size = 400; size < first_device; size += first_device / 150)
        check(size);
    for (std::uint64_t size = first_device; size < end_of_sections + 10; size += 17)
        check(size);
    for (std::uint64_t size = end_of_sections + 10; size < stream.size(); size += stream.size() / 200)
        check(size);
    check(stream.size() - 1);
}

TEST_CASE("a stream with a changed byte is an error, or has all of its sections with another value in one") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("none", "microvm", "pc");
    CAPTURE(machine);
    qemu source({.machine = machine, .stopped = true});
    std::vector<std::byte> stream = stream_of(source);
    const std::uint64_t text = described_by(stream).location.offset;
    const std::size_t devices =
        machine == "none" ? 400 : 30000; // bytes before the description, and more, are of devices
    std::mt19937 random(20240229);       // the same bytes every time
    std::size_t problems = 0;
    std::vector<std::string> unchanged;
    REQUIRE(!first_problem(stream, &unchanged));
    REQUIRE(unchanged.size() > 3);
    const std::string_view text_of_stream(reinterpret_cast<const char*>(stream.data()), stream.size());
    const std::size_t ram_name = text_of_stream.find("\x03ram") + 1;
    REQUIRE(ram_name < 60);
    const auto check = [&](std::uint64_t offset, int value) {
        std::byte& byte = stream[static_cast<std::size_t>(offset)];
        const std::byte kept = byte;
        byte = static_cast<std::byte>(value);
        std::vector<std::string> items;
        if (const std::optional<error> problem = first_problem(stream, &items)) {
            ++problems;
            if (problem->message().empty())
                FAIL("an error without a message");
            if (problem->offset() > stream.size())
                FAIL("an error behind the end: " << problem->message());
            if (byte == kept)
                FAIL("an error without a change: " << problem->message());
        } else if (offset >= ram_name - 1 && offset < ram_name + 7) { // with its length, and the instance
            // A live section that isn't "ram" is one of some other device, and in no description: its parts end where
            // footers are. Nobody can know that it was memory.
        } else if (items != unchanged) {
            // Neither a section nor a block of memory may be lost, or come from nowhere, without a word.
            FAIL("offset " << offset << ", value " << value << ": " << items.size() << " items instead of "
                           << unchanged.size());
        }
        byte = kept;
    };
    const auto check_some = [&](std::uint64_t begin, std::uint64_t end, int count) {
        std::uniform_int_distribution<std::uint64_t> place(begin, end - 1);
        for (int i = 0; i < count; ++i) {
            const std::uint64_t offset = place(random);
            check(offset, std::to_integer<int>(stream[static_cast<std::size_t>(offset)]) ^ (1 << i % 8));
            check(offset, i % 2 == 0 ? 0xff : 0);
        }
    };
    const int share = machine == "pc" ? 1 : 3; // the larger the stream, the longer each walk
    check_some(0, 200, 50 * share);
    check_some(200, text, 40 * share);
    check_some(text > devices ? text - devices : 0, text, 150 * share);
    check_some(text, stream.size(), 60 * share);
    CHECK(problems > 100);
    CHECK(!first_problem(stream));
}

// ---- postcopy -----------------------------------------------------------------------------------------------

namespace {

unique_fd listen_at(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    REQUIRE(path.size() < sizeof address.sun_path);
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    unique_fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(fd.get(), 1) == 0);
    return fd;
}
unique_fd connect_to(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    unique_fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
        return {};
    return fd;
}

/// Sits between two QEMUs, passes on what each says, and keeps what the source says.
class wiretap {
public:
    wiretap(const std::string& listen, std::string destination)
        : listener_(listen_at(listen)), destination_(std::move(destination)), thread_([this] { run(); }) {}
    ~wiretap() {
        stop_ = true;
        if (thread_.joinable())
            thread_.join();
    }
    /// All that the source said, once it has hung up.
    std::vector<std::byte> finish() {
        thread_.join();
        return std::move(said_);
    }

private:
    bool wait(std::array<pollfd, 2>& ends, nfds_t count) {
        for (;;) {
            const int ready = ::poll(ends.data(), count, 100);
            if (ready > 0)
                return true;
            if (stop_ || ready < 0)
                return false;
        }
    }
    void run() {
        std::array<pollfd, 2> ends{pollfd{listener_.get(), POLLIN, 0}, pollfd{-1, 0, 0}};
        if (!wait(ends, 1))
            return;
        const unique_fd source(::accept(listener_.get(), nullptr, nullptr));
        const unique_fd destination = connect_to(destination_);
        std::vector<std::byte> buffer(1 << 16);
        bool source_open = true;
        bool destination_open = true;
        while (source_open) {
            ends = {pollfd{source.get(), POLLIN, 0},
                pollfd{destination_open ? destination.get() : -1, POLLIN, 0}};
            if (!wait(ends, 2))
                return;
            if (ends[0].revents != 0) {
                const ssize_t size = ::read(source.get(), buffer.data(), buffer.size());
                source_open = size > 0;
                if (!source_open)
                    break;
                said_.insert(said_.end(), buffer.begin(), buffer.begin() + size);
                pass(destination.get(), buffer.data(), static_cast<std::size_t>(size));
            }
            if (ends[1].revents != 0) {
                const ssize_t size = ::read(destination.get(), buffer.data(), buffer.size());
                destination_open = size > 0;
                if (destination_open)
                    pass(source.get(), buffer.data(), static_cast<std::size_t>(size));
                else
                    ::shutdown(source.get(), SHUT_WR);
            }
        }
    }
    static void pass(int fd, const std::byte* data, std::size_t size) {
        while (size != 0) {
            const ssize_t written = ::send(fd, data, size, MSG_NOSIGNAL);
            if (written <= 0)
                return;
            data += written;
            size -= static_cast<std::size_t>(written);
        }
    }

    unique_fd listener_;
    std::string destination_;
    std::vector<std::byte> said_;
    std::atomic<bool> stop_ = false;
    std::thread thread_;
};

} // namespace

TEST_CASE("a postcopy stream is walked, its package by another stream's description") {
    VMSTATE_REQUIRE_QEMU();
    qemu destination({.machine = "pc", .arguments = {"-incoming", "defer"}});
    try {
        switch_on(destination, {"postcopy-ram"});
    } catch (const qemu_error& failure) {
        return skip(std::string("no postcopy here: ") + failure.what());
    }
    const std::string incoming = destination.directory() / "incoming.sock";
    destination.execute("migrate-incoming", {{"uri", "unix:" + incoming}});

    qemu source({.machine = "pc"});
    switch_on(source, {"postcopy-ram"});
    source.execute("migrate-set-parameters", {{"max-bandwidth", 100'000}});
    const std::string tapped = source.directory() / "tapped.sock";
    wiretap tap(tapped, incoming);
    source.execute("migrate", {{"uri", "unix:" + tapped}});
    for (std::string status; status != "active";) {
        status = std::string(source.execute("query-migrate").as_object().at("status").as_string());
        REQUIRE((status == "setup" || status == "active" || status == "none"));
    }
    source.execute("migrate-start-postcopy");
    source.execute("migrate-set-parameters", {{"max-bandwidth", 1 << 30}});
    for (std::string status; status != "completed";) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        status = std::string(source.execute("query-migrate").as_object().at("status").as_string());
        REQUIRE(status != "failed");
    }
    source.quit();
    const std::vector<std::byte> stream = tap.finish();

    CHECK(!find_vmdesc(stream));
    tiling_visitor alone(stream);
    const result<void> walked = walk_stream(stream, {}, alone);
    if (!walked)
        FAIL(walked.error().message());
    CHECK(alone.is_whole());
    REQUIRE(alone.commands.size() >= 8);
    CHECK(alone.commands[0] == "OPEN_RETURN_PATH");
    CHECK(alone.commands[2] == "POSTCOPY_ADVISE");
    CHECK(alone.commands.back() == "PING");
    CHECK(std::count(alone.commands.begin(), alone.commands.end(), "PACKAGED") == 1);
    CHECK(std::count(alone.commands.begin(), alone.commands.end(), "POSTCOPY_RUN") == 1);
    CHECK(!alone.discards.empty());

    // The same machine's precopy stream says what is in the sections, and where they end: at the same places.
    qemu other({.machine = "pc"});
    std::this_thread::sleep_for(std::chrono::seconds(1));
    other.stop();
    const std::vector<std::byte> precopy = stream_of(other);
    const described_stream borrowed = described_by(precopy);
    tiling_visitor sizes_there(precopy);
    check_whole(precopy, sizes_there);
    CHECK(alone.devices == sizes_there.devices);
    std::size_t same = 0;
    for (const auto& [name, size] : alone.sizes)
        same += sizes_there.sizes.count(name) == 1 && sizes_there.sizes.at(name) == size;
    CHECK(same >= 25); // a subsection may be in one of them alone
    stream_walk_options options;
    options.description = &borrowed.description;
    struct : stream_visitor {
        std::size_t described = 0;
        void device(const stream_section&, const vmdesc_device*, std::span<const std::byte>,
            body_extent extent) override {
            described += extent == body_extent::described;
        }
    } by_other;
    CHECK(walk_stream(stream, options, by_other).has_value());
    CHECK(by_other.described >= 25);

    for (std::size_t size = 0; size < stream.size(); size += stream.size() / 300)
        CHECK(first_problem(std::span<const std::byte>(stream).first(size)).has_value());
}
