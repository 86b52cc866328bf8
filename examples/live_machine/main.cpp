// SPDX-License-Identifier: BSL-1.0
//
// live_machine: a small virtual machine that migrates, while it runs, from one process to another. What its guest
// prints is its serial port's output, on stdout; what is said of migrations is on stderr.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include <CLI/CLI.hpp>

#include <vmstate/postcopy/support.hpp>

#include "backends.hpp"
#include "events.hpp"
#include "make_vm.hpp"
#include "migrations.hpp"
#include "report.hpp"
#include "vm.hpp"

namespace {

using live::events;

constexpr int exit_failed = 1;
constexpr int exit_usage = 2;

struct command_line {
    bool incoming = false;
    std::string listen_uri;  // where the guest comes from, or back from
    std::string migrate_uri; // where it goes to
    double after = 1;
    std::uint64_t after_lines = 0;
    unsigned times = 1;
    std::optional<double> run_for;
    std::uint64_t memory = std::uint64_t{64} << 20;
    bool huge_pages = false;
    std::string cpu;       // empty: the best that there is here
    std::string dirty_log; // empty: the processor's own
    std::optional<std::uint64_t> work_memory;
    unsigned dirty_share = 25;
    std::uint32_t dirty_rate = 1000;
    std::uint32_t tick_interval = 100;
    std::uint32_t downtime_limit = 300;
    std::string postcopy_after;
    std::vector<std::string> backends; // sockets
    std::uint64_t shared_memory = std::uint64_t{4} << 20;
    live::migration_options migration;
    std::string serial;
    bool json = false;
};

events::clock::duration duration(double seconds) {
    return std::chrono::duration_cast<events::clock::duration>(std::chrono::duration<double>(seconds));
}

/// Which processor; with the reason where it isn't the one that one would wish for.
struct cpu_choice {
    live::cpu_kind cpu;
    std::string why;
};
cpu_choice choose_cpu(const command_line& asked) {
    if (!asked.cpu.empty()) return {asked.cpu == "kvm" ? live::cpu_kind::kvm : live::cpu_kind::riscv, {}};
    if (asked.dirty_log == "marked") return {live::cpu_kind::riscv, "KVM doesn't mark pages"};
    const vmstate::result<void> can = live::probe_kvm();
    if (can) return {live::cpu_kind::kvm, {}};
    return {live::cpu_kind::riscv, "no KVM here: " + can.error().message()};
}

live::dirty_log_kind choose_dirty_log(const command_line& asked, live::cpu_kind cpu) {
    using enum live::dirty_log_kind;
    if (asked.dirty_log.empty()) return cpu == live::cpu_kind::kvm ? kvm_bitmap : marked;
    return asked.dirty_log == "marked" ? marked : asked.dirty_log == "pagemap" ? pagemap
                                              : asked.dirty_log == "kvm-ring"  ? kvm_ring
                                                                               : kvm_bitmap;
}

/// Work for the guest, in whole pages and intervals of about 10 ms. Of its RAM it works in so much, and leaves the rest
/// untouched, as it does with what it shares with backends.
live::guest_parameters guest_work(const command_line& asked, std::uint32_t ram_base, std::uint64_t work_memory) {
    constexpr std::uint32_t page = 4096;
    constexpr std::uint32_t second = 1'000'000;
    constexpr std::uint32_t usual_interval = 10'000;
    live::guest_parameters work{};
    const std::uint64_t shared = asked.backends.empty() ? 0 : std::min(asked.shared_memory, asked.memory);
    work.hot_begin = ram_base + live::guest_parameters::first_free;
    work.cold_end = ram_base + static_cast<std::uint32_t>(
        std::clamp<std::uint64_t>(std::min(work_memory, asked.memory - shared) / page * page,
            live::guest_parameters::first_free, asked.memory));
    const std::uint64_t pages = (work.cold_end - work.hot_begin) / page;
    work.hot_end = work.hot_begin + static_cast<std::uint32_t>(pages * asked.dirty_share / 100) * page;
    work.interval_us = usual_interval;
    if (asked.dirty_rate != 0 && asked.dirty_rate < second / usual_interval) work.interval_us = second / asked.dirty_rate;
    work.interval_us = std::min({work.interval_us, asked.tick_interval * 1000, live::guest_parameters::longest_interval});
    work.pages_per_interval = static_cast<std::uint32_t>(
        (std::uint64_t{asked.dirty_rate} * work.interval_us + second - 1) / second);
    work.intervals_per_tick = std::max(asked.tick_interval * 1000 / work.interval_us, 1u);
    return work;
}

class program {
public:
    program(const command_line& asked, std::uint64_t work_memory, live::vm& vm, const events& all, live::report& said)
        : asked_(asked), work_memory_(work_memory), vm_(vm), events_(all), report_(said) {
        if (!asked.backends.empty()) backends_.emplace(vm, asked.backends, asked.shared_memory, said);
    }

    int run() {
        // Said now, not when the guest comes.
        if (asked_.migration.parameters.postcopy_ram && !asked_.listen_uri.empty())
            if (const vmstate::result<void> can = vmstate::check_postcopy_support(*vm_.machine().ram()); !can) {
                complain("postcopy", can.error());
                return exit_failed;
            }
        if (asked_.incoming) {
            // Before anybody hears that it waits for a guest: without them it wouldn't take one.
            if (!connect_backends() || !prepare_to_receive() || !receive()) return exit_failed;
        } else {
            const auto booted = vm_.boot(guest_work(asked_, vm_.ram_base(), work_memory_));
            if (!booted) {
                complain("machine", booted.error());
                return exit_failed;
            }
            if (!connect_backends()) return exit_failed;
            if (const vmstate::result<void> started = vm_.guest().start(); !started) {
                complain("machine", started.error());
                return exit_failed;
            }
            report_.running();
        }
        unsigned times_left = asked_.migrate_uri.empty() ? 0 : asked_.times;
        while (times_left != 0) {
            const std::uint64_t lines = vm_.lines_printed() + asked_.after_lines;
            if (!run_guest(duration(asked_.after))) return exit_failed;
            while (vm_.lines_printed() < lines)
                if (!run_guest(std::chrono::milliseconds(5))) return exit_failed;
            --times_left;
            // Where a guest comes in, it may come again; listen before it goes, so that it isn't too fast for us.
            const bool returns = !asked_.listen_uri.empty() && (!asked_.incoming || times_left != 0);
            if (returns && !prepare_to_receive()) return exit_failed;
            if (!send()) {
                // A guest that is here, or has halted; that the program was asked for something else doesn't change that.
                if (vm_.is_running() || !vm_.why_halted().empty()) static_cast<void>(run_guest(run_for()));
                return exit_failed;
            }
            if (!returns) return EXIT_SUCCESS;
            if (!connect_backends() || !receive()) return exit_failed;
        }
        return run_guest(run_for()) ? EXIT_SUCCESS : exit_failed;
    }

private:
    std::optional<events::clock::duration> run_for() const {
        if (!asked_.run_for) return {};
        return duration(*asked_.run_for);
    }

    /// Lets the guest run for so long, or until somebody ends it; false where it was not the time that ended it, unless
    /// there is none.
    bool run_guest(std::optional<events::clock::duration> time) {
        std::optional<events::clock::time_point> deadline;
        if (time) deadline = events::clock::now() + *time;
        for (;;) {
            // Asked first: the news of it may have come while a migration was waited for.
            if (const std::string why = vm_.why_halted(); !why.empty()) {
                report_.halted(why);
                return false;
            }
            const events::what happened = events_.wait(deadline);
            if (happened == events::what::time) return true;
            if (happened == events::what::interrupted) return !time;
        }
    }

    bool send() {
        live::outbound leaving(vm_, asked_.migration, events_, report_);
        if (const vmstate::result<void> moved = leaving.send(asked_.migrate_uri); !moved) {
            complain(asked_.migrate_uri, moved.error());
            if (vm_.is_running() && vm_.why_halted().empty()) report_.guest_runs_on();
            return false;
        }
        // It has gone as it is, and halts over there as well.
        if (!vm_.why_halted().empty()) return false;
        report_.left(leaving.status());
        return true;
    }

    bool prepare_to_receive() {
        coming_ = std::make_unique<live::inbound>(
            vm_, backends_ ? &backends_->postcopy() : nullptr, asked_.migration, events_, report_);
        const vmstate::result<void> listening = coming_->prepare(asked_.listen_uri);
        return listening || complain(asked_.listen_uri, listening.error());
    }
    bool receive() {
        if (const vmstate::result<void> arrived = coming_->receive(); !arrived)
            return complain(asked_.listen_uri, arrived.error());
        report_.arrived(coming_->status());
        coming_.reset();
        return true;
    }

    bool connect_backends() {
        if (!backends_) return true;
        const vmstate::result<void> connected = backends_->connect();
        return connected || complain("--vhost-user", connected.error());
    }

    bool complain(const std::string& what, const vmstate::error& failure) {
        report_.failed(what, failure.message());
        return false;
    }

    const command_line& asked_;
    const std::uint64_t work_memory_;
    live::vm& vm_;
    const events& events_;
    live::report& report_;
    std::optional<live::backends> backends_;
    std::unique_ptr<live::inbound> coming_;
};

int run(command_line asked) {
    // The first thing: threads inherit what it does to signals. A peer that is gone is an error, not a signal.
    const events all;
    ::signal(SIGPIPE, SIG_IGN);
    live::report said(asked.json, ::isatty(STDERR_FILENO) == 1);

    vmstate::migration::parameters& parameters = asked.migration.parameters;
    parameters.downtime_limit = std::chrono::milliseconds(asked.downtime_limit);
    if (!asked.postcopy_after.empty()) asked.migration.postcopy_after = live::postcopy_start::parse(asked.postcopy_after);
    if (!asked.postcopy_after.empty() || parameters.postcopy_preempt || parameters.max_postcopy_bandwidth != 0 ||
        !asked.migration.recover_uri.empty())
        parameters.postcopy_ram = true;
    const std::uint64_t page = asked.huge_pages ? live::memory::huge_page : live::memory::small_page;
    if (const std::uint64_t shared = asked.shared_memory; !asked.backends.empty() &&
        (shared == 0 || shared % page != 0 || asked.memory < live::guest_parameters::first_free ||
            shared > asked.memory - live::guest_parameters::first_free)) {
        said.failed("--shared-memory", "whole pages of " + std::to_string(page) + " bytes, and less than the guest's RAM, not " +
                                           std::to_string(shared) + " bytes");
        return exit_failed;
    }
    vmstate::unique_fd serial(asked.serial.empty()
                                  ? ::dup(STDOUT_FILENO)
                                  : ::open(asked.serial.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
    if (!serial) {
        said.failed(asked.serial.empty() ? "stdout" : asked.serial, std::system_category().message(errno));
        return exit_failed;
    }
    const cpu_choice chosen = choose_cpu(asked);
    const bool is_kvm = chosen.cpu == live::cpu_kind::kvm;
    said.processor(is_kvm ? "kvm" : "riscv", chosen.why);
    vmstate::result<std::unique_ptr<live::vm>> vm = live::make_vm(chosen.cpu, {.memory = asked.memory,
        .huge_pages = asked.huge_pages,
        .dirty_log = choose_dirty_log(asked, chosen.cpu),
        .serial = serial.get(),
        .on_halt = [&all] { all.tell(); }});
    if (!vm) {
        said.failed("machine", vm.error().message());
        return exit_failed;
    }
    // Where KVM is itself emulated, a guest takes seconds to fill more.
    constexpr std::uint64_t usual_kvm_work = std::uint64_t{8} << 20;
    const std::uint64_t work_memory = asked.work_memory.value_or(is_kvm ? usual_kvm_work : asked.memory);
    return program(asked, work_memory, **vm, all, said).run();
}

void add_common_options(CLI::App& to, command_line& asked) {
    to.add_option("--memory", asked.memory, "RAM of the guest, with K, M or G; both sides the same")
        ->transform(CLI::AsSizeValue(false))
        ->capture_default_str();
    to.add_flag("--huge-pages", asked.huge_pages,
        "RAM in huge pages of 2 MiB, which have to be reserved before (vm.nr_hugepages); with postcopy both sides the same");
    to.add_option("--cpu", asked.cpu,
          "The processor: x86 by KVM, or a RISC-V that is interpreted; both sides the same. Without: kvm where it can be "
          "used")
        ->check(CLI::IsMember({"kvm", "riscv"}));
    to.add_option("--dirty-log", asked.dirty_log,
          "How writes to RAM are found. riscv: marked by the processor, or pagemap, by the kernel; kvm: kvm-bitmap, kvm-ring "
          "or pagemap. Without: the first")
        ->check(CLI::IsMember({"marked", "pagemap", "kvm-bitmap", "kvm-ring"}));
    to.add_option("--vhost-user", asked.backends,
        "The unix socket of a vhost-user backend that shares memory with the machine, as vhost_user_worker does; once for "
        "each, both sides as many");
    to.add_option("--shared-memory", asked.shared_memory,
          "So much of the RAM, at its end, is what backends share, with K, M or G; the guest leaves it alone; both sides the same")
        ->transform(CLI::AsSizeValue(false))
        ->capture_default_str();
    to.add_option("--serial", asked.serial, "Append the serial port's output to this file; stdout without");
    to.add_flag("--json", asked.json, "Say on stderr what happens as JSON, one object a line");
    CLI::Option* const migrate =
        to.add_option("--migrate-to", asked.migrate_uri, "Where the guest goes: unix:PATH, tcp:HOST:PORT, exec:, file:");
    to.add_option("--after", asked.after, "Seconds that the guest runs here before it goes")
        ->needs(migrate)
        ->check(CLI::Range(0.0, 1e6))
        ->capture_default_str();
    to.add_option("--after-lines", asked.after_lines, "Lines that the guest prints here, too, before it goes")
        ->needs(migrate)
        ->capture_default_str();
    to.add_option("--times", asked.times, "How often it goes, where it comes back each time")
        ->needs(migrate)
        ->capture_default_str();
    to.add_option("--for", asked.run_for, "Seconds after which the program ends, once the guest is here to stay")
        ->check(CLI::Range(0.0, 1e6));
    to.add_option("--downtime-limit", asked.downtime_limit, "Milliseconds that the guest may stand still")
        ->capture_default_str();
    to.add_option("--max-bandwidth", asked.migration.parameters.max_bandwidth, "Bytes per second, with K, M or G; 0 for no limit")
        ->transform(CLI::AsSizeValue(false))
        ->capture_default_str();
    to.add_flag("--auto-converge", asked.migration.parameters.auto_converge, "Slow the guest down where it writes too fast");
    to.add_flag("--xbzrle", asked.migration.parameters.xbzrle, "Send pages that go again as differences");
    to.add_option("--postcopy-after", asked.postcopy_after,
          "When a guest that goes is switched to postcopy, where its memory follows it: after so many seconds of the "
          "migration, as 2s; or after so many passes over its memory, as 1")
        ->needs(migrate)
        ->check([](const std::string& text) {
            return live::postcopy_start::parse(text) ? std::string() : "seconds, as 2s, or passes, as 1; not " + text;
        }, "WHEN");
    to.add_flag("--postcopy", asked.migration.parameters.postcopy_ram,
        "The guest may come by postcopy; both sides the same. So say the other options with that word, and --recover");
    to.add_flag("--postcopy-preempt", asked.migration.parameters.postcopy_preempt,
        "Pages that the guest waits for have a channel of their own; both sides the same");
    to.add_option("--max-postcopy-bandwidth", asked.migration.parameters.max_postcopy_bandwidth,
          "Bytes per second of the pages that it doesn't wait for, with K, M or G; 0 for no limit")
        ->transform(CLI::AsSizeValue(false))
        ->capture_default_str();
    to.add_option("--recover", asked.migration.recover_uri,
        "Where the two sides meet again when a connection breaks in postcopy, as often as it does: unix:PATH, "
        "tcp:HOST:PORT");
}

} // namespace

int main(int argc, char** argv) {
    CLI::App app("A small virtual machine that migrates, while it runs, from one process to another.", "live_machine");
    app.require_subcommand(1);
    command_line asked;
    CLI::App* const running = app.add_subcommand("run", "Start a guest");
    add_common_options(*running, asked);
    running->add_option("--come-back", asked.listen_uri, "Where to wait for the guest after it has gone: unix:PATH, tcp:HOST:PORT")
        ->needs("--migrate-to");
    running->add_option("--work-memory", asked.work_memory,
               "RAM that the guest fills, checks and writes, with K, M or G; it leaves the rest alone. Without: all; on "
               "KVM, up to 8M")
        ->transform(CLI::AsSizeValue(false));
    running->add_option("--dirty-share", asked.dirty_share,
               "Percent of that RAM that the guest writes; the rest it only checks")
        ->check(CLI::Range(0, 100))
        ->capture_default_str();
    running->add_option("--dirty-rate", asked.dirty_rate, "Pages that it writes, and pages that it checks, in a second")
        ->check(CLI::Range(0, 1'000'000))
        ->capture_default_str();
    running->add_option("--tick-interval", asked.tick_interval, "Milliseconds between two ticks")
        ->check(CLI::Range(1, 10'000))
        ->capture_default_str();
    CLI::App* const incoming = app.add_subcommand("incoming", "Wait for a guest that runs elsewhere");
    incoming->add_option("URI", asked.listen_uri, "Where to wait for it: unix:PATH, tcp:HOST:PORT")->required();
    add_common_options(*incoming, asked);
    app.footer("The guest prints \"tick N\" and checks its memory; \"BAD page\" would say that some of it was lost.\n"
               "\n"
               "Exit status: 0 when all went well; 1 when a migration or the guest failed, with the reason; 2 for a wrong\n"
               "command line.\n"
               "\n"
               "Example:  live_machine incoming unix:/tmp/vm.sock &\n"
               "          live_machine run --migrate-to unix:/tmp/vm.sock --after 3\n"
               "\n"
               "          live_machine incoming unix:/tmp/vm.sock --recover unix:/tmp/again.sock &\n"
               "          live_machine run --migrate-to unix:/tmp/vm.sock --postcopy-after 1 --recover unix:/tmp/again.sock");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& failure) {
        return app.exit(failure) == 0 ? EXIT_SUCCESS : exit_usage;
    }
    asked.incoming = incoming->parsed();
    try {
        return run(asked);
    } catch (const std::exception& failure) {
        std::fprintf(stderr, "live_machine: %s\n", failure.what());
        return exit_failed;
    }
}
