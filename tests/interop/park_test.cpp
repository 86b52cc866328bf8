// SPDX-License-Identifier: BSL-1.0
// vmstate-park between two real QEMUs: a guest that runs is taken over live, kept in a file, and goes on in another QEMU.
#include "support/catch.hpp"
#include "support/certificates.hpp"
#include "support/counter.hpp"
#include "support/qemu.hpp"

#include <vmstate/stream/connect.hpp>

#include <signal.h>
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate::tests;

#ifdef VMSTATE_PARK

namespace {

/// Where a QEMU waits, once it has been told to at a port that the system chooses.
std::string listening_port(qemu& machine) {
    const auto listening = machine.execute("query-migrate").at("socket-address").as_array();
    return "tcp:127.0.0.1:" + std::string(listening.at(listening.size() - 1).at("port").as_string());
}

/// A run of vmstate-park; both of its outputs together.
class park {
public:
    /// `before` it the shell does this.
    explicit park(const std::string& arguments, const std::string& before = "")
        : pipe_(::popen((before + std::string("timeout 120 '" VMSTATE_PARK "' ") + arguments + " 2>&1").c_str(), "r")) {
        REQUIRE(pipe_ != nullptr);
    }
    ~park() {
        if (pipe_ != nullptr) ::pclose(pipe_);
    }
    park(const park&) = delete;
    park& operator=(const park&) = delete;

    std::string line() {
        char text[1024] = {};
        return std::fgets(text, sizeof text, pipe_) != nullptr ? text : "";
    }
    /// The rest of what it says; `status` is its exit status.
    std::string rest(int& status) {
        std::string all;
        for (std::string one = line(); !one.empty(); one = line()) all += one;
        const int ended = ::pclose(std::exchange(pipe_, nullptr));
        status = WIFEXITED(ended) ? WEXITSTATUS(ended) : -1;
        return all;
    }

private:
    std::FILE* pipe_;
};

} // namespace

TEST_CASE("a running guest is parked in a file and goes on in another QEMU") {
    VMSTATE_REQUIRE_QEMU();
    const bool return_path = GENERATE(true, false);
    const bool tls = GENERATE(false, true);
    const bool multifd = GENERATE(false, true);
    const bool tcp = tls == multifd; // each of them over both
    CAPTURE(return_path, tls, multifd, tcp);
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    qemu_options options{.machine = "pc", .rom = guest_rom("counter")};
    std::string tls_option;
    if (tls) {
        certificate_authority authority;
        authority.write(directory.path());
        authority.issue({}).write(directory.path(), "server");
        authority.issue({.name = "source", .alternative_names = {}, .purpose = "clientAuth"}).write(directory.path(), "client");
        tls_option = " --tls-x509 " + directory.path().string();
    }
    const auto with_credentials = [&](const char* endpoint) {
        qemu_options more = options;
        if (tls)
            more.arguments = {"-object", "tls-creds-x509,id=tls0,verify-peer=on,dir=" + directory.path().string() +
                                             ",endpoint=" + endpoint};
        return more;
    };
    const auto configure = [&](qemu& machine) {
        if (tls) machine.execute("migrate-set-parameters", {{"tls-creds", "tls0"}, {"tls-hostname", "localhost"}});
        if (!multifd) return;
        machine.execute("migrate-set-capabilities",
            {{"capabilities", boost::json::array{boost::json::object{{"capability", "multifd"}, {"state", true}}}}});
        machine.execute("migrate-set-parameters", {{"multifd-channels", 2}, {"multifd-compression", "zstd"}});
    };
    const std::string with = tls_option + (multifd ? " --multifd 2 --multifd-compression zstd" : "");
    qemu first(with_credentials("client"));
    first.wait_serial(lines(3), "3 lines");
    REQUIRE(first.migrate_to_file(directory / "schema").completed);
    first.cont();
    first.wait_serial(lines(6), "6 lines");
    first.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{boost::json::object{{"capability", "return-path"}, {"state", return_path}}}}});

    configure(first);
    int status = -1;
    {
        park receiving("receive " + (tcp ? "tcp:127.0.0.1:0" : "unix:" + path("in")) + " " + path("parked") + " --schema " +
                       path("schema") + with);
        std::string where = receiving.line();
        REQUIRE(where.starts_with(tcp ? "waiting at tcp:127.0.0.1:" : "waiting at unix:" + path("in") + "\n"));
        where = where.substr(11, where.size() - 12);
        const migration_outcome left = first.migrate(where);
        const std::string said = receiving.rest(status);
        CAPTURE(said);
        REQUIRE(left.error == "");
        REQUIRE(status == 0);
        CHECK(said.find("parked in " + path("parked")) != std::string::npos);
        CHECK((said.find("didn't wait for") == std::string::npos) == return_path);
    }
    const std::string before = first.serial();

    qemu_options more = with_credentials("server");
    more.arguments.insert(more.arguments.end(), {"-incoming", "defer"}); // it has to be told how first
    // libvirt gives every QEMU a uuid, and multifd's channels have to know it.
    const std::string uuid = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";
    if (multifd) more.arguments.insert(more.arguments.end(), {"-uuid", uuid});
    qemu second(more);
    configure(second);
    second.execute("migrate-incoming", {{"uri", tcp ? "tcp:127.0.0.1:0" : "unix:" + path("out")}});
    const std::string where = tcp ? listening_port(second) : "unix:" + path("out");
    const std::string said = park("send " + path("parked") + " " + where + with + (multifd ? " --uuid " + uuid : "")).rest(status);
    CAPTURE(said);
    REQUIRE(status == 0);
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const auto output = counter::output_of_two(before, second); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
}

TEST_CASE("a running guest is parked by postcopy and goes on by postcopy in another QEMU") {
    VMSTATE_REQUIRE_QEMU();
    struct way {
        bool tcp, preempt, tls;
    };
    const way how = GENERATE(way{false, false, false}, way{true, true, false}, way{true, false, true}, way{false, true, true});
    CAPTURE(how.tcp, how.preempt, how.tls);
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    // Full of something, where the guest never looks.
    std::vector<std::byte> ballast(12 << 20);
    std::minstd_rand random(1);
    for (std::size_t i = 0; i < ballast.size(); i += 64) ballast[i] = static_cast<std::byte>(random() >> 8);
    write_file(directory / "ballast", ballast);
    if (how.tls) {
        certificate_authority authority;
        authority.write(directory.path());
        authority.issue({}).write(directory.path(), "server");
        authority.issue({.name = "source", .alternative_names = {}, .purpose = "clientAuth"}).write(directory.path(), "client");
    }
    const auto options = [&](const char* endpoint) {
        qemu_options all{.machine = "microvm", .rom = guest_rom("counter")};
        if (how.tls)
            all.arguments = {"-object", "tls-creds-x509,id=tls0,verify-peer=on,dir=" + directory.path().string() + ",endpoint=" + endpoint};
        return all;
    };
    const auto configure = [&](qemu& machine) {
        if (how.tls) machine.execute("migrate-set-parameters", {{"tls-creds", "tls0"}, {"tls-hostname", "localhost"}});
        const auto on = [](const char* name) { return boost::json::object{{"capability", name}, {"state", true}}; };
        boost::json::array wanted{on("postcopy-ram"), on("return-path")};
        machine.execute("migrate-set-capabilities", {{"capabilities", wanted}});
        if (how.preempt) machine.execute("migrate-set-capabilities", {{"capabilities", boost::json::array{on("postcopy-preempt")}}});
        // Precopy doesn't come to its end, and postcopy lets somebody wait for a page.
        machine.execute("migrate-set-parameters",
            {{"downtime-limit", 1}, {"max-bandwidth", 2 << 20}, {"max-postcopy-bandwidth", 16 << 20}});
    };
    const std::string with = " --postcopy" + std::string(how.preempt ? " --postcopy-preempt" : "") +
                             (how.tls ? " --tls-x509 " + directory.path().string() : "");

    qemu_options first_options = options("client");
    first_options.arguments.insert(first_options.arguments.end(),
        {"-device", "loader,force-raw=on,addr=0x200000,file=" + path("ballast")});
    qemu first(first_options);
    first.wait_serial(lines(3), "3 lines");
    REQUIRE(first.migrate_to_file(directory / "schema").completed);
    first.cont();
    first.wait_serial(lines(6), "6 lines");
    configure(first);
    int status = -1;
    {
        park receiving("receive " + (how.tcp ? std::string("tcp:127.0.0.1:0") : "unix:" + path("in")) + " " + path("parked") +
                       " --schema " + path("schema") + with);
        std::string where = receiving.line();
        if (where.find("userfaultfd") != std::string::npos) return skip(where);
        REQUIRE(where.starts_with("waiting at "));
        where = where.substr(11, where.size() - 12);
        first.execute("migrate", {{"uri", where}});
        const auto state = [&] { return std::string(first.execute("query-migrate").at("status").as_string()); };
        while (state() == "setup") std::this_thread::sleep_for(std::chrono::milliseconds(2));
        first.execute("migrate-start-postcopy");
        const std::string said = receiving.rest(status);
        CAPTURE(said);
        REQUIRE(status == 0);
        CHECK(said.find("while they came, and each was whole") != std::string::npos);
        CHECK(said.find("they waited 0 times") == std::string::npos);
        CHECK(said.find("didn't wait for") == std::string::npos);
        CHECK(said.find("parked in " + path("parked")) != std::string::npos);
        while (state() == "postcopy-active") std::this_thread::sleep_for(std::chrono::milliseconds(2));
        REQUIRE(state() == "completed");
    }
    const std::string before = first.serial();

    qemu_options second_options = options("server");
    second_options.arguments.insert(second_options.arguments.end(), {"-incoming", "defer"});
    qemu second(second_options);
    configure(second);
    second.execute("migrate-incoming", {{"uri", how.tcp ? std::string("tcp:127.0.0.1:0") : "unix:" + path("out")}});
    std::string where = "unix:" + path("out");
    if (how.tcp) where = listening_port(second);
    const std::string said = park("send " + path("parked") + " " + where + " --max-postcopy-bandwidth 16000000" + with).rest(status);
    CAPTURE(said);
    REQUIRE(status == 0);
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const auto output = counter::output_of_two(before, second); // throws at "BAD"
    for (std::size_t i = 1; i < output.size(); ++i) REQUIRE(output[i].round == output[i - 1].round + 1);
    std::uint32_t round = 0;
    CHECK(counter::check_memory(second.memory(0, 0x60000), round) == "");
    CHECK(second.memory(0x200000, ballast.size()) == ballast);
}

TEST_CASE("a machine that isn't the schema's is refused by name, and its guest runs on") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    qemu other({.machine = "microvm", .rom = guest_rom("counter")});
    other.wait_serial(lines(1), "a line");
    REQUIRE(other.migrate_to_file(directory / "schema").completed);
    qemu first({.machine = "pc", .rom = guest_rom("counter")});
    first.wait_serial(lines(1), "a line");
    first.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{boost::json::object{{"capability", "return-path"}, {"state", true}}}}});
    park receiving("receive unix:" + path("in") + " " + path("parked") + " --schema " + path("schema"));
    receiving.line();
    CHECK_FALSE(first.migrate("unix:" + path("in")).completed);
    int status = -1;
    const std::string said = receiving.rest(status);
    CHECK(status == 1);
    CHECK(said.find("configuration/name") != std::string::npos);
    CHECK(first.status() == "running");
    CHECK_FALSE(std::filesystem::exists(directory / "parked"));
}

TEST_CASE("a machine that can't be kept runs on where it is") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    qemu first({.machine = "microvm", .rom = guest_rom("counter")});
    first.wait_serial(lines(1), "a line");
    REQUIRE(first.migrate_to_file(directory / "schema").completed);
    first.cont();
    first.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{boost::json::object{{"capability", "return-path"}, {"state", true}}}}});
    const std::string receive = "receive unix:" + path("in") + " ";
    const std::string schema = " --schema " + path("schema");
    int status = -1;
    // Where no file can be made nobody waits for a machine.
    std::string said = park(receive + path("nowhere/parked") + schema).rest(status);
    CHECK(status == 1);
    CHECK(said.find("waiting at") == std::string::npos);
    CHECK(said.find("No such file or directory") != std::string::npos);
    said = park(receive + "/dev/null" + schema).rest(status);
    CHECK(status == 1);
    CHECK(said.find("waiting at") == std::string::npos);

    write_file(directory / "parked", std::vector<std::byte>(3));
    {
        park receiving(receive + path("parked") + schema, "trap '' XFSZ; ulimit -f 16; ");
        REQUIRE(receiving.line() == "waiting at unix:" + path("in") + "\n");
        CHECK(std::filesystem::exists(directory / "parked.partial"));
        CHECK_FALSE(first.migrate("unix:" + path("in")).completed);
        said = receiving.rest(status);
    }
    CAPTURE(said);
    CHECK(status == 1);
    CHECK(said.find("accept: input/output error: " + path("parked.partial")) != std::string::npos);
    CHECK(said.find("File too large") != std::string::npos);
    CHECK(first.status() == "running");
    CHECK_FALSE(std::filesystem::exists(directory / "parked.partial"));
    CHECK(std::filesystem::file_size(directory / "parked") == 3); // that of before
    const std::string before = first.serial();
    first.wait_serial([&](std::string_view now) { return now.size() > before.size(); }, "more of it");
}

namespace {

/// Options of `receive` in which it waits differently. Their certificates, and a schema for any of them, go into `directory`.
std::vector<std::string> ways_to_wait(const temporary_directory& directory) {
    {
        qemu first({.machine = "microvm", .rom = guest_rom("counter")});
        REQUIRE(first.migrate_to_file(directory / "schema").completed);
    }
    certificate_authority authority;
    authority.write(directory.path());
    authority.issue({}).write(directory.path(), "server");
    return {"", " --tls-x509 " + directory.path().string(), " --multifd 2"};
}

} // namespace

TEST_CASE("a signal that ends the wait for a machine leaves nothing behind") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    for (const std::string& way : ways_to_wait(directory)) {
        CAPTURE(way);
        park receiving("receive unix:" + path("in") + " " + path("parked") + " --schema " + path("schema") + way,
            "echo $$ >'" + path("pid") + "'; exec "); // timeout passes the signal on
        REQUIRE(receiving.line() == "waiting at unix:" + path("in") + "\n");
        CHECK(std::filesystem::exists(directory / "in"));
        CHECK(std::filesystem::exists(directory / "parked.partial"));
        ::pid_t pid = 0;
        std::ifstream(directory / "pid") >> pid;
        REQUIRE(pid > 1);
        REQUIRE(::kill(pid, SIGTERM) == 0);
        int status = -1;
        const std::string said = receiving.rest(status);
        CAPTURE(said);
        CHECK(status == 1);
        CHECK(said.find("cancelled") != std::string::npos);
        CHECK_FALSE(std::filesystem::exists(directory / "in"));
        CHECK_FALSE(std::filesystem::exists(directory / "parked.partial"));
    }
}

TEST_CASE("who connects and says nothing isn't waited for longer than one says") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    for (const std::string& way : ways_to_wait(directory)) {
        CAPTURE(way);
        const std::string uri = "unix:" + path("in");
        park receiving("receive " + uri + " " + path("parked") + " --timeout 1 --schema " + path("schema") + way);
        REQUIRE(receiving.line() == "waiting at " + uri + "\n");
        const auto stray = vmstate::connect(uri);
        REQUIRE(stray);
        int status = -1;
        const std::string said = receiving.rest(status);
        CAPTURE(said);
        CHECK(status == 1); // not that of who ends it after two minutes
        CHECK(said.find("timed out") != std::string::npos);
    }
    CHECK_FALSE(std::filesystem::exists(directory / "parked"));
}

#else

TEST_CASE("vmstate-park parks a guest") {
    skip("vmstate-park is not built (VMSTATE_BUILD_EXAMPLES is off)");
}

#endif
