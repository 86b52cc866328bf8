// SPDX-License-Identifier: BSL-1.0
// Both ends of migrations over TLS, with certificates made for the test. Link vmstate::tls.
#pragma once

#include "support/catch.hpp"
#include "support/certificates.hpp"
#include "support/outcome.hpp"

#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/tls.hpp>

#include <filesystem>
#include <memory>
#include <stop_token>
#include <string>
#include <utility>

namespace vmstate::tests {

/// Certificates of a server, "localhost", and of a client, in a directory as QEMU's tls-creds-x509 has it.
inline void write_certificates(const std::filesystem::path& directory) {
    certificate_authority authority;
    authority.write(directory);
    authority.issue({}).write(directory, "server");
    authority.issue({.name = "source", .alternative_names = {}, .purpose = "clientAuth"}).write(directory, "client");
}
inline tls_credentials credentials_in(const std::filesystem::path& directory, tls_endpoint endpoint) {
    auto credentials = tls_credentials::x509(directory, endpoint);
    REQUIRE(message_of(credentials) == "");
    return std::move(*credentials);
}

inline channel_connector tls_connector(std::string uri, tls_credentials credentials) {
    return [uri = std::move(uri), credentials = std::move(credentials)](
               const opening_options& opening) -> result<std::unique_ptr<output_channel>> {
        auto connected = connect(uri, opening);
        if (!connected) return connected.error();
        (*connected)->set_timeout(opening.timeout);
        auto secure = tls_client(std::move(*connected), credentials, "localhost");
        if (!secure) return secure.error();
        return std::unique_ptr<output_channel>(std::move(*secure));
    };
}
/// `listener` outlives it.
inline channel_acceptor tls_acceptor(socket_listener& listener, tls_credentials credentials) {
    return [&listener, credentials = std::move(credentials)](
               const opening_options& opening) -> result<std::unique_ptr<input_channel>> {
        listener.set_timeout(opening.timeout);
        const std::stop_callback end(opening.stop, [&] { listener.cancel(); });
        auto accepted = listener.accept();
        if (!accepted) return accepted.error();
        auto secure = tls_server(std::move(*accepted), credentials);
        if (!secure) return secure.error();
        return std::unique_ptr<input_channel>(std::move(*secure));
    };
}

} // namespace vmstate::tests
