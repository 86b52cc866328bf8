// SPDX-License-Identifier: BSL-1.0
//
// What the benchmarks of a migration share: memory, a process for the destination, and a QEMU to compare with.
#pragma once

#include <benchmark/benchmark.h>

#include "support/qemu.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

constexpr std::size_t page_size = 4096;

/// What is wrong with the system rather than with what is measured.
[[noreturn]] inline void give_up(const char* what) {
    std::perror(what);
    std::abort();
}
inline void expect(bool fine, const char* what) {
    if (!fine) give_up(what);
}

/// A number from the environment.
inline std::size_t environment_or(const char* name, std::size_t otherwise) {
    const char* const text = std::getenv(name);
    return text != nullptr ? std::max<std::size_t>(1, std::strtoul(text, nullptr, 10)) : otherwise;
}
/// Of one clock for all processes.
inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
}
inline double smallest(const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); }

enum class backing { small_pages, huge_pages };

/// Anonymous memory that nobody has touched, as a guest's: in 4 KiB pages, or in 2 MiB ones where there are any (QEMU
/// advises its RAM so).
struct mapping {
    mapping(std::size_t bytes, backing pages)
        : size(bytes)
        , address(::mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        expect(address != MAP_FAILED, "mmap");
        ::madvise(address, bytes + huge_page, pages == backing::huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    }
    mapping(const mapping&) = delete;
    mapping& operator=(const mapping&) = delete;
    ~mapping() { ::munmap(address, size + huge_page); }
    std::byte* begin() const {
        const auto at = reinterpret_cast<std::uintptr_t>(address);
        return static_cast<std::byte*>(address) + ((huge_page - at % huge_page) % huge_page);
    }
    std::span<std::byte> span() const { return {begin(), size}; }

    static constexpr std::size_t huge_page = std::size_t{2} << 20;
    std::size_t size;
    void* address;
};

/// A virtual machine's host may take back what was freed a while ago, and then the first touch of it waits for the host:
/// up to twenty times longer, by chance. Takes so many bytes and frees them, so that what is allocated next is there.
inline void warm_up_free_memory(std::size_t bytes) {
    const mapping touched(bytes, backing::huge_pages);
    for (std::size_t i = 0; i < bytes; i += page_size) touched.begin()[i] = std::byte{1};
}

inline void fill_with_noise(std::span<std::byte> memory) {
    std::mt19937_64 noise(1);
    for (std::size_t i = 0; i + 8 <= memory.size(); i += 8) {
        const std::uint64_t word = noise();
        std::memcpy(memory.data() + i, &word, 8);
    }
}

/// A pipe for small things of one size.
class pipe {
public:
    pipe() { expect(::pipe2(ends_, O_CLOEXEC) == 0, "pipe"); }
    pipe(const pipe&) = delete;
    pipe& operator=(const pipe&) = delete;
    ~pipe() {
        close_writer();
        ::close(ends_[0]);
    }
    template <class T>
    void put(const T& value) {
        expect(::write(ends_[1], &value, sizeof value) == static_cast<ssize_t>(sizeof value), "write");
    }
    /// Of a process that has died: throws.
    template <class T>
    T take() {
        T value{};
        if (::read(ends_[0], &value, sizeof value) != static_cast<ssize_t>(sizeof value))
            throw std::runtime_error("the destination's process has died");
        return value;
    }
    void close_writer() {
        if (ends_[1] >= 0) ::close(std::exchange(ends_[1], -1));
    }

private:
    int ends_[2];
};

/// A process that runs `work(pipe to us)`. To be made while this process has one thread.
class child {
public:
    template <class Work>
    explicit child(Work work) {
        pid_ = ::fork();
        expect(pid_ >= 0, "fork");
        if (pid_ != 0) {
            from.close_writer();
            return;
        }
        int status = 1;
        try {
            work(from);
            status = 0;
        } catch (const std::exception& failure) {
            std::fprintf(stderr, "destination: %s\n", failure.what());
        }
        ::_exit(status);
    }
    child(const child&) = delete;
    child& operator=(const child&) = delete;
    ~child() {
        if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
    }
    /// Throws where it has failed.
    void join() {
        int status = 0;
        ::waitpid(std::exchange(pid_, -1), &status, 0);
        if (status != 0) throw std::runtime_error("the destination's process has failed");
    }

    pipe from;

private:
    pid_t pid_;
};

/// What a child says of where it listens.
struct address {
    char uri[256];
};
inline address make_address(const std::string& uri) {
    address made{};
    uri.copy(made.uri, sizeof made.uri - 1);
    return made;
}

template <class T>
void check(const T& outcome) {
    if (!outcome) throw std::runtime_error(outcome.error().message());
}

// ---- QEMU

/// Instead of a firmware: a guest that waits for an interrupt that doesn't come. Returns the file.
inline std::filesystem::path write_idle_rom(const vmstate::tests::temporary_directory& directory) {
    std::vector<std::byte> rom(64 * 1024);
    constexpr unsigned char program[] = {0xfa, 0xf4, 0xeb, 0xfd}; // cli; hlt; jmp to the hlt
    std::memcpy(rom.data() + 0xfff0, program, sizeof program);    // where the processor begins
    const std::filesystem::path file = directory / "idle.rom";
    vmstate::tests::write_file(file, rom);
    return file;
}
inline void set_parameters(vmstate::tests::qemu& who, std::int64_t downtime_limit_ms) {
    who.execute("migrate-set-parameters",
        {{"max-bandwidth", std::int64_t{1} << 40}, {"downtime-limit", downtime_limit_ms}});
    who.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{boost::json::object{{"capability", "return-path"}, {"state", true}}}}});
}
/// Where it listens.
inline std::string incoming_uri(vmstate::tests::qemu& destination, const std::string& asked) {
    if (!asked.starts_with("tcp:")) return asked;
    const boost::json::object state = destination.execute("query-migrate").as_object();
    const boost::json::object socket = state.at("socket-address").as_array().at(0).as_object();
    return "tcp:127.0.0.1:" + std::string(socket.at("port").as_string());
}
inline double number(const boost::json::value& value) { return value.to_number<double>(); }
/// When an event happened: seconds of the system's clock.
inline double time_of(const boost::json::object& event) {
    const boost::json::object& at = event.at("timestamp").as_object();
    return number(at.at("seconds")) + number(at.at("microseconds")) / 1e6;
}

} // namespace bench
