// SPDX-License-Identifier: BSL-1.0
// vmstate-park between two real QEMUs: a guest that runs is taken over live, kept in a file, and goes on in another QEMU.
#include "support/catch.hpp"
#include "support/certificates.hpp"
#include "support/counter.hpp"
#include "support/qemu.hpp"

#include <vmstate/stream/connect.hpp>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

using namespace vmstate::tests;

#ifdef VMSTATE_PARK

namespace {

/// A run of vmstate-park; both of its outputs together.
class park {
public:
    explicit park(const std::string& arguments)
        : pipe_(::popen((std::string("timeout 120 '" VMSTATE_PARK "' ") + arguments + " 2>&1").c_str(), "r")) {
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
    CAPTURE(return_path, tls, multifd);
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
        park receiving("receive unix:" + path("in") + " " + path("parked") + " --schema " + path("schema") + with);
        REQUIRE(receiving.line() == "waiting at unix:" + path("in") + "\n");
        const migration_outcome left = first.migrate("unix:" + path("in"));
        const std::string said = receiving.rest(status);
        CAPTURE(said);
        REQUIRE(left.error == "");
        REQUIRE(status == 0);
        CHECK(said.find("parked in " + path("parked")) != std::string::npos);
    }
    const std::string before = first.serial();

    qemu_options more = with_credentials("server");
    more.arguments.insert(more.arguments.end(), {"-incoming", "defer"}); // it has to be told how first
    // libvirt gives every QEMU a uuid, and multifd's channels have to know it.
    const std::string uuid = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";
    if (multifd) more.arguments.insert(more.arguments.end(), {"-uuid", uuid});
    qemu second(more);
    configure(second);
    second.execute("migrate-incoming", {{"uri", "unix:" + path("out")}});
    const std::string said = park("send " + path("parked") + " unix:" + path("out") + with + (multifd ? " --uuid " + uuid : "")).rest(status);
    CAPTURE(said);
    REQUIRE(status == 0);
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    if (second.status() != "running") second.cont();
    second.wait_serial(lines(3), "3 more lines");
    second.stop();
    const auto output = counter::parse_output(before + second.serial()); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
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

TEST_CASE("who connects and says nothing isn't waited for longer than one says") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    {
        qemu first({.machine = "microvm", .rom = guest_rom("counter")});
        REQUIRE(first.migrate_to_file(directory / "schema").completed);
    }
    certificate_authority authority;
    authority.write(directory.path());
    authority.issue({}).write(directory.path(), "server");
    for (const std::string& way : {std::string(), " --tls-x509 " + directory.path().string(), std::string(" --multifd 2")}) {
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
