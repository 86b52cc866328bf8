// SPDX-License-Identifier: BSL-1.0
//
// The destination's half of postcopy, from POSTCOPY_ADVISE to the last page: what the main thread does of it, the listen
// thread, and the thread of the preempt channel; through one connection and those after it. Depends on postcopy/, machine/
// and stream/.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/load.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/migration/status.hpp>
#include <vmstate/postcopy/discard.hpp>
#include <vmstate/postcopy/discard_memory.hpp>
#include <vmstate/postcopy/fault_thread.hpp>
#include <vmstate/postcopy/observer.hpp>
#include <vmstate/postcopy/page_assembler.hpp>
#include <vmstate/postcopy/page_placer.hpp>
#include <vmstate/postcopy/page_requests.hpp>
#include <vmstate/postcopy/received_bitmap.hpp>
#include <vmstate/postcopy/received_pages.hpp>
#include <vmstate/postcopy/state.hpp>
#include <vmstate/postcopy/statistics.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/connector.hpp>
#include <vmstate/support/guarded.hpp>
#include <vmstate/support/short_slice.hpp>

namespace vmstate::migration {

/// The main thread calls everything that isn't said to be for others; once the guest is to run it is another one that does,
/// and waits for its memory. From `listen` on there are threads that place pages; what they, or the fault thread, find
/// wrong, and what is thrown there, ends the connection: both channels are shut down, and `wait` says why. Guest memory is
/// touched by the main thread alone, in devices' hooks and where the guest is started; the others never wait for it.
class postcopy_incoming final : public postcopy_listener, public ram_page_listener {
public:
    /// All have to outlive this. `loaded`: the devices are, and the source is about to hear of it; it may refuse that.
    /// `resumed`: a recovery has come to its end; called on the listen thread.
    postcopy_incoming(machine& into, const parameters& settings, return_path& back, std::function<result<void>()> loaded,
        std::function<void()> resumed, std::vector<postcopy_observer*> observers = {})
        : machine_(into)
        , settings_(settings)
        , back_(back)
        , loaded_(std::move(loaded))
        , resumed_(std::move(resumed))
        , observers_(std::move(observers))
        , received_(into.options().guest_page_size())
        , requests_(received_) {}
    ~postcopy_incoming() override { release(); }

    /// The first connection, or the one after a break: `accept` opens more to the same source, and lives until `wait`.
    void connect(std::shared_ptr<input_channel> main, const channel_acceptor& accept) {
        const std::lock_guard lock(session_mutex_);
        main_ = std::move(main);
        accept_ = &accept;
        accepting_ = std::stop_source();
        failure_.reset();
        over_ = false;
        preempt_ended_ = false;
    }
    /// The source was told that RUN may come behind the package.
    void let_run_come_later() noexcept { run_may_come_later_.store(true); }
    /// The source reads requests from the preempt channel, too. False where there is none.
    bool let_preempt_carry_requests() noexcept {
        preempt_carries_requests_.store(settings_.postcopy_preempt);
        return settings_.postcopy_preempt;
    }

    // ---- what the stream asks for, until the guest runs

    /// POSTCOPY_ADVISE: `errc::unsupported`, with reason and remedy, where this can't go on in postcopy.
    result<void> advise() {
        if (result<void> step = progress_.enter(postcopy_state::advise); !step) return step;
        const ram_section* const ram = machine_.ram();
        if (ram == nullptr) return error(errc::unsupported, "memory, to fetch pages for", "none").within("postcopy");
        if (!ram->stream_order().empty()) return error(errc::bad_command, "it before the list of RAM blocks", "it behind");
        if (result<void> fit = check_postcopy_support(*ram); !fit) return fit;
        for (postcopy_observer* const who : observers_) {
            advised_.push_back(who);
            if (result<void> told = who->advise(*ram); !told) return std::move(told.error()).within("postcopy");
        }
        return settings_.postcopy_preempt ? start_preempt(false) : result<void>();
    }
    result<void> blocks_listed() override {
        if (progress_.now() == postcopy_state::none) return {};
        const ram_section& ram = *machine_.ram();
        for (ram_block* const block : ram.stream_order()) {
            if (ram.is_ignored(*block)) continue;
            // All of it comes. Found out now, the source has a guest to stay with.
            if (result<void> gone = try_discard(*block); !gone) return gone;
            received_.add(*block);
            blocks_.emplace(block->name, block);
        }
        return {};
    }
    void page_loaded(const ram_block& block, std::uint64_t offset) noexcept override {
        received_.mark(block, offset, received_.page_size());
    }
    /// The source was told that the block is zero here: its pages need not come.
    void block_is_zero(const ram_block& block) noexcept { received_.mark(block, 0, block.used_length); }

    result<void> discard(std::span<const std::byte> payload, std::uint64_t offset) override {
        const result<postcopy_state> before = progress_.enter_or_stay(postcopy_state::discard);
        if (!before) return before.error();
        if (*before == postcopy_state::advise) prepare();
        const ram_section* const ram = machine_.ram();
        const result<discard_command> command = decode_discard(payload, *ram, offset);
        if (!command) return command.error();
        const ram_block& block = *command->block;
        if (find(block.name) == nullptr)
            return std::move(error(errc::bad_ram, "a block of the stream's list", block.name).at_offset(offset));
        discarded_pages& owed = owed_.try_emplace(&block, block, pages(block.memory.size())).first->second;
        for (const ram_range& range : command->ranges) {
            if (result<void> gone = discard_range(block, range, owed.kind); !gone) return gone;
            received_.clear(block, range.start, range.length);
            owed.pages.set_range(pages(range.start), pages(range.length));
        }
        return {};
    }
    result<void> listen(reader& rest, std::uint32_t ram_section_id) override {
        const postcopy_state before = progress_.now();
        if (result<void> step = progress_.enter(postcopy_state::listen); !step) return step;
        if (!back_.is_open()) return error(errc::bad_command, "OPEN_RETURN_PATH before it", "none");
        if (before == postcopy_state::advise) prepare();
        ram_section_id_ = ram_section_id;
        placer_.emplace(received_);
        faults_.emplace(*placer_, requests_, statistics_, [this](const error& why) { broken(error(why).within("faults")); });
        for (postcopy_observer* const who : advised_)
            placer_->on_placed([who](ram_block& block, std::uint64_t offset, std::uint64_t size) { who->placed(block, offset, size); });
        placer_->on_placed([this](ram_block&, std::uint64_t, std::uint64_t) { count_placed(); });
        if (result<void> started = placer_->start(); !started) return started;
        if (result<void> started = faults_->start(); !started) return started;
        if (result<void> asked = ask(); !asked) return asked;
        for (postcopy_observer* const who : advised_)
            if (result<void> told = who->listen(*faults_); !told) return std::move(told.error()).within("postcopy");
        // From here on nothing comes into being but what is placed.
        for (const auto& [block, owed] : owed_)
            if (result<void> absent = check_absent(*block, owed.pages, received_.page_size()); !absent) return absent;
        {
            const std::lock_guard lock(session_mutex_);
            listening_ = true;
        }
        changed_.notify_all();
        return start_listening(
            [this, &rest, records = machine_.ram()->records()] { return serve_main(rest, records, true); });
    }
    result<void> about_to_run() override {
        if (progress_.now() != postcopy_state::listen) return refuse_step(postcopy_state::running);
        if (result<void> accepted = loaded_(); !accepted) return accepted;
        const std::lock_guard lock(session_mutex_);
        // Of a connection that broke before, the source's guest runs on.
        if (failure_) return *failure_;
        will_run_ = true;
        return {};
    }
    bool may_run_later() const override { return run_may_come_later_.load(); }
    result<void> run() override {
        const std::lock_guard lock(session_mutex_);
        // Of one that breaks behind the answer to that PING nobody knows whether the source has heard it.
        if (failure_ && !will_run_) return *failure_;
        if (result<void> step = progress_.enter(postcopy_state::running); !step) return step;
        running_ = true;
        return {};
    }

    // ---- afterwards

    /// Whether the main stream is the listen thread's.
    bool is_listening() const {
        const std::lock_guard lock(session_mutex_);
        return listening_;
    }
    postcopy_state now() const { return progress_.now(); }

    /// With the package loaded: waits for RUN, where it wasn't there, through as many connections as it takes. Whether the guest
    /// is to run: it isn't, once what has not come is given up.
    bool await_run() {
        std::unique_lock lock(session_mutex_);
        changed_.wait(lock, [&] { return running_ || released_; });
        return running_ && !released_;
    }
    /// Waits for the end of the connection: nothing where every page is there, or what went wrong. No thread but the fault
    /// thread is left.
    result<void> wait() {
        if (listen_.joinable()) listen_.join();
        if (preempt_.joinable()) await_last_pages();
        end_preempt();
        found_pages none{owed_.begin()};
        std::optional<error> missing = find_missing(none);
        const std::lock_guard lock(session_mutex_);
        if (!failure_ && !running_) failure_ = error(errc::bad_command, "POSTCOPY_RUN before the end", "none").within("postcopy");
        if (!failure_) failure_ = std::move(missing);
        if (failure_) return *failure_;
        return {};
    }
    /// After `wait` said that something went wrong: the guest keeps what it has.
    void pause() {
        requests_.disconnect();
        if (!progress_.enter(postcopy_state::paused)) return; // nobody came
        const std::lock_guard lock(statistics_mutex_);
        ++interruptions_;
    }
    /// After `connect` with another connection, whose stream begins without a header.
    result<void> recover() {
        if (result<void> step = progress_.enter(postcopy_state::recover); !step) return step;
        // QEMU 7.2 asks for the bitmaps without having asked for a way back.
        if (result<void> opened = back_.open(*main_); !opened) return opened;
        if (settings_.postcopy_preempt)
            if (result<void> started = start_preempt(true); !started) return started;
        return start_listening([this] {
            buffered_reader in(*main_);
            return serve_main(in, ram_record_reader(received_.page_size()), false);
        });
    }
    /// Everything is there.
    void finish() {
        static_cast<void>(progress_.enter(postcopy_state::end));
        release();
    }
    /// Ends whatever there is: who waits for a page goes on, and finds zeros where none came.
    void release() {
        // Where the migration ended in precopy, well or not, the main channel is the main thread's still, for the last word.
        if (is_listening()) broken(error(errc::io, {}, "given up"));
        if (progress_.now() != postcopy_state::end) {
            const std::lock_guard lock(session_mutex_);
            released_ = true;
        }
        changed_.notify_all();
        requests_.disconnect();
        if (listen_.joinable()) listen_.join();
        end_preempt();
        for (postcopy_observer* const who : advised_) who->end(!faults_ || progress_.now() == postcopy_state::end);
        advised_.clear();
        if (faults_) faults_->stop();
        faults_.reset();
        placer_.reset();
        if (std::exchange(prepared_, false)) set_huge_pages(true);
    }

    /// Any thread: the connection is of no use any more. The first reason counts, and none after its end.
    void broken(error why) {
        const std::lock_guard lock(session_mutex_);
        if (over_ || failure_) return;
        failure_ = std::move(why);
        break_off_locked();
    }
    /// The reason, before the source is told of it and goes; then `break_off`.
    void note_failure(const error& why) {
        const std::lock_guard lock(session_mutex_);
        if (!over_ && !failure_) failure_ = why;
    }
    void break_off() {
        const std::lock_guard lock(session_mutex_);
        break_off_locked();
    }

    /// Any thread.
    postcopy_status status() const {
        postcopy_status now;
        now.state = progress_.now();
        now.requests = requests_.sent();
        now.waiting = requests_.waiting();
        now.faults = statistics_.snapshot();
        const std::lock_guard lock(statistics_mutex_);
        now.interruptions = interruptions_;
        return now;
    }
    /// Before the guest runs.
    void set_vcpu_threads(const std::vector<std::uint32_t>& thread_ids) { statistics_.set_vcpu_threads(thread_ids); }
    /// On the channels whose threads have ended.
    std::uint64_t bytes() const {
        const std::lock_guard lock(session_mutex_);
        return bytes_;
    }

private:
    /// Of a block: the target pages that were thrown away.
    struct discarded_pages {
        discarded_pages(const ram_block& block, std::size_t count) : kind(discard_kind(block)), pages(count) {}

        vmstate::detail::memory_kind kind;
        page_bitmap pages;
    };
    struct preempt_way_back {
        explicit preempt_way_back(std::unique_ptr<duplex_channel> way) : channel(std::move(way)), sender(*channel) {}

        std::unique_ptr<duplex_channel> channel;
        return_path_sender sender;
    };

    void break_off_locked() {
        accepting_.request_stop();
        if (main_) main_->shutdown();
        if (preempt_channel_) preempt_channel_->shutdown();
        changed_.notify_all();
        // The main thread may be waiting for a page, in a device's post_load: it is to come back and find out.
        if (listening_ && !running_ && !will_run_ && placer_)
            received_.for_each_block(
                [&](const ram_block& block) { static_cast<void>(placer_->fault().remove(block.used())); });
    }
    std::size_t pages(std::uint64_t bytes) const noexcept { return static_cast<std::size_t>(bytes / received_.page_size()); }
    ram_block* find(std::string_view name) const {
        const auto found = blocks_.find(name);
        return found != blocks_.end() ? found->second : nullptr;
    }
    void prepare() {
        set_huge_pages(false);
        prepared_ = true;
    }
    void set_huge_pages(bool on) const {
        received_.for_each_block([&](const ram_block& block) { set_transparent_huge_pages(block, on); });
    }
    /// Over the preempt channel where the source reads requests there: the main channel's socket is busy in both directions.
    result<void> ask() {
        return requests_.connect([this, quick = preempt_way_back_to_use()](const page_request_message& message) {
            const auto type = static_cast<return_message>(message.type());
            return quick ? quick->sender.send(type, message.payload()) : back_.send(type, message.payload());
        });
    }
    /// Null without.
    std::shared_ptr<preempt_way_back> preempt_way_back_to_use() {
        if (!preempt_carries_requests_.load()) return nullptr;
        std::unique_lock lock(session_mutex_);
        // The source has connected before it said so.
        changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return preempt_channel_ || preempt_ended_ || failure_; });
        return preempt_back_;
    }
    /// Null where the channel has none.
    std::shared_ptr<preempt_way_back> open_preempt_way_back(input_channel& channel) const {
        result<std::unique_ptr<duplex_channel>> back = channel.get_return_path();
        if (!back) return nullptr;
        (*back)->set_timeout(settings_.peer_timeout);
        return std::make_shared<preempt_way_back>(std::move(*back));
    }
    /// Of what was thrown away, what was looked at and found.
    struct found_pages {
        std::map<const ram_block*, discarded_pages>::const_iterator block;
        std::size_t page = 0;
    };
    /// Behind them, the first page that didn't come; or a page that somebody waits for.
    std::optional<error> find_missing(found_pages& done) const {
        for (; done.block != owed_.end(); ++done.block, done.page = 0) {
            const auto& [block, owed] = *done.block;
            for (page_run run = owed.pages.find_next_run(done.page); run.count != 0; run = owed.pages.find_next_run(done.page))
                for (done.page = run.first; done.page != run.first + run.count; ++done.page)
                    if (!received_.has(*block, done.page * received_.page_size(), received_.page_size()))
                        return std::move(error(errc::bad_ram, "every page by the end",
                            "none at " + std::to_string(done.page * received_.page_size()))
                                             .within(block->name));
        }
        if (requests_.waiting() != 0)
            return error(errc::bad_ram, "every page by the end",
                std::to_string(requests_.waiting()) + " that were asked for are missing");
        return std::nullopt;
    }
    /// The pages that somebody waited for may still be on their way through the other channel, whose end needn't come: QEMU's
    /// source (8.0) leaves it open, and so we end it. For as long as pages come.
    void await_last_pages() {
        found_pages done{owed_.begin()};
        awaiting_.store(true);
        for (;;) {
            // Before the look: a page that comes behind it changes this.
            const std::uint64_t before = placed_.load();
            if (!find_missing(done)) break;
            std::unique_lock lock(session_mutex_);
            const auto changed = [&] { return failure_.has_value() || preempt_ended_ || placed_.load() != before; };
            if (settings_.peer_timeout.count() == 0) changed_.wait(lock, changed);
            else changed_.wait_for(lock, settings_.peer_timeout, changed);
            if (placed_.load() == before) break;
        }
        awaiting_.store(false);
    }
    /// On the thread that placed a page, when all others have been told.
    void count_placed() {
        placed_.fetch_add(1);
        if (!awaiting_.load()) return;
        // So that who looked before this waits by now.
        { const std::lock_guard lock(session_mutex_); }
        changed_.notify_all();
    }

    // ---- the listen thread

    template <class Serve>
    result<void> start_listening(Serve serve) {
        {
            // What has arrived and wasn't read yet is ahead of whatever is asked for now; with a channel of its own for that
            // it is only ahead of what was under way already.
            const std::lock_guard lock(session_mutex_);
            main_->limit_unread(settings_.postcopy_preempt ? 208 * 1024 : 128 * 1024);
        }
        return start(listen_, [this, serve = std::move(serve)] {
            if (result<void> done = vmstate::detail::guarded(serve); !done) broken(done.error());
        });
    }
    template <class Job>
    static result<void> start(std::thread& thread, Job job) {
        try {
            thread = std::thread(std::move(job));
        } catch (const std::system_error& refused) {
            return error(errc::io, {}, std::string("thread: ") + refused.what());
        }
        return {};
    }

    /// Of the pages that nobody asked for: to place more by one call is hardly quicker, and the first of them wait.
    static constexpr std::size_t pages_together = 16;

    /// Where a channel is.
    struct page_stream {
        reader& in;
        ram_record_reader records;
        page_assembler assembler;
        ram_block* block = nullptr; ///< CONTINUE
    };
    struct main_stream : page_stream {
        bool is_recovered = false; ///< there were others before
        bool resumed = false; ///< pages may come
        bool ram_ended = false;
        bool told_to_run = false;
    };

    /// The rest of the main stream: pages, PINGs, the end. After a break, the commands of a recovery before.
    result<void> serve_main(reader& in, ram_record_reader records, bool resumed) {
        main_stream at{{in, records, page_assembler(*placer_, pages_together), find(records.block())}, !resumed, resumed};
        if (!resumed) at.assembler.drop();
        result<void> done;
        bool ended = false;
        while (done && !ended) done = serve_item(at, ended);
        const std::lock_guard lock(session_mutex_);
        bytes_ += in.offset();
        return done;
    }
    result<void> serve_item(main_stream& at, bool& ended) {
        const std::uint64_t position = at.in.offset();
        const std::uint8_t type = at.in.get_u8();
        if (at.in.failed()) return std::move(error(at.in.failure()).within("next section"));
        switch (static_cast<section_type>(type)) {
        case section_type::eof:
            ended = true;
            if (!at.ram_ended)
                return std::move(
                    error(errc::bad_section, "the memory's END", "the end of the sections").at_offset(position));
            return at.assembler.check_complete();
        case section_type::part:
        case section_type::end: {
            result<void> done = serve_section(at, static_cast<section_type>(type));
            if (!done) return std::move(done.error().within(ram_section::id).at_offset(position));
            return {};
        }
        case section_type::command: return serve_command(at, position);
        default:
            return std::move(error(errc::bad_section, "memory, a command or the end in postcopy",
                "type " + std::to_string(type))
                                 .within("next section")
                                 .at_offset(position));
        }
    }
    result<void> serve_section(main_stream& at, section_type type) {
        const std::uint32_t section_id = at.in.get_be32();
        if (at.in.failed()) return at.in.failure();
        if (section_id != ram_section_id_ || at.ram_ended)
            return error(errc::unknown_section,
                at.ram_ended ? std::string("no section behind the memory's END")
                             : "the memory's section " + std::to_string(ram_section_id_),
                std::to_string(section_id));
        if (!at.resumed) return error(errc::bad_command, "POSTCOPY_RESUME before pages", "pages");
        if (result<void> done = serve_pages(at); !done) return done;
        if (type == section_type::end) at.ram_ended = true;
        if (!machine_.options().send_section_footer) return {};
        const std::uint8_t footer = at.in.get_u8();
        const std::uint32_t footer_id = at.in.get_be32();
        if (at.in.failed()) return at.in.failure();
        if (footer != static_cast<std::uint8_t>(section_type::footer) || footer_id != section_id)
            return error(errc::bad_section, "the section's footer", "type " + std::to_string(footer)).within("footer");
        return {};
    }
    /// Records up to EOS.
    result<void> serve_pages(main_stream& at) {
        ram_record record;
        for (;;) {
            if (at.in.window() < largest_record())
                if (result<void> placed = at.assembler.flush(); !placed) return placed;
            if (!at.records.next(at.in, record)) return at.in.failure();
            if (record.kind == ram_record_kind::end_of_section) return at.assembler.flush();
            if (record.kind == ram_record_kind::multifd_flush) continue;
            if (result<void> placed = place(at, record); !placed) return placed;
        }
    }
    /// With less than this at hand the next record may have to be waited for.
    std::size_t largest_record() const noexcept { return 8 + 1 + max_name_size + received_.page_size(); }
    /// A record of either channel.
    result<void> place(page_stream& at, const ram_record& record) {
        if (!record.is_page())
            return std::move(
                error(errc::bad_ram, "pages in postcopy", std::string(to_string(record.kind))).at_offset(record.position));
        if (record.names_block || at.block == nullptr) at.block = find(at.records.block());
        if (at.block == nullptr)
            return std::move(error(errc::bad_ram, "a block of the stream's list", std::string(at.records.block()))
                                 .at_offset(record.position));
        return at.assembler.load(at.in, record, *at.block);
    }

    result<void> serve_command(main_stream& at, std::uint64_t position) {
        const auto number = static_cast<command>(at.in.get_be16());
        const std::uint16_t length = at.in.get_be16();
        if (at.in.failed()) return std::move(error(at.in.failure()).within("command"));
        const command_format format = format_of(number);
        const std::string name =
            format.name.empty() ? "command " + std::to_string(static_cast<unsigned>(number)) : std::string(format.name);
        result<void> done = format.length && *format.length != length
                                ? error(errc::bad_command, std::to_string(*format.length) + " bytes", std::to_string(length))
                                : obey(at, number, length);
        if (!done) return std::move(done.error().within(name).at_offset(position));
        return {};
    }
    result<void> obey(main_stream& at, command number, std::uint16_t length) {
        switch (number) {
        case command::ping: {
            const std::uint32_t value = at.in.get_be32();
            if (at.in.failed()) return at.in.failure();
            return back_.send(return_message::pong, value);
        }
        case command::open_return_path:
            // Twice is harmless.
            return back_.is_open() ? result<void>() : back_.open(*main_);
        case command::recv_bitmap: {
            const std::string block = at.in.get_counted_string();
            if (at.in.failed()) return at.in.failure();
            if (length != 1 + block.size())
                return error(errc::bad_command, std::to_string(1 + block.size()) + " bytes", std::to_string(length));
            if (at.resumed) return error(errc::bad_command, "it in a recovery", std::string(to_string(progress_.now())));
            return send_received(block);
        }
        case command::postcopy_resume:
            if (at.resumed) return error(errc::bad_command, "it in a recovery", std::string(to_string(progress_.now())));
            at.resumed = true;
            return resume();
        case command::postcopy_advise: return refuse_step(postcopy_state::advise);
        case command::postcopy_ram_discard: return refuse_step(postcopy_state::discard);
        case command::postcopy_listen: return refuse_step(postcopy_state::listen);
        case command::postcopy_run: return run_behind_package(at);
        default: return error(errc::bad_command, "PING, or a command of a recovery", "another");
        }
    }
    /// A step that may not follow; and where it might, not from a stream that a listen thread reads.
    result<void> refuse_step(postcopy_state next) const {
        return error(errc::bad_command, "no step to " + std::string(to_string(next)),
            "it in " + std::string(to_string(progress_.now())));
    }
    /// Once on each connection: after a break the source doesn't know whether it has come.
    result<void> run_behind_package(main_stream& at) {
        if (!may_run_later() || !at.resumed || std::exchange(at.told_to_run, true)) return refuse_step(postcopy_state::running);
        {
            const std::lock_guard lock(session_mutex_);
            if (!will_run_) return error(errc::bad_command, "it when the devices are loaded", "it before");
            if (failure_) return *failure_; // it comes again
            if (!at.is_recovered || !running_)
                if (result<void> step = progress_.enter(postcopy_state::running); !step) return step;
            running_ = true;
        }
        changed_.notify_all();
        // Who starts the guest may have been woken on this processor, where pages would keep it waiting for a whole slice.
        std::this_thread::yield();
        return {};
    }
    result<void> send_received(const std::string& name) {
        const ram_block* const block = find(name);
        if (block == nullptr) return error(errc::bad_ram, "a block of the stream's list", name);
        const page_bitmap received = received_.snapshot(*block);
        std::vector<std::byte> bitmap(static_cast<std::size_t>(received_bitmap_size(received.size())) + 16);
        memory_writer out(bitmap);
        encode_received_bitmap(out, received);
        std::vector<std::byte> payload(1, static_cast<std::byte>(name.size()));
        for (const char c : name) payload.push_back(static_cast<std::byte>(c));
        return back_.send(return_message::recv_bitmap, std::span<const std::byte>(payload), out.written());
    }
    result<void> resume() {
        const bool runs = [this] {
            const std::lock_guard lock(session_mutex_);
            return running_;
        }();
        if (result<void> step = progress_.enter(runs ? postcopy_state::running : postcopy_state::listen); !step) return step;
        resumed_();
        if (result<void> told = back_.send(return_message::resume_ack, std::uint32_t{1}); !told) return told;
        return ask();
    }

    // ---- the thread of the preempt channel

    result<void> start_preempt(bool recovered) {
        return start(preempt_, [this, recovered] {
            vmstate::detail::prefer_short_slice();
            if (result<void> done = vmstate::detail::guarded([&] { return serve_preempt(recovered); }); !done)
                broken(std::move(done.error().within("preempt channel")));
            {
                const std::lock_guard lock(session_mutex_);
                preempt_ended_ = true;
            }
            changed_.notify_all();
        });
    }
    /// Waits for the source to connect, early or late, and for POSTCOPY_LISTEN; then places what comes.
    result<void> serve_preempt(bool recovered) {
        std::stop_token stop;
        {
            const std::lock_guard lock(session_mutex_);
            stop = accepting_.get_token();
        }
        result<std::unique_ptr<input_channel>> accepted = (*accept_)({std::chrono::milliseconds(0), stop});
        if (!accepted) return accepted.error();
        if (!*accepted) return error(errc::invalid_argument, "a channel", "none");
        const std::shared_ptr<input_channel> channel = std::move(*accepted);
        // Nothing comes as long as nobody waits for a page.
        channel->set_timeout(std::chrono::milliseconds(0));
        // Ahead of the first read: a channel has one user at a time.
        std::shared_ptr<preempt_way_back> back = open_preempt_way_back(*channel);
        {
            std::unique_lock lock(session_mutex_);
            preempt_channel_ = channel;
            preempt_back_ = std::move(back);
            changed_.notify_all();
            changed_.wait(lock, [&] { return listening_ || over_ || failure_; });
            if (over_ || failure_) return {};
        }
        buffered_reader in(*channel);
        page_stream at{in, ram_record_reader(received_.page_size()), page_assembler(*placer_)};
        if (recovered) at.assembler.drop();
        result<void> done = serve_preempt_pages(at);
        const std::lock_guard lock(session_mutex_);
        bytes_ += in.offset();
        return done;
    }
    /// Newer sources close it at the end; older ones end it with an EOS, and close it then.
    result<void> serve_preempt_pages(page_stream& at) {
        while (at.in.peek(1) != 0) {
            ram_record record;
            if (!at.records.next(at.in, record)) return at.in.failure();
            if (record.kind == ram_record_kind::end_of_section) break;
            if (result<void> placed = place(at, record); !placed) return placed;
        }
        if (at.in.failed()) return at.in.failure();
        return at.assembler.check_complete();
    }
    void end_preempt() {
        {
            const std::lock_guard lock(session_mutex_);
            over_ = true;
            accepting_.request_stop();
            if (preempt_channel_) preempt_channel_->shutdown();
        }
        changed_.notify_all();
        if (preempt_.joinable()) preempt_.join();
        const std::lock_guard lock(session_mutex_);
        preempt_channel_.reset();
        preempt_back_.reset();
    }

    machine& machine_;
    const parameters& settings_;
    return_path& back_;
    std::function<result<void>()> loaded_;
    std::function<void()> resumed_;
    const std::vector<postcopy_observer*> observers_;

    // Written by the main thread before there are others.
    received_pages received_;
    std::map<std::string, ram_block*, std::less<>> blocks_; ///< whose pages come
    std::map<const ram_block*, discarded_pages> owed_;
    std::uint32_t ram_section_id_ = 0;
    bool prepared_ = false; ///< transparent huge pages are off
    std::vector<postcopy_observer*> advised_; ///< and not told of the end yet

    std::atomic<bool> run_may_come_later_ = false;
    std::atomic<bool> preempt_carries_requests_ = false;
    postcopy_progress progress_;
    postcopy_statistics statistics_;
    page_requests requests_;
    std::optional<page_placer> placer_;
    std::optional<fault_thread> faults_;

    std::atomic<std::uint64_t> placed_ = 0; ///< host pages
    std::atomic<bool> awaiting_ = false;    ///< the last of them

    mutable std::mutex statistics_mutex_; ///< interruptions_
    std::uint64_t interruptions_ = 0;

    mutable std::mutex session_mutex_; ///< all below but the threads
    std::condition_variable changed_;
    std::shared_ptr<input_channel> main_;
    const channel_acceptor* accept_ = nullptr;
    std::shared_ptr<input_channel> preempt_channel_;
    std::shared_ptr<preempt_way_back> preempt_back_; ///< of the same
    std::stop_source accepting_;
    std::optional<error> failure_; ///< of this connection
    bool over_ = true;             ///< nobody is to hear of failures any more
    bool preempt_ended_ = false;
    bool released_ = false; ///< before every page was there
    bool listening_ = false;
    bool will_run_ = false; ///< all but RUN is loaded, and the source told so
    bool running_ = false;
    std::uint64_t bytes_ = 0;
    std::thread listen_;
    std::thread preempt_;
};

} // namespace vmstate::migration
