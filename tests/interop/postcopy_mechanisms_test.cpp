// SPDX-License-Identifier: BSL-1.0
// Postcopy's mechanisms against a real QEMU that is the source: its discards, its answers to our requests, and, after the
// connection was cut, what it makes of our bitmaps. Threads play the guest; at the end they have seen QEMU's memory.
#include <support/catch.hpp>
#include <support/huge_pages.hpp>
#include <support/qemu.hpp>

#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/postcopy/discard_memory.hpp>
#include <vmstate/postcopy/fault_thread.hpp>
#include <vmstate/postcopy/page_assembler.hpp>
#include <vmstate/postcopy/received_bitmap.hpp>
#include <vmstate/postcopy/state.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/listener.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;
using vmstate::migration::return_message;

namespace {

constexpr std::size_t page_size = 4096;
constexpr std::size_t guest_memory = std::size_t{16} << 20;

/// A destination that understands no device: it takes RAM, and passes over the package.
class ram_destination {
public:
    ram_destination()
        : received_(page_size), placer_(received_), requests_(received_), faults_(placer_, requests_, statistics_, {}) {}
    ~ram_destination() {
        // After a failure the guest waits for pages that never come: what is missing reads as zero then.
        if (progress_.now() != postcopy_state::end && !guests_.empty())
            for (const auto& block : ram.blocks()) (void)placer_.fault().remove(block->used());
        for (std::thread& one : guests_)
            if (one.joinable()) one.join();
    }

    void connect(std::unique_ptr<duplex_channel> channel) {
        reader_.reset();
        sender_.reset();
        channel_ = std::move(channel);
        channel_->set_timeout(60s);
        way_back_ = channel_->get_return_path().value();
        sender_.emplace(*way_back_);
        reader_.emplace(*channel_);
    }
    void read_header() {
        reader& in = *reader_;
        REQUIRE(in.get_be32() == stream_magic);
        REQUIRE(in.get_be32() == stream_version);
        REQUIRE(in.get_u8() == static_cast<std::uint8_t>(section_type::configuration));
        in.skip(in.get_be32());
    }
    /// Reads until the stream's end, or until so many pages came in postcopy; then it cuts the connection. Whether it was
    /// the end.
    bool read_items(std::size_t pages) {
        reader& in = *reader_;
        pages_left_ = pages;
        for (;;) {
            const auto type = static_cast<section_type>(in.get_u8());
            if (in.failed()) FAIL(in.failure().message());
            switch (type) {
            case section_type::eof: return true;
            case section_type::command: obey(); break;
            case section_type::start:
                ram_id_ = in.get_be32();
                REQUIRE(in.get_counted_string() == "ram");
                in.skip(4);
                REQUIRE(in.get_be32() == 4);
                read_ram();
                break;
            case section_type::part:
            case section_type::end:
                REQUIRE(in.get_be32() == ram_id_);
                read_ram();
                break;
            default: FAIL("section type " << static_cast<int>(type));
            }
            if (type != section_type::command && pages_left_ != 0) {
                REQUIRE(in.get_u8() == static_cast<std::uint8_t>(section_type::footer));
                REQUIRE(in.get_be32() == ram_id_);
            }
            if (pages_left_ == 0) {
                requests_.disconnect();
                channel_->shutdown();
                assembler_.drop();
                records_.forget_block();
                REQUIRE(progress_.enter(postcopy_state::paused));
                return false;
            }
        }
    }
    /// At the end: the guest has what it waited for.
    void finish() {
        for (std::thread& one : guests_) one.join();
        faults_.stop();
        REQUIRE(progress_.enter(postcopy_state::end));
        REQUIRE(sender_->send(return_message::shut, 0));
    }

    ram_section ram;
    std::size_t discards = 0;
    std::size_t bitmaps = 0;
    std::vector<std::byte> seen = std::vector<std::byte>(guest_memory); ///< by the guest, when it touched a page first

    std::uint64_t requested() const { return requests_.sent(); }
    std::size_t waiting() const { return requests_.waiting(); }
    std::size_t received(const ram_block& block) const { return received_.snapshot(block).count(); }
    postcopy_fault_status status() const { return statistics_.snapshot(); }

private:
    void obey() {
        reader& in = *reader_;
        const auto number = static_cast<command>(in.get_be16());
        std::vector<std::byte> payload(in.get_be16());
        REQUIRE(in.read(payload.data(), payload.size()));
        memory_reader values(payload);
        switch (number) {
        case command::open_return_path: break;
        case command::ping: REQUIRE(sender_->send(return_message::pong, values.get_be32())); break;
        case command::postcopy_advise:
            page_sizes_ = values.get_be64();
            REQUIRE(values.get_be64() == page_size);
            REQUIRE(progress_.enter(postcopy_state::advise));
            break;
        case command::postcopy_ram_discard: {
            REQUIRE(progress_.enter_or_stay(postcopy_state::discard).has_value());
            const result<discard_command> discard = decode_discard(payload, ram);
            if (!discard) FAIL(discard.error().message());
            CHECK(discard->ranges.size() <= max_discards_per_command);
            // We would have said it with the same bytes.
            REQUIRE(encode_discards(discard->block->name, discard->ranges, [&](std::span<const std::byte> ours) -> result<void> {
                CHECK(std::equal(ours.begin(), ours.end(), payload.begin(), payload.end()));
                return {};
            }));
            for (const ram_range& range : discard->ranges) {
                REQUIRE(discard_range(*discard->block, range));
                received_.clear(*discard->block, range.start, range.length);
                ++discards;
            }
            break;
        }
        case command::packaged: {
            std::vector<std::byte> package(values.get_be32());
            REQUIRE(in.read(package.data(), package.size()));
            // LISTEN first, RUN last.
            const std::vector<unsigned char> begin{8, 0, 4, 0, 0};
            const std::vector<unsigned char> end{8, 0, 5, 0, 0};
            REQUIRE(std::memcmp(package.data(), begin.data(), begin.size()) == 0);
            REQUIRE(std::memcmp(package.data() + package.size() - end.size(), end.data(), end.size()) == 0);
            REQUIRE(progress_.enter(postcopy_state::listen));
            REQUIRE(placer_.start());
            REQUIRE(requests_.connect(send()));
            REQUIRE(faults_.start());
            REQUIRE(progress_.enter(postcopy_state::running));
            run_guest();
            break;
        }
        case command::recv_bitmap: {
            if (progress_.now() == postcopy_state::paused) REQUIRE(progress_.enter(postcopy_state::recover));
            const std::string name = values.get_counted_string();
            const ram_block* const block = ram.find(name);
            REQUIRE(block != nullptr);
            vector_writer blob;
            encode_received_bitmap(blob, received_.snapshot(*block));
            const std::span<const std::byte> bytes = blob.written();
            REQUIRE(sender_->send(return_message::recv_bitmap, payload));
            REQUIRE(way_back_->writev({&bytes, 1}));
            ++bitmaps;
            break;
        }
        case command::postcopy_resume:
            REQUIRE(progress_.enter(postcopy_state::running));
            REQUIRE(sender_->send(return_message::resume_ack, 1));
            REQUIRE(requests_.connect(send()));
            break;
        case command::switchover_start: REQUIRE(payload.empty()); break; // of a QEMU 10.0 or newer
        default: FAIL("command " << static_cast<int>(number));
        }
    }
    page_requests::send_function send() {
        return [this](const page_request_message& message) {
            return sender_->send(static_cast<return_message>(message.type()), message.payload());
        };
    }
    void read_ram() {
        reader& in = *reader_;
        ram_record record;
        while (pages_left_ != 0) {
            if (!records_.next(in, record)) FAIL(in.failure().message());
            if (record.kind == ram_record_kind::end_of_section) return;
            if (record.kind == ram_record_kind::multifd_flush) continue;
            if (record.kind == ram_record_kind::block_list) {
                read_blocks(record.value);
                continue;
            }
            ram_block& block = *ram.find(records_.block());
            if (progress_.now() == postcopy_state::running) {
                const result<void> placed = assembler_.load(in, record, block);
                if (!placed) FAIL(placed.error().message());
                --pages_left_;
                continue;
            }
            const std::span<std::byte> page = block.page(record.value, page_size);
            if (record.kind == ram_record_kind::page) REQUIRE(in.read(page.data(), page.size()));
            else std::memset(page.data(), record.fill, page.size());
            received_.mark(block, record.value, page_size);
        }
    }
    void read_blocks(std::uint64_t total) {
        ram_block_list list(total, {page_sizes_, false, false});
        ram_block_entry entry;
        while (!list.done()) {
            REQUIRE(list.next(*reader_, entry));
            ram_options options;
            options.host_page_size = entry.page_size.value_or(page_size);
            result<ram_memory> memory = ram_memory::anonymous(entry.used_length, options.host_page_size);
            REQUIRE(memory.has_value());
            const std::span<std::byte> span = memory->span();
            ram.insert(std::make_unique<ram_block>(
                ram_block{std::string(entry.name), span, entry.used_length, options, std::move(*memory)}));
        }
        CHECK(ram.page_size_summary() == page_sizes_);
        for (const auto& block : ram.blocks()) received_.add(*block);
        REQUIRE(check_postcopy_support(ram));
    }
    void run_guest() {
        const std::span<std::byte> memory = ram.find("pc.ram")->memory;
        for (unsigned i = 0; i < 2; ++i)
            guests_.emplace_back([this, memory, i] {
                std::vector<std::size_t> order(memory.size() / page_size / 2);
                std::iota(order.begin(), order.end(), i * order.size());
                std::shuffle(order.begin(), order.end(), std::mt19937(i));
                for (const std::size_t page : order)
                    std::memcpy(seen.data() + page * page_size, memory.data() + page * page_size, page_size);
            });
    }

    std::unique_ptr<duplex_channel> channel_;
    std::unique_ptr<duplex_channel> way_back_;
    std::optional<migration::return_path_sender> sender_;
    std::optional<buffered_reader> reader_;
    std::uint32_t ram_id_ = 0;
    std::uint64_t page_sizes_ = 0;
    std::size_t pages_left_ = 0;
    ram_record_reader records_{page_size};

    postcopy_progress progress_;
    received_pages received_;
    page_placer placer_;
    page_requests requests_;
    postcopy_statistics statistics_;
    fault_thread faults_;
    page_assembler assembler_{placer_};
    std::vector<std::thread> guests_;
};

std::string status_of(qemu& source) {
    return std::string(source.execute("query-migrate").as_object().at("status").as_string());
}
void wait_status(qemu& source, const std::string& wanted) {
    for (std::string status; status != wanted; std::this_thread::sleep_for(10ms)) {
        status = status_of(source);
        if (status == "failed") FAIL("failed instead of " << wanted << ": " << source.complaints());
    }
}

/// A QEMU half full of something, on its way to us, where it is told to go on in postcopy.
qemu start_source(const temporary_directory& where, const std::string& uri, bool huge) {
    std::vector<std::byte> content(guest_memory / 2);
    std::mt19937 random(1);
    for (std::byte& b : content) b = static_cast<std::byte>(random());
    write_file(where / "content", content);
    std::vector<std::string> arguments{
        "-device", "loader,addr=0x400000,force-raw=on,file=" + (where / "content").string()};
    if (huge)
        for (const char* const argument :
            {"-object", "memory-backend-memfd,id=pc.ram,size=16M,hugetlb=on,hugetlbsize=2M", "-machine", "memory-backend=pc.ram"})
            arguments.emplace_back(argument);
    qemu source({.machine = "pc", .arguments = arguments});
    source.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{boost::json::object{{"capability", "postcopy-ram"}, {"state", true}}}}});
    source.execute("migrate-set-parameters", {{"max-bandwidth", 200'000}, {"max-postcopy-bandwidth", 16 << 20}});
    source.execute("migrate", {{"uri", uri}});
    return source;
}
void check_memory(qemu& source, const ram_destination& destination, bool huge) {
    CHECK(destination.ram.page_size_summary() == (huge ? 0x201000U : 0x1000U));
    const std::vector<std::byte> memory = source.memory(0, guest_memory);
    std::size_t wrong = 0;
    for (std::size_t offset = 0; offset < guest_memory; offset += page_size) {
        // There the processor sees a screen and firmware, not RAM.
        if (offset >= 0xa0000 && offset < 0x100000) continue;
        if (std::memcmp(memory.data() + offset, destination.seen.data() + offset, page_size) != 0) ++wrong;
    }
    CHECK(wrong == 0);
    for (const auto& block : destination.ram.blocks()) CHECK(destination.received(*block) == block->used_length / page_size);
    CHECK(destination.waiting() == 0);
    CHECK(destination.discards != 0);
    CHECK(destination.status().faults != 0);
}
bool has_userfaultfd() {
    if (userfault::open(userfault_scope::user_and_kernel, 0)) return true;
    skip("no userfaultfd for faults of system calls here (vm.unprivileged_userfaultfd)");
    return false;
}

} // namespace

TEST_CASE("a QEMU's guest memory arrives in postcopy, by its own stream and by our requests") {
    VMSTATE_REQUIRE_QEMU();
    if (!has_userfaultfd()) return;
    const bool huge = GENERATE(false, true);
    INFO((huge ? "huge pages" : "small pages"));
    // QEMU's memory and ours.
    const huge_pages reserved(huge ? 16 : 0);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    const temporary_directory where;
    result<socket_listener> listener = socket_listener::listen("unix:" + (where / "sock").string());
    REQUIRE(listener.has_value());
    qemu source = start_source(where, listener->uri(), huge);
    wait_status(source, "active");
    source.execute("migrate-start-postcopy");
    ram_destination destination;
    destination.connect(listener->accept().value());
    destination.read_header();
    REQUIRE(destination.read_items(~std::size_t{0}));
    destination.finish();
    wait_status(source, "completed");
    check_memory(source, destination, huge);
    // It counts what it was asked for.
    const boost::json::value counted =
        source.execute("query-migrate").as_object().at("ram").as_object().at("postcopy-requests");
    CHECK(counted.to_number<std::uint64_t>() == destination.requested());
}

TEST_CASE("a QEMU goes on after the connection was cut, with what our bitmaps say is missing") {
    VMSTATE_REQUIRE_QEMU();
    if (!has_userfaultfd()) return;
    const bool huge = GENERATE(false, true);
    INFO((huge ? "huge pages" : "small pages"));
    // QEMU's memory and ours.
    const huge_pages reserved(huge ? 16 : 0);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    const temporary_directory where;
    result<socket_listener> listener = socket_listener::listen("unix:" + (where / "sock").string());
    REQUIRE(listener.has_value());
    qemu source = start_source(where, listener->uri(), huge);
    wait_status(source, "active");
    source.execute("migrate-start-postcopy");
    ram_destination destination;
    destination.connect(listener->accept().value());
    destination.read_header();
    std::size_t cuts = 0;
    for (const std::size_t pages : {std::size_t{1}, std::size_t{200}, std::size_t{777}, ~std::size_t{0}}) {
        if (destination.read_items(pages)) break;
        ++cuts;
        wait_status(source, "postcopy-paused");
        source.execute("migrate", {{"uri", listener->uri()}, {"resume", true}});
        destination.connect(listener->accept().value());
    }
    CHECK(cuts == 3);
    destination.finish();
    wait_status(source, "completed");
    CHECK(destination.bitmaps == cuts * destination.ram.blocks().size());
    check_memory(source, destination, huge);
}
