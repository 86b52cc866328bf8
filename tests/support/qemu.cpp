// SPDX-License-Identifier: BSL-1.0
#include "support/qemu.hpp"

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/streambuf.hpp>
#include <boost/asio/write.hpp>

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <istream>
#include <iterator>
#include <system_error>
#include <thread>

namespace vmstate::tests {

namespace asio = boost::asio;
namespace json = boost::json;
using clock = std::chrono::steady_clock;

namespace {

constexpr std::chrono::milliseconds glance{20}; // between two looks at something that sends no event

std::string environment(const char* name) {
    const char* value = std::getenv(name);
    return value ? value : "";
}

std::string text_of(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

std::string shell_quoted(const std::string& text) {
    std::string quoted = "'";
    for (const char c : text)
        quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return quoted + "'";
}

std::filesystem::path guest_file(std::string_view name, std::string_view extension) {
    auto path = std::filesystem::path(VMSTATE_GUESTS_DIR) / name;
    path += extension;
    if (!exists(path)) throw qemu_error("there is no guest program " + path.string());
    return path;
}

/// Starts `arguments`, with its output in `output`. It dies with the thread that started it, so that a test which is
/// itself killed leaves no QEMU behind.
pid_t spawn(const std::vector<std::string>& arguments, const std::filesystem::path& output) {
    std::vector<char*> argv;
    for (const auto& argument : arguments)
        argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);

    const pid_t parent = ::getpid();
    const pid_t child = ::fork();
    if (child < 0) throw std::system_error(errno, std::generic_category(), "fork");
    if (child > 0) return child;

    // From here to exec only what is safe after fork in a program with threads.
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);
    const int in = ::open("/dev/null", O_RDONLY);
    const int out = ::open(output.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    ::dup2(in, 0);
    ::dup2(out, 1);
    ::dup2(out, 2);
    ::close_range(3, ~0U, 0);
    ::execv(argv[0], argv.data());
    ::_exit(127);
}

} // namespace

std::filesystem::path find_qemu() {
    if (auto named = environment("VMSTATE_QEMU"); !named.empty()) return named;
    std::string path = environment("PATH");
    for (std::size_t begin = 0; begin <= path.size();) {
        const auto end = std::min(path.find(':', begin), path.size());
        const auto candidate = std::filesystem::path(path.substr(begin, end - begin)) / "qemu-system-x86_64";
        if (::access(candidate.c_str(), X_OK) == 0) return candidate;
        begin = end + 1;
    }
    return {};
}

std::filesystem::path guest_disk(std::string_view name) { return guest_file(name, ".img"); }
std::filesystem::path guest_rom(std::string_view name) { return guest_file(name, ".rom"); }

temporary_directory::temporary_directory() {
    // Short, because the path of a unix socket has room for 107 characters.
    auto name = environment("TMPDIR");
    name = (name.empty() || name.size() > 60 ? "/tmp" : name) + "/vmstate-XXXXXX";
    if (!::mkdtemp(name.data())) throw std::system_error(errno, std::generic_category(), "mkdtemp " + name);
    path_ = name;
}

temporary_directory::~temporary_directory() {
    if (path_.empty()) return;
    if (std::getenv("VMSTATE_KEEP")) {
        std::fprintf(stderr, "kept: %s\n", path_.c_str());
        return;
    }
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

std::vector<std::byte> read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path.string());
    std::vector<std::byte> bytes(file_size(path));
    file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    bytes.resize(static_cast<std::size_t>(file.gcount()));
    return bytes;
}

void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

struct qemu::implementation {
    explicit implementation(qemu_options given) : options(std::move(given)) {
        arguments = {find_qemu().string(), "-nodefaults", "-display", "none", "-no-user-config", "-accel",
            options.accelerator, "-M", options.machine, "-m", options.memory, "-serial",
            "file:" + (directory / "serial.txt").string(), "-qmp",
            "unix:" + (directory / "qmp.sock").string()};
        if (arguments.front().empty()) throw qemu_error("there is no qemu-system-x86_64");
        const auto add = [&](auto... more) { (arguments.push_back(more), ...); };
        if (!options.rom.empty()) add("-bios", options.rom.string());
        if (!options.floppy.empty())
            add("-drive", "if=floppy,format=raw,readonly=on,file=" + options.floppy.string());
        if (!options.disk.empty())
            add("-drive", "if=ide,format=raw,snapshot=on,file=" + options.disk.string());
        if (!options.incoming_file.empty())
            options.incoming = "exec:cat " + shell_quoted(options.incoming_file.string());
        if (!options.incoming.empty()) add("-incoming", "defer");
        if (options.stopped) add("-S");
        arguments.insert(arguments.end(), options.arguments.begin(), options.arguments.end());
        start();
    }

    ~implementation() {
        if (pid > 0) {
            ::kill(pid, SIGKILL);
            while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
            }
        }
    }

    // It is QEMU that connects, so that there is no moment in which its socket isn't there yet.
    void start() {
        asio::local::stream_protocol::acceptor acceptor(io, (directory / "qmp.sock").string());
        bool connected = false;
        acceptor.async_accept(socket, [&](boost::system::error_code error) { connected = !error; });
        pid = spawn(arguments, directory / "output.txt");
        wait("QEMU to connect to its monitor", [&] { return connected; });
        read_on();
        wait("QEMU's greeting", [&] { return greeted; });
        execute("qmp_capabilities", {});
        boost::json::array capabilities;
        for (const std::string& name : options.capabilities)
            capabilities.push_back(boost::json::object{{"capability", name}, {"state", true}});
        if (!capabilities.empty()) execute("migrate-set-capabilities", {{"capabilities", capabilities}});
        // Only now, or a stream that QEMU refuses would make it exit at any point of the above.
        if (!options.incoming.empty()) execute("migrate-incoming", {{"uri", options.incoming}});
    }

    [[noreturn]] void fail(const std::string& what) {
        // A QEMU that has closed its monitor is about to exit, and its status is worth saying.
        if (hung_up) gone_by(clock::now() + std::chrono::seconds(5));
        std::string message = what + "\n  command:";
        for (const auto& argument : arguments)
            message += ' ' + argument;
        if (exit_status) message += "\n  exited with " + std::to_string(*exit_status);
        message += "\n  output: " + text_of(directory / "output.txt");
        throw qemu_error(message);
    }

    bool alive() {
        if (pid > 0) {
            int status = 0;
            if (::waitpid(pid, &status, WNOHANG) == pid) {
                exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
                pid = -1;
            }
        }
        return pid > 0;
    }

    bool gone_by(clock::time_point deadline) {
        while (alive() && clock::now() < deadline)
            std::this_thread::sleep_for(glance);
        return !alive();
    }

    /// Serves the socket until `done`, or throws: when the time is up, or QEMU is gone with nothing left to read.
    template <class Done>
    void wait(const std::string& what, Done done) {
        const auto deadline = clock::now() + options.patience;
        while (!done()) {
            const bool was_alive = alive();
            io.restart();
            const auto served = io.run_one_for(glance);
            if (served == 0 && !was_alive && !done()) fail("QEMU exited during the wait for " + what);
            if (served == 0 && hung_up) std::this_thread::sleep_for(glance);
            if (clock::now() > deadline) fail("no end to the wait for " + what);
        }
    }

    void read_on() {
        asio::async_read_until(socket, received, '\n', [this](boost::system::error_code error, std::size_t) {
            if (error) {
                hung_up = true;
                return;
            }
            std::string line;
            std::istream stream(&received);
            std::getline(stream, line);
            take(json::parse(line).as_object());
            read_on();
        });
    }

    void take(json::object message) {
        if (message.contains("QMP"))
            greeted = true;
        else if (message.contains("event"))
            events.push_back(std::move(message));
        else
            answers.push_back(std::move(message));
    }

    json::value execute(std::string_view command, json::object command_arguments) {
        json::object request{{"execute", command}};
        if (!command_arguments.empty()) request["arguments"] = std::move(command_arguments);
        const std::string text = json::serialize(request) + '\n';
        boost::system::error_code error;
        asio::write(socket, asio::buffer(text), error);
        if (error) {
            hung_up = true;
            fail("cannot send " + text);
        }
        wait(std::string(command), [&] { return !answers.empty(); });
        json::object answer = std::move(answers.front());
        answers.pop_front();
        if (const auto* refusal = answer.if_contains("error"))
            throw qemu_error(
                std::string(command) + ": " + std::string(refusal->as_object().at("desc").as_string()));
        return std::move(answer.at("return"));
    }

    migration_outcome wait_migration() {
        migration_outcome outcome;
        wait("the end of the migration", [&] {
            const json::object state = execute("query-migrate", {}).as_object();
            const auto* named = state.if_contains("status");
            if (!named) return false;
            const std::string status(named->as_string());
            outcome.completed = status == "completed";
            const auto* reason = state.if_contains("error-desc");
            outcome.error = reason ? std::string(reason->as_string()) : "";
            if (status == "failed" || status == "cancelled") {
                if (outcome.error.empty()) outcome.error = status + ": " + text_of(directory / "output.txt");
                return true;
            }
            return outcome.completed;
        });
        return outcome;
    }

    qemu_options options;
    temporary_directory directory;
    std::vector<std::string> arguments;
    pid_t pid = -1;
    std::optional<int> exit_status;

    asio::io_context io;
    asio::local::stream_protocol::socket socket{io};
    asio::streambuf received;
    bool greeted = false;
    bool hung_up = false;
    std::deque<json::object> answers;
    std::deque<json::object> events;
};

qemu::qemu(qemu_options options) : self_(std::make_unique<implementation>(std::move(options))) {}
qemu::~qemu() = default;
qemu::qemu(qemu&&) noexcept = default;
qemu& qemu::operator=(qemu&&) noexcept = default;

json::value qemu::execute(std::string_view command, json::object arguments) {
    return self_->execute(command, std::move(arguments));
}

std::string qemu::human(std::string_view line) {
    return std::string(execute("human-monitor-command", {{"command-line", line}}).as_string());
}

json::object qemu::wait_event(std::string_view name) {
    auto& events = self_->events;
    auto found = events.end();
    self_->wait("the event " + std::string(name), [&] {
        found = std::find_if(events.begin(), events.end(),
            [&](const auto& event) { return event.at("event").as_string() == name; });
        return found != events.end();
    });
    json::object event = std::move(*found);
    events.erase(found);
    return event;
}

int qemu::version() {
    const json::object version = execute("query-version").as_object().at("qemu").as_object();
    return static_cast<int>(version.at("major").as_int64() * 100 + version.at("minor").as_int64());
}
std::string qemu::status() {
    return std::string(execute("query-status").as_object().at("status").as_string());
}

void qemu::stop() { execute("stop"); }
void qemu::cont() {
    // A migration is said to be completed a moment before its source may go on.
    const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (status() == "finish-migrate" && std::chrono::steady_clock::now() < patience)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    execute("cont");
}

migration_outcome qemu::migrate(std::string_view uri) {
    execute("migrate", {{"uri", uri}});
    return self_->wait_migration();
}

migration_outcome qemu::migrate_to_file(const std::filesystem::path& path) {
    return migrate("exec:cat > " + shell_quoted(path.string()));
}

migration_outcome qemu::wait_incoming() {
    try {
        return self_->wait_migration();
    } catch (const qemu_error&) {
        if (alive()) throw;
        return {.completed = false, .error = complaints()};
    }
}

std::vector<std::byte> qemu::memory(std::uint64_t address, std::size_t size) {
    const auto file = self_->directory / "memory";
    execute("pmemsave", {{"val", address}, {"size", size}, {"filename", file.string()}});
    auto bytes = read_file(file);
    std::filesystem::remove(file);
    if (bytes.size() != size)
        throw qemu_error(
            "pmemsave wrote " + std::to_string(bytes.size()) + " of " + std::to_string(size) + " bytes");
    return bytes;
}

void qemu::outb(std::uint16_t port, std::uint8_t value) {
    const auto said = human("o /b " + std::to_string(port) + ' ' + std::to_string(value));
    if (!said.empty()) throw qemu_error("o: " + said);
}

std::uint8_t qemu::inb(std::uint16_t port) {
    // "portb[0x0064] = 0x1c"
    const auto said = human("i /b " + std::to_string(port));
    const auto at = said.find("= ");
    if (at == std::string::npos) throw qemu_error("i: " + said);
    return static_cast<std::uint8_t>(std::stoul(said.substr(at + 2), nullptr, 0));
}

std::string qemu::serial() const { return text_of(self_->directory / "serial.txt"); }

std::string qemu::wait_serial(const std::function<bool(std::string_view)>& enough, std::string_view what) {
    std::string text;
    try {
        self_->wait("the guest to print " + std::string(what), [&] {
            text = serial();
            return enough(text);
        });
    } catch (const qemu_error& error) {
        throw qemu_error(std::string(error.what()) + "\n  serial port: " + text);
    }
    return text;
}

std::string qemu::wait_serial(std::string_view text) {
    return wait_serial([&](std::string_view printed) { return printed.find(text) != printed.npos; }, text);
}

std::string qemu::complaints() const { return text_of(self_->directory / "output.txt"); }
bool qemu::alive() { return self_->alive(); }

int qemu::quit() {
    execute("quit");
    return wait_exit();
}

int qemu::wait_exit() {
    if (!self_->gone_by(clock::now() + self_->options.patience)) self_->fail("QEMU doesn't exit");
    return self_->exit_status.value();
}

const std::filesystem::path& qemu::directory() const noexcept { return self_->directory.path(); }

} // namespace vmstate::tests
