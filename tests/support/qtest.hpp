// SPDX-License-Identifier: BSL-1.0
// QEMU's qtest protocol beside a machine that runs: accesses to the guest's memory and ports from outside, 64 bits wide
// where need be. Make the object before the QEMU, and give QEMU its arguments. Depends on Boost.Asio.
#pragma once

#include "support/qemu.hpp"

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/write.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace vmstate::tests {

class qtest {
public:
    std::vector<std::string> arguments() const {
        return {"-qtest", "unix:" + socket_path(), "-qtest-log", "none"};
    }

    /// After QEMU has started, which it does not without its connection.
    void accept() { socket_ = acceptor_.accept(); }

    void writeq(std::uint64_t address, std::uint64_t value) {
        command("writeq " + std::to_string(address) + ' ' + std::to_string(value));
    }
    std::uint64_t readq(std::uint64_t address) {
        return std::stoull(command("readq " + std::to_string(address)).substr(3), nullptr, 0);
    }

    /// Sends a line, and returns the answer, which begins with OK. Throws qemu_error at any other.
    std::string command(const std::string& line) {
        boost::asio::write(socket_, boost::asio::buffer(line + '\n'));
        std::string answer;
        do { // interrupts that were asked for come as lines of their own
            const auto size = boost::asio::read_until(socket_, boost::asio::dynamic_buffer(received_), '\n');
            answer = received_.substr(0, size - 1);
            received_.erase(0, size);
        } while (answer.starts_with("IRQ"));
        if (!answer.starts_with("OK")) throw qemu_error("qtest: " + line + ": " + answer);
        return answer;
    }

private:
    std::string socket_path() const { return (directory_ / "qtest.sock").string(); }

    temporary_directory directory_;
    boost::asio::io_context io_;
    boost::asio::local::stream_protocol::acceptor acceptor_{io_, socket_path()};
    boost::asio::local::stream_protocol::socket socket_{io_};
    std::string received_;
};

} // namespace vmstate::tests
