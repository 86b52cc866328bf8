// SPDX-License-Identifier: BSL-1.0
// Channels, URIs, and the buffered reader and writer over them.
#include <support/bytes.hpp>
#include <support/catch.hpp>
#include <support/temporary_directory.hpp>

#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/buffered_writer.hpp>
#include <vmstate/stream/memory_channel.hpp>
#include <vmstate/stream/open.hpp>

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

using namespace vmstate;
using namespace vmstate::tests;

namespace {

std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}
std::string text_of(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

/// Remembers how many parts each call had; fails from a given call on.
class recording_channel final : public output_channel {
public:
    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        if (calls.size() == fail_at) return error(errc::io, {}, "disk full");
        calls.push_back(parts.size());
        for (const auto part : parts) bytes.insert(bytes.end(), part.begin(), part.end());
        return {};
    }
    std::vector<std::size_t> calls;
    std::vector<std::byte> bytes;
    std::size_t fail_at = static_cast<std::size_t>(-1);
};

/// Gives at most `step` bytes a call, and records how many parts it was offered.
class slow_channel final : public input_channel {
public:
    slow_channel(std::vector<std::byte> bytes, std::size_t step) : bytes_(std::move(bytes)), step_(step) {}
    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        std::size_t done = 0;
        std::size_t allowed = std::min(step_, bytes_.size() - position_);
        for (const auto part : parts) {
            const std::size_t count = std::min(allowed, part.size());
            std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(position_), count, part.begin());
            position_ += count;
            allowed -= count;
            done += count;
        }
        most_parts = std::max(most_parts, parts.size());
        ++calls;
        return done;
    }
    std::size_t most_parts = 0;
    std::size_t calls = 0;

private:
    std::vector<std::byte> bytes_;
    std::size_t step_;
    std::size_t position_ = 0;
};

} // namespace

TEST_CASE("the buffered writer gathers small writes into one call") {
    recording_channel channel;
    buffered_writer out(channel);
    for (std::uint32_t i = 0; i < 1000; ++i) out.put_be32(i);
    CHECK(channel.calls.empty());
    CHECK(out.offset() == 4000);
    REQUIRE(out.flush());
    CHECK(channel.calls == std::vector<std::size_t>{1});
    REQUIRE(out.flush());
    CHECK(channel.calls.size() == 1);
    REQUIRE(channel.bytes.size() == 4000);
    CHECK(channel.bytes[4 * 258 + 2] == std::byte{1});
    CHECK(channel.bytes[4 * 258 + 3] == std::byte{2});
}

TEST_CASE("a block that does not fit goes out with what was buffered, in one call and once") {
    recording_channel channel;
    buffered_writer out(channel, 8192);
    const std::vector<std::byte> block = pattern(100'000);
    out.put_be16(0x1234);
    out.write(block);
    CHECK(channel.calls == std::vector<std::size_t>{2});
    out.put_u8(0x56);
    CHECK(out.offset() == 100'003);
    REQUIRE(out.flush());
    REQUIRE(channel.bytes.size() == 100'003);
    CHECK(channel.bytes[0] == std::byte{0x12});
    CHECK(channel.bytes[1] == std::byte{0x34});
    CHECK(std::equal(block.begin(), block.end(), channel.bytes.begin() + 2));
    CHECK(channel.bytes.back() == std::byte{0x56});
}

TEST_CASE("whatever the sizes of the writes, the bytes arrive in order") {
    recording_channel channel;
    buffered_writer out(channel, 4096);
    const std::vector<std::byte> all = pattern(200'000);
    std::size_t done = 0;
    for (std::size_t size = 1; done < all.size(); size = size * 5 % 6007) {
        const std::size_t piece = std::min(size, all.size() - done);
        if (piece <= writer::max_reserve && piece % 3 == 0) {
            std::byte* const p = out.reserve(piece);
            REQUIRE(p != nullptr);
            std::copy_n(all.data() + done, piece, p);
            out.commit(p + piece);
        } else {
            out.write(all.data() + done, piece);
        }
        done += piece;
        REQUIRE(out.offset() == done);
    }
    REQUIRE(out.flush());
    CHECK(channel.bytes == all);
}

TEST_CASE("the buffered writer keeps the first error, and writes nothing after it") {
    recording_channel channel;
    channel.fail_at = 1;
    buffered_writer out(channel, 4096);
    const std::vector<std::byte> block = pattern(5000);
    out.write(block);
    CHECK_FALSE(out.failed());
    out.put_be32(1);
    out.write(block);
    REQUIRE(out.failed());
    CHECK(out.failure() == errc::io);
    CHECK(out.failure().offset() == 5004);
    CHECK(out.reserve(1) == nullptr);
    out.put_be64(2);
    out.write(block);
    const result<void> flushed = out.flush();
    REQUIRE_FALSE(flushed);
    CHECK_THAT(flushed.error().message(), contains("disk full"));
    CHECK(channel.calls.size() == 1);
}

TEST_CASE("the buffered reader gives contiguous bytes, however small the channel's pieces are") {
    const std::vector<std::byte> all = pattern(50'000);
    for (const std::size_t step : {std::size_t{1}, std::size_t{13}, std::size_t{4095}, std::size_t{70'000}}) {
        slow_channel channel(all, step);
        buffered_reader in(channel, 5000);
        std::size_t done = 0;
        for (std::size_t size = 1; done < all.size(); size = size * 3 % 4099) {
            const std::size_t piece = std::min({size, all.size() - done, reader::max_window});
            const std::byte* const p = in.need(piece);
            REQUIRE(p != nullptr);
            REQUIRE(std::equal(p, p + piece, all.begin() + static_cast<std::ptrdiff_t>(done)));
            in.seek(p + piece);
            done += piece;
            REQUIRE(in.offset() == done);
        }
        CHECK(in.peek(1) == 0);
        CHECK_FALSE(in.failed());
        CHECK(in.remaining() == 0);
    }
}

TEST_CASE("a large read goes past the buffer, and what follows it into the buffer, in one call") {
    std::vector<std::byte> all = pattern(1'000'004);
    slow_channel channel(all, 2'000'000);
    buffered_reader in(channel);
    std::vector<std::byte> block(1'000'000);
    REQUIRE(in.read(block.data(), block.size()));
    CHECK(channel.calls == 1);
    CHECK(channel.most_parts == 2);
    CHECK(std::equal(block.begin(), block.end(), all.begin()));
    CHECK(in.window() == 4);
    CHECK(in.offset() == 1'000'000);
    CHECK(in.get_u8() == std::to_integer<std::uint8_t>(all[1'000'000]));
}

TEST_CASE("peek looks ahead without failing at the end; need fails with the place") {
    memory_input_channel channel(bytes_of("abc"));
    buffered_reader in(channel);
    CHECK(in.remaining() == 3);
    CHECK(in.peek(2) == 2);
    CHECK(in.offset() == 0);
    in.skip(1);
    CHECK(in.peek(4) == 2);
    CHECK_FALSE(in.failed());
    CHECK(in.need(4) == nullptr);
    REQUIRE(in.failed());
    CHECK(in.failure() == errc::truncated);
    CHECK(in.failure().offset() == 1);
    CHECK(in.failure().expected() == "4 bytes");
    CHECK(in.failure().found() == "2");
}

TEST_CASE("a read that the stream cannot fill fails, as does one over a broken channel") {
    memory_input_channel channel(bytes_of("abc"));
    buffered_reader in(channel);
    std::array<std::byte, 10'000> block{};
    CHECK_FALSE(in.read(block.data(), block.size()));
    CHECK(in.failure() == errc::truncated);
    CHECK(in.get_be32() == 0);

    opened_input missing = open_input("file:/nonexistent/file");
    buffered_reader broken(**missing);
    CHECK_FALSE(broken.read(block.data(), block.size()));
    CHECK(broken.failure() == errc::io);
}

TEST_CASE("QEMU's URIs are taken apart") {
    CHECK(std::get<file_uri>(*parse_uri("file:/tmp/vm.state")).path == "/tmp/vm.state");
    CHECK(std::get<file_uri>(*parse_uri("file:/tmp/vm.state")).offset == 0);
    CHECK(std::get<file_uri>(*parse_uri("file:a,b,offset=0x1000")).path == "a,b");
    CHECK(std::get<file_uri>(*parse_uri("file:a,b,offset=0x1000")).offset == 4096);
    CHECK(std::get<file_uri>(*parse_uri("file:a,offset=2M")).offset == 2 << 20);
    CHECK(std::get<file_uri>(*parse_uri("file:a,offset=12")).offset == 12);
    CHECK(std::get<exec_uri>(*parse_uri("exec:zstd -dc vm.state.zst | cat")).command ==
          "zstd -dc vm.state.zst | cat");
    CHECK(std::get<fd_uri>(*parse_uri("fd:17")).fd == 17);

    for (const char* bad : {"", "vm.state", "file:", "exec:", "fd:", "fd:-1", "fd:1x", "fd:99999999999",
             "file:,offset=1", "file:a,offset=", "file:a,offset=x", "file:a,offset=-1", "file:a,offset=1q",
             "file:a,offset=99999999999E", "http://example.org"}) {
        CAPTURE(bad);
        const result<uri> parsed = parse_uri(bad);
        REQUIRE_FALSE(parsed.has_value());
        CHECK(parsed.error() == errc::bad_uri);
    }
    CHECK(parse_uri(std::string_view("file:a\0b", 8)).error() == errc::bad_uri);
    for (const char* later : {"vsock:1:2", "rdma:host:1"}) {
        const result<uri> parsed = parse_uri(later);
        REQUIRE_FALSE(parsed.has_value());
        CHECK(parsed.error() == errc::unsupported);
        CHECK_THAT(parsed.error().message(), contains(later));
    }
}

TEST_CASE("a file is written and read, from an offset on if wanted") {
    const temporary_directory directory;
    const std::string path = directory.file("state");
    std::ofstream(path) << "0123456789 old";

    {
        const opened_output output = open_output("file:" + path + ",offset=4");
        REQUIRE(output);
        const std::array<std::span<const std::byte>, 2> parts{bytes_of("AB"), bytes_of("CD")};
        REQUIRE(output.value()->writev(parts));
        REQUIRE(output.value()->close());
    }
    CHECK(contents(path) == "0123ABCD");

    opened_input input = open_input("file:" + path + ",offset=6");
    REQUIRE(input);
    CHECK((*input)->remaining() == 2);
    buffered_reader in(**input);
    CHECK(in.get_be16() == 0x4344);
    CHECK(in.peek(1) == 0);

    CHECK(open_output("file:" + path));
    CHECK(contents(path).empty());
}

TEST_CASE("a file that cannot be opened is an error, and a channel that reports it") {
    opened_output output = open_output("file:/nonexistent/directory/state");
    REQUIRE_FALSE(output);
    CHECK(output.error() == errc::io);
    CHECK_THAT(output.error().message(), contains("/nonexistent/directory/state"));

    buffered_writer out(**output);
    out.put_u8(1);
    const result<void> flushed = out.flush();
    REQUIRE_FALSE(flushed);
    CHECK_THAT(flushed.error().message(), contains("/nonexistent/directory/state"));
}

TEST_CASE("a command gets the stream, and close waits for it") {
    const temporary_directory directory;
    opened_output output = open_output("exec:sleep 0.1; cat > " + directory.file("copy"));
    REQUIRE(output);
    const std::vector<std::byte> all = pattern(300'000);
    {
        buffered_writer out(**output);
        out.write(all);
        REQUIRE(out.flush());
    }
    REQUIRE((*output)->close());
    CHECK(contents(directory.file("copy")) == text_of(all));

    opened_input input = open_input("exec:cat " + directory.file("copy"));
    REQUIRE(input);
    buffered_reader in(**input);
    std::vector<std::byte> back(all.size());
    REQUIRE(in.read(back.data(), back.size()));
    CHECK(back == all);
    CHECK(in.peek(1) == 0);
    CHECK((*input)->close());
    CHECK((*input)->close());
}

TEST_CASE("a command that fails is an error of close") {
    opened_output output = open_output("exec:cat > /dev/null; exit 3");
    REQUIRE(output);
    const result<void> closed = (*output)->close();
    REQUIRE_FALSE(closed);
    CHECK(closed.error() == errc::io);
    CHECK_THAT(closed.error().message(), contains("exit status 3"));

    opened_input input = open_input("exec:echo half; exit 4");
    REQUIRE(input);
    buffered_reader in(**input);
    CHECK(in.get_be32() == 0x68616c66);
    CHECK_THAT((*input)->close().error().message(), contains("exit status 4"));
}

TEST_CASE("a command that stops listening makes writing fail, and sends no signal") {
    opened_output output = open_output("exec:exit 0");
    REQUIRE(output);
    buffered_writer out(**output);
    const std::vector<std::byte> block = pattern(1 << 20);
    out.write(block);
    out.write(block);
    CHECK(out.failed());
    CHECK(out.failure() == errc::io);
}

TEST_CASE("a command that goes on without end is stopped when its channel is given up") {
    opened_input input = open_input("exec:exec yes");
    REQUIRE(input);
    buffered_reader in(**input);
    CHECK(in.get_be16() == 0x790a);
    // That its pipe is gone ends the command; that we were the first to go is no failure.
    CHECK((*input)->close());
}

TEST_CASE("fd: takes a descriptor over") {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    opened_output output = open_output("fd:" + std::to_string(ends[1]));
    opened_input input = open_input("fd:" + std::to_string(ends[0]));
    REQUIRE(output);
    REQUIRE(input);
    const std::span<const std::byte> part = bytes_of("pipe");
    REQUIRE((*output)->writev({&part, 1}));
    REQUIRE((*output)->close());
    CHECK_FALSE((*output)->writev({&part, 1}));
    buffered_reader in(**input);
    CHECK(in.get_be32() == 0x70697065);
    CHECK(in.peek(1) == 0);

    const opened_input closed = open_input("fd:" + std::to_string(ends[1]));
    REQUIRE_FALSE(closed);
    CHECK(closed.error() == errc::io);
}

TEST_CASE("what the system says when a descriptor is closed is an error of close, once") {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    fd_output_channel output{unique_fd(ends[1])};
    // What a full or a remote file system says then can't be had here; that there is no such descriptor can.
    REQUIRE(::close(ends[1]) == 0);
    const result<void> closed = output.close();
    REQUIRE_FALSE(closed);
    CHECK(closed.error() == errc::io);
    CHECK_THAT(closed.error().message(), contains("close: Bad file descriptor"));
    CHECK(output.close());
    ::close(ends[0]);
}

TEST_CASE("a descriptor that does not block is waited for") {
    int ends[2];
    REQUIRE(::pipe2(ends, O_NONBLOCK) == 0);
    fd_output_channel output{unique_fd(ends[1])};
    fd_input_channel input{unique_fd(ends[0])};
    const std::vector<std::byte> all = pattern(500'000);
    // Catch's assertions belong to one thread; the writer's findings are read after it has ended.
    bool flushed = false;
    bool closed = false;
    std::thread writing([&] {
        buffered_writer out(output);
        out.write(all);
        flushed = out.flush().has_value();
        closed = output.close().has_value();
    });
    std::vector<std::byte> back(all.size());
    buffered_reader in(input);
    CHECK(in.read(back.data(), back.size()));
    writing.join();
    CHECK(flushed);
    CHECK(closed);
    CHECK(back == all);
}

TEST_CASE("a command that takes nothing more, or says nothing more, is not waited for longer than the timeout") {
    const bool writes = GENERATE(true, false);
    CAPTURE(writes);
    const std::vector<std::byte> much(1 << 20);
    const std::span<const std::byte> all(much);
    std::array<std::byte, 16> room{};
    const std::span<std::byte> some(room);
    if (writes) {
        opened_output output = open_output("exec:exec sleep 1000");
        REQUIRE(output);
        REQUIRE((*output)->set_timeout(std::chrono::milliseconds(50)));
        const result<void> written = (*output)->writev({&all, 1});
        REQUIRE_FALSE(written);
        CHECK_THAT(written.error().message(), contains("write: timed out after 50 ms"));
        const result<void> closed = (*output)->close();
        REQUIRE_FALSE(closed);
        CHECK_THAT(closed.error().message(), contains("a command that ends"));
    } else {
        opened_input input = open_input("exec:exec sleep 1000");
        REQUIRE(input);
        REQUIRE((*input)->set_timeout(std::chrono::milliseconds(50)));
        const result<std::size_t> got = (*input)->read_some({&some, 1});
        REQUIRE(got.has_error());
        CHECK_THAT(got.error().message(), contains("read: timed out after 50 ms"));
    }
}

TEST_CASE("shutdown ends a read or a write of a pipe that waits in another thread") {
    const bool writes = GENERATE(true, false);
    CAPTURE(writes);
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    const unique_fd other(ends[writes ? 0 : 1]);
    std::unique_ptr<channel> ours;
    result<void> ended;
    const std::vector<std::byte> much(1 << 20);
    const std::span<const std::byte> all(much);
    std::array<std::byte, 16> room{};
    const std::span<std::byte> some(room);
    std::thread waiting;
    if (writes) {
        auto made = std::make_unique<fd_output_channel>(unique_fd(ends[1]));
        waiting = std::thread([&, raw = made.get()] { ended = raw->writev({&all, 1}); });
        ours = std::move(made);
    } else {
        auto made = std::make_unique<fd_input_channel>(unique_fd(ends[0]));
        waiting = std::thread([&, raw = made.get()] {
            const result<std::size_t> got = raw->read_some({&some, 1});
            if (!got) ended = got.error();
        });
        ours = std::move(made);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    ours->shutdown();
    waiting.join();
    REQUIRE_FALSE(ended);
    CHECK_THAT(ended.error().message(), contains("channel was shut down"));
    // Who shares the pipe's other end still has one that blocks.
    CHECK((::fcntl(other.get(), F_GETFL) & O_NONBLOCK) == 0);
}

TEST_CASE("shutdown ends a read that blocks in another thread") {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    const unique_fd other(ends[1]);
    fd_input_channel input{unique_fd(ends[0])};
    std::thread stopping([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        input.shutdown();
    });
    buffered_reader in(input);
    CHECK(in.peek(1) == 0);
    stopping.join();
    std::byte byte{};
    const std::span<std::byte> part(&byte, 1);
    CHECK_FALSE(input.read_some({&part, 1}));
}

TEST_CASE("a user's own type is a channel") {
    struct own_sink {
        std::string text;
        bool closed = false;
        result<std::size_t> write_some(std::span<const std::byte> from) {
            const std::size_t count = std::min<std::size_t>(from.size(), 3);
            text += text_of(from.first(count));
            return count;
        }
        result<void> close() {
            closed = true;
            return {};
        }
    };
    struct own_source {
        std::string_view rest;
        result<std::size_t> read_some(std::span<std::byte> into) {
            const std::size_t count = std::min<std::size_t>({into.size(), rest.size(), 2});
            std::copy_n(bytes_of(rest).begin(), count, into.begin());
            rest.remove_prefix(count);
            return count;
        }
    };
    static_assert(byte_sink<own_sink> && !byte_source<own_sink>);
    static_assert(byte_source<own_source> && !byte_sink<own_source>);
    static_assert(!byte_sink<memory_output_channel> && !byte_source<memory_input_channel>);

    own_sink sink;
    const std::unique_ptr<output_channel> output = make_output_channel(sink);
    buffered_writer out(*output);
    out.put_be64(0x6162636465666768);
    REQUIRE(out.flush());
    CHECK(sink.text == "abcdefgh");
    REQUIRE(output->close());
    CHECK(sink.closed);

    const std::unique_ptr<input_channel> input = make_input_channel(own_source{"abcdefgh"});
    buffered_reader in(*input);
    CHECK(in.get_be64() == 0x6162636465666768);
    CHECK(in.peek(1) == 0);
}

TEST_CASE("a user's channel that claims more than it was given is not believed") {
    struct liar {
        result<std::size_t> write_some(std::span<const std::byte> from) { return from.size() + 1; }
        result<std::size_t> read_some(std::span<std::byte> into) { return into.size() + 1; }
    } both;
    const std::span<const std::byte> part = bytes_of("x");
    CHECK_FALSE(make_output_channel(both)->writev({&part, 1}));
    std::byte byte{};
    const std::span<std::byte> space(&byte, 1);
    CHECK_FALSE(make_input_channel(both)->read_some({&space, 1}));
}

TEST_CASE("memory channels keep and give bytes") {
    memory_output_channel output;
    const std::span<const std::byte> part = bytes_of("memory");
    REQUIRE(output.writev({&part, 1}));
    CHECK(text_of(output.written()) == "memory");
    const std::vector<std::byte> taken = output.take();
    CHECK(output.written().empty());
    memory_input_channel input(taken);
    CHECK(input.remaining() == 6);
    std::array<std::byte, 4> first{};
    std::array<std::byte, 4> second{};
    const std::array<std::span<std::byte>, 2> parts{
        std::span<std::byte>(first), std::span<std::byte>(second)};
    CHECK(*input.read_some(parts) == 6);
    CHECK(*input.read_some(parts) == 0);
}

TEST_CASE("a unique_fd closes what it owns, once") {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    const auto is_open = [](int fd) { return ::fcntl(fd, F_GETFD) >= 0; };
    {
        unique_fd a(ends[0]);
        unique_fd b(std::move(a));
        CHECK_FALSE(a);
        CHECK(b.get() == ends[0]);
        a = std::move(b);
        CHECK(is_open(ends[0]));
        a.reset(ends[1]);
        CHECK_FALSE(is_open(ends[0]));
        CHECK(a.release() == ends[1]);
    }
    CHECK(is_open(ends[1]));
    CHECK(::close(ends[1]) == 0);
}
