// SPDX-License-Identifier: BSL-1.0
//
// A source's ear on its preempt channel: a destination of ours asks there for the pages that come there. The main channel's
// socket is busy with all the others, in both directions. Depends on return_path.hpp, postcopy/, machine/ and stream/.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include <vmstate/machine/ram_section.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/postcopy/page_request.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/channel.hpp>
#include <vmstate/support/guarded.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/short_slice.hpp>

namespace vmstate::migration {

/// One thread uses it, and `serve` and `ended` are called on one of its own.
class preempt_requests {
public:
    using serve_function = std::function<result<void>(const page_request& what)>;

    preempt_requests() = default;
    preempt_requests(const preempt_requests&) = delete;
    preempt_requests& operator=(const preempt_requests&) = delete;
    ~preempt_requests() { stop(); }

    /// Takes the other direction of a new connection's preempt channel, where there is one.
    result<void> open(output_channel& urgent) {
        result<std::unique_ptr<duplex_channel>> back = urgent.get_return_path();
        if (!back && back.error() == errc::unsupported) return {};
        if (!back) return std::move(back.error().within("preempt channel"));
        // While nobody waits for a page nothing comes.
        (*back)->set_timeout(std::chrono::milliseconds(0));
        way_back_ = std::move(*back);
        return {};
    }
    bool is_open() const noexcept { return way_back_ != nullptr; }
    /// After `open`. `ended`: nothing more comes, and why; not after `stop`, but perhaps during it.
    void start(const ram_section& ram, serve_function serve, std::function<void(error why)> ended) {
        thread_ = std::thread([this, &ram, serve = std::move(serve), ended = std::move(ended)] {
            vmstate::detail::prefer_short_slice(); // it sends what a guest stands still for
            error why = vmstate::detail::guarded([&] { return listen(ram, serve); }).error();
            if (!std::string_view(why.path()).starts_with("preempt channel")) why = error(why).within("preempt channel");
            ended(why);
        });
    }
    /// Shuts the channel down, in both directions.
    void stop() {
        if (way_back_) way_back_->shutdown();
        if (thread_.joinable()) thread_.join();
        way_back_.reset();
    }

private:
    /// Until something is wrong.
    result<void> listen(const ram_section& ram, const serve_function& serve) {
        buffered_reader in(*way_back_, 4096);
        received_message message;
        page_request_decoder requests(ram);
        for (;;) {
            if (result<void> read = read_return_message(in, message); !read) return read;
            if (message.type != return_message::req_pages && message.type != return_message::req_pages_id)
                return error(errc::bad_command, "a request for pages", "message " + std::to_string(static_cast<unsigned>(message.type)));
            const result<page_request> request = requests.decode(
                static_cast<page_request_type>(message.type), std::span(message.payload).first(message.size));
            if (!request) return request.error();
            if (result<void> served = serve(*request); !served) return served;
        }
    }

    std::unique_ptr<duplex_channel> way_back_;
    std::thread thread_;
};

} // namespace vmstate::migration
