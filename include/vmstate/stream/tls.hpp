// SPDX-License-Identifier: BSL-1.0
//
// TLS over any channel with two directions, as QEMU's tls-creds-x509 and tls-creds-psk: the same files, and either side
// may be QEMU. Depends on channel.hpp, connector.hpp, Boost.Asio's SSL context and OpenSSL: link vmstate::tls.
#pragma once

#include <arpa/inet.h>

#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/error.hpp>
#include <boost/system/error_code.hpp>

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <vmstate/stream/channel.hpp>
#include <vmstate/stream/connector.hpp>

namespace vmstate {

/// Which side of the handshake: a migration's source connects and is the client, its destination the server.
enum class tls_endpoint { client, server };

namespace detail {

struct tls_state {
    boost::asio::ssl::context context;
    tls_endpoint endpoint;
    bool verify_peer = true;
    bool pre_shared = false;
    std::string username{};                                   // of a client with a pre-shared key
    std::map<std::string, std::vector<unsigned char>> keys{}; // by username
};

class tls_session;

} // namespace detail

/// Who one is, and whom one trusts. Cheap to copy; any number of channels, also at the same time, may use one.
class tls_credentials {
public:
    /// X.509 from a directory with QEMU's file names: ca-cert.pem, ca-crl.pem where there is one, and server-cert.pem and
    /// server-key.pem, or client-cert.pem and client-key.pem (a client may have none). Keys have no passphrase.
    /// `verify_peer`: a server asks for the client's certificate and refuses who has none; a client checks the server's,
    /// and that it is the host's. Certificates are checked for signature, dates, purpose and revocation.
    static result<tls_credentials> x509(
        const std::filesystem::path& directory, tls_endpoint endpoint, bool verify_peer = true) {
        result<tls_credentials> made = make(endpoint);
        if (!made) return made;
        detail::tls_state& state = *made->state_;
        state.verify_peer = verify_peer;
        if (result<void> loaded = load_x509(state, directory); !loaded) return loaded.error();
        return made;
    }

    /// Pre-shared keys from `directory`/keys.psk, lines of `username:key in hexadecimal` (psktool writes such). A server
    /// takes every user of the file; a client is `username`, "qemu" where none is given.
    static result<tls_credentials> psk(
        const std::filesystem::path& directory, tls_endpoint endpoint, std::string username = {}) {
        if (endpoint == tls_endpoint::server && !username.empty())
            return error(errc::invalid_argument, "no username on a server, which has all of its file", username);
        result<tls_credentials> made = make(endpoint);
        if (!made) return made;
        detail::tls_state& state = *made->state_;
        state.pre_shared = true;
        state.username = username.empty() ? "qemu" : std::move(username);
        if (result<void> loaded = load_keys(state, directory / "keys.psk"); !loaded) return loaded.error();
        return made;
    }

    tls_endpoint endpoint() const noexcept { return state_->endpoint; }

private:
    friend class detail::tls_session;
    using context_type = boost::asio::ssl::context;

    explicit tls_credentials(std::shared_ptr<detail::tls_state> state) noexcept : state_(std::move(state)) {}

    static result<tls_credentials> make(tls_endpoint endpoint) try {
        const auto method = endpoint == tls_endpoint::client ? context_type::tls_client : context_type::tls_server;
        auto state = std::make_shared<detail::tls_state>(detail::tls_state{context_type(method), endpoint});
        SSL_CTX* const context = state->context.native_handle();
        SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
        SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_NO_TICKET);
        SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
        // A migration is never resumed, and a ticket that a QEMU without return path never reads makes its close() a
        // reset of the connection, which can cost the end of the stream.
        SSL_CTX_set_num_tickets(context, 0);
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
        return tls_credentials(std::move(state));
    } catch (const std::exception& thrown) {
        return error(errc::io, {}, std::string("OpenSSL: ") + thrown.what());
    }

    static result<void> load_x509(detail::tls_state& state, const std::filesystem::path& directory) {
        context_type& context = state.context;
        boost::system::error_code failed;
        const auto refused = [&](const std::string& path) {
            ERR_clear_error();
            return error(errc::io, {}, path + ": " + failed.message());
        };
        // OpenSSL would ask at the terminal.
        context.set_password_callback(
            [](std::size_t, context_type::password_purpose) { return std::string(); }, failed);

        const std::string authority = (directory / "ca-cert.pem").string();
        if (result<void> there = readable(authority); !there) return there;
        context.load_verify_file(authority, failed);
        if (failed) return refused(authority);
        if (const std::string revoked = (directory / "ca-crl.pem").string(); exists(revoked)) {
            ERR_clear_error();
            X509_STORE* const store = SSL_CTX_get_cert_store(context.native_handle());
            X509_LOOKUP* const lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
            if (!lookup || X509_load_crl_file(lookup, revoked.c_str(), X509_FILETYPE_PEM) <= 0)
                return error(errc::io, {}, revoked + ": no certificate revocation list");
            X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
        }

        const bool server = state.endpoint == tls_endpoint::server;
        const std::string name = server ? "server" : "client";
        const std::string certificate = (directory / (name + "-cert.pem")).string();
        const std::string key = (directory / (name + "-key.pem")).string();
        // A client without either is a client without a certificate; with one of them it is a mistake.
        if (server || exists(certificate) || exists(key)) {
            for (const std::string& path : {certificate, key})
                if (result<void> there = readable(path); !there) return there;
            context.use_certificate_chain_file(certificate, failed);
            if (failed) return refused(certificate);
            context.use_private_key_file(key, context_type::pem, failed); // fails, too, where it isn't the certificate's
            if (failed) return refused(key);
        }
        int mode = SSL_VERIFY_NONE;
        if (state.verify_peer) mode = SSL_VERIFY_PEER | (server ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0);
        SSL_CTX_set_verify(context.native_handle(), mode, nullptr);
        return {};
    }

    static result<void> load_keys(detail::tls_state& state, const std::filesystem::path& path) {
        std::ifstream file(path);
        if (!file) return error(errc::io, {}, path.string() + ": " + std::system_category().message(errno));
        std::size_t number = 0;
        for (std::string line; std::getline(file, line);) {
            ++number;
            if (!line.empty() && line.back() == '\r') line.pop_back();
            if (line.empty() || line.front() == '#') continue;
            const std::size_t colon = line.find(':');
            std::vector<unsigned char> key;
            if (colon != std::string::npos) key = from_hexadecimal(std::string_view(line).substr(colon + 1));
            // The sizes are OpenSSL's largest.
            if (colon == 0 || colon > PSK_MAX_IDENTITY_LEN || key.empty() || key.size() > PSK_MAX_PSK_LEN)
                return error(errc::invalid_argument, path.string() + ": lines of username:key in hexadecimal",
                    "another one at line " + std::to_string(number));
            state.keys.insert_or_assign(line.substr(0, colon), std::move(key));
        }
        SSL_CTX* const context = state.context.native_handle();
        // RFC 8446 binds such a key to SHA-256 where nothing else is said, and to suites that use it. Before TLS 1.3: those
        // with forward secrecy.
        if (SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256") != 1 ||
            SSL_CTX_set_cipher_list(context, "kECDHEPSK:kDHEPSK:!eNULL:!3DES:!RC4") != 1)
            return error(errc::unsupported, "an OpenSSL with pre-shared keys");
        if (state.endpoint == tls_endpoint::client) {
            if (!state.keys.contains(state.username))
                return error(errc::invalid_argument, path.string() + ": a key of " + state.username, "none");
            SSL_CTX_set_psk_client_callback(context, &client_key);
            // A server that goes on with a certificate instead doesn't know the key: there is no authority it could show.
            SSL_CTX_set_verify(context, SSL_VERIFY_PEER, nullptr);
        } else {
            SSL_CTX_set_dh_auto(context, 1);
            SSL_CTX_set_psk_server_callback(context, &server_key);
        }
        return {};
    }

    static bool exists(const std::string& path) {
        std::error_code failed;
        return std::filesystem::exists(path, failed);
    }
    static result<void> readable(const std::string& path) {
        if (std::ifstream(path)) return {};
        return error(errc::io, {}, path + ": " + std::system_category().message(errno));
    }
    static std::vector<unsigned char> from_hexadecimal(std::string_view text) {
        std::vector<unsigned char> bytes;
        const auto digit = [](char c) -> unsigned {
            if (c >= '0' && c <= '9') return static_cast<unsigned>(c - '0');
            const char lower = static_cast<char>(c | 0x20);
            return lower >= 'a' && lower <= 'f' ? static_cast<unsigned>(lower - 'a') + 10 : 16;
        };
        for (std::size_t i = 0; i < text.size(); i += 2) {
            const unsigned high = digit(text[i]);
            const unsigned low = i + 1 < text.size() ? digit(text[i + 1]) : 16;
            if (high > 15 || low > 15) return {};
            bytes.push_back(static_cast<unsigned char>(high * 16 + low));
        }
        return bytes;
    }

    static unsigned client_key(
        SSL* ssl, const char*, char* identity, unsigned identity_size, unsigned char* key, unsigned key_size);
    static unsigned server_key(SSL* ssl, const char* identity, unsigned char* key, unsigned key_size);

    std::shared_ptr<detail::tls_state> state_;
};

namespace detail {

/// One TLS connection and those who use it: a channel and its return paths.
///
/// Locks, in the order in which they are taken; none of the first two is needed by the other direction, and the third is
/// never held while a call waits for the peer:
///   reading_  in_ and what was read from it: one reader at a time
///   writing_  out_ and the order of what goes there: one writer at a time
///   session_  OpenSSL's object, which knows no threads, and the bytes in its two memory BIOs
class tls_session {
public:
    /// `channel` gives its return path for reading, so that both directions wait on their own.
    static result<std::shared_ptr<tls_session>> make(std::unique_ptr<duplex_channel> channel,
        const tls_credentials& given, tls_endpoint endpoint, const std::string& hostname, const opening_options& how) {
        if (given.endpoint() != endpoint)
            return error(errc::invalid_argument, "the credentials of a TLS " + text_of(endpoint),
                "those of a " + text_of(given.endpoint()));
        const std::shared_ptr<tls_state>& credentials = given.state_;
        result<std::unique_ptr<duplex_channel>> in = channel->get_return_path();
        if (!in) return in.error();
        ERR_clear_error();
        ssl_pointer ssl(SSL_new(credentials->context.native_handle()));
        BIO* const received = BIO_new(BIO_s_mem());
        BIO* const to_send = BIO_new(BIO_s_mem());
        if (!ssl || !received || !to_send) {
            BIO_free(received);
            BIO_free(to_send);
            return error(errc::io, {}, "TLS: " + openssl_reason());
        }
        SSL_set_bio(ssl.get(), received, to_send); // they are the SSL's now
        auto session = std::make_shared<tls_session>(
            std::move(channel), std::move(*in), credentials, std::move(ssl), received, to_send);
        SSL_set_app_data(session->ssl_.get(), session.get());
        {
            const std::stop_callback end(how.stop, [&] { session->shutdown(); });
            if (result<void> shaken = session->handshake(hostname, how.timeout); !shaken)
                return how.stop.stop_requested() ? cancelled_handshake() : shaken.error();
        }
        if (session->was_shut_down()) return cancelled_handshake();
        if (how.timeout.count() > 0) session->bound_waits(std::chrono::milliseconds(0));
        return session;
    }

    struct ssl_deleter {
        void operator()(SSL* ssl) const noexcept { SSL_free(ssl); }
    };
    using ssl_pointer = std::unique_ptr<SSL, ssl_deleter>;

    tls_session(std::unique_ptr<duplex_channel> out, std::unique_ptr<duplex_channel> in,
        std::shared_ptr<tls_state> credentials, ssl_pointer ssl, BIO* received, BIO* to_send)
        : out_(std::move(out))
        , in_(std::move(in))
        , credentials_(std::move(credentials))
        , ssl_(std::move(ssl))
        , received_(received)
        , to_send_(to_send)
        , cipher_in_(buffer_size)
        , plain_(record_size) {}
    tls_session(const tls_session&) = delete;
    tls_session& operator=(const tls_session&) = delete;

    using timeout_type = std::optional<std::chrono::milliseconds>;

    result<void> writev(std::span<const std::span<const std::byte>> parts, const timeout_type& timeout) {
        error failure;
        {
            const std::lock_guard writing(writing_);
            if (timeout) out_->set_timeout(*timeout);
            failure = write_all(parts);
        }
        if (!failure) return {};
        return explain(std::move(failure));
    }

    void limit_unsent(std::size_t bytes) noexcept { out_->limit_unsent(bytes); }
    void limit_unread(std::size_t bytes) noexcept { in_->limit_unread(bytes); }
    result<std::size_t> read_some(
        std::span<const std::span<std::byte>> parts, const timeout_type& timeout) {
        if (std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part.empty(); }))
            return error(errc::invalid_argument, "room for at least one byte");
        const std::lock_guard reading(reading_);
        if (timeout) in_->set_timeout(*timeout);
        for (;;) {
            result<std::optional<std::size_t>> some = decrypt(parts);
            if (!some) return some.error();
            if (*some) return **some;
            // What the protocol answers by itself (new keys). If somebody writes just now, it goes out in his turn: to
            // wait for him could be to wait for a peer that waits for us.
            if (const std::unique_lock writing(writing_, std::try_to_lock); writing) (void)send_pending();
            const result<std::size_t> got = receive();
            if (!got) return got.error();
            if (*got == 0)
                return error(errc::truncated, "the end that TLS announces (close_notify)", "the connection's end");
        }
    }

    /// Of the connection below: what it still has may be an end that TLS says itself.
    bool is_ended() noexcept { return in_->is_ended(); }
    /// TLS's end of this direction, and then the connection's; the other one goes on. Waits for a write that is under way.
    void end_output(const timeout_type& timeout) noexcept try {
        const std::lock_guard writing(writing_);
        if (timeout) out_->set_timeout(*timeout);
        say_goodbye();
        out_->end_output();
    } catch (const std::exception&) {
        shutdown(); // without memory for those few bytes the peer is told by the connection alone
    }
    void shutdown() noexcept {
        shut_.store(true, std::memory_order_relaxed);
        out_->shutdown();
        in_->shutdown();
    }
    void add_user() noexcept { users_.fetch_add(1, std::memory_order_relaxed); }
    /// The last one tells the peer that this is the end, if all have closed in good order.
    result<void> drop_user(bool in_order, const timeout_type& timeout) {
        if (!in_order) abandoned_.store(true, std::memory_order_relaxed);
        if (users_.fetch_sub(1, std::memory_order_acq_rel) != 1) return {};
        if (!abandoned_.load(std::memory_order_relaxed) && !was_shut_down()) {
            const std::lock_guard writing(writing_);
            if (timeout) out_->set_timeout(*timeout);
            say_goodbye();
        }
        const result<void> in_closed = in_->close();
        result<void> closed = out_->close();
        return closed ? in_closed : closed;
    }
    bool was_shut_down() const noexcept { return shut_.load(std::memory_order_relaxed); }

    static std::string text_of(tls_endpoint endpoint) { return endpoint == tls_endpoint::client ? "client" : "server"; }

    // For the callbacks of pre-shared keys, which OpenSSL calls inside the handshake.
    const tls_state& credentials() const noexcept { return *credentials_; }
    void take_user(std::string username) { user_ = std::move(username); }
    void refuse_user(std::string username) { unknown_user_ = std::move(username); }
    static tls_session& of(SSL* ssl) noexcept { return *static_cast<tls_session*>(SSL_get_app_data(ssl)); }

private:
    static constexpr std::size_t record_size = 16 * 1024;  // the most that a TLS record holds
    static constexpr std::size_t buffer_size = 256 * 1024; // what goes to and comes from the channel in one call

    static std::string openssl_reason() { return text_of(take_openssl_error()); }
    static unsigned long take_openssl_error() noexcept {
        const unsigned long code = ERR_get_error();
        ERR_clear_error();
        return code;
    }
    static std::string text_of(unsigned long code) {
        if (code == 0) return "the peer broke the protocol";
        const char* const reason = ERR_reason_error_string(code);
        return reason ? reason : "OpenSSL error " + std::to_string(code);
    }
    /// For an operator, where OpenSSL's words say it to those alone who know the protocol, and mean one thing. Empty where not.
    std::string plain_words(unsigned long code) const {
        if (ERR_GET_LIB(code) != ERR_LIB_SSL) return {};
        const int reason = ERR_GET_REASON(code);
        // What the peer has sent to end this: why it does is known to the peer alone.
        if (reason > SSL_AD_REASON_OFFSET) return "the peer refuses us, and knows why";
        if (reason == SSL_R_BINDER_DOES_NOT_VERIFY) return "the peer's key for the user " + user_ + " is another one";
        // Once a message of the peer's has been taken it would mean something else.
        const OSSL_HANDSHAKE_STATE at = SSL_get_state(ssl_.get());
        if (reason == SSL_R_WRONG_VERSION_NUMBER && (at == TLS_ST_BEFORE || at == TLS_ST_CW_CLNT_HELLO))
            return "the peer doesn't speak TLS";
        return {};
    }
    static error shut_down() { return error(errc::io, {}, "channel was shut down"); }

    /// Why OpenSSL gave up. The caller holds session_.
    error openssl_failure(const std::string& stage) {
        broken_ = true;
        const unsigned long code = take_openssl_error();
        std::string reason = text_of(code);
        const bool verifies = (SSL_get_verify_mode(ssl_.get()) & SSL_VERIFY_PEER) != 0;
        if (const long verdict = SSL_get_verify_result(ssl_.get()); verifies && verdict != X509_V_OK)
            reason = std::string("the peer's certificate is refused: ") + X509_verify_cert_error_string(verdict);
        else if (!unknown_user_.empty())
            reason = "no key for the user " + unknown_user_;
        else if (const std::string words = plain_words(code); !words.empty())
            reason = words + ": " + reason;
        return error(errc::io, {}, "TLS " + stage + ": " + reason);
    }

    static error cancelled_handshake() { return error(errc::io, {}, "TLS handshake: cancelled"); }
    void bound_waits(std::chrono::milliseconds longest) noexcept {
        out_->set_timeout(longest);
        in_->set_timeout(longest);
    }

    // Only called before anyone else knows this session; it takes the locks all the same, so that there is one rule.
    result<void> handshake(const std::string& hostname, std::chrono::milliseconds timeout) {
        using clock = std::chrono::steady_clock;
        const clock::time_point deadline = clock::now() + timeout;
        const bool client = credentials_->endpoint == tls_endpoint::client;
        {
            const std::lock_guard session(session_);
            ERR_clear_error();
            if (!client) {
                SSL_set_accept_state(ssl_.get());
            } else {
                SSL_set_connect_state(ssl_.get());
                if (!credentials_->pre_shared) {
                    if (result<void> expected = expect_host(hostname); !expected) return expected;
                }
            }
        }
        for (;;) {
            bool done = false;
            error failure;
            {
                const std::lock_guard session(session_);
                ERR_clear_error();
                const int outcome = SSL_do_handshake(ssl_.get());
                done = outcome == 1;
                if (!done && SSL_get_error(ssl_.get(), outcome) != SSL_ERROR_WANT_READ)
                    failure = openssl_failure("handshake");
                else if (done && credentials_->pre_shared && !used_pre_shared_key())
                    failure = error(errc::io, {}, "TLS handshake: the peer doesn't use the pre-shared key");
            }
            const std::lock_guard reading(reading_);
            result<void> sent{};
            {
                const std::lock_guard writing(writing_);
                if (timeout.count() > 0) {
                    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - clock::now());
                    if (left.count() <= 0 && !done && !failure)
                        return error(errc::io, {}, "TLS handshake: timed out after " + std::to_string(timeout.count()) + " ms");
                    bound_waits(std::max(left, std::chrono::milliseconds(1)));
                }
                sent = send_pending(); // on failure, too: this tells the peer why
            }
            if (failure) return failure;
            if (!sent) return within_handshake(sent.error());
            if (done) return {};
            const result<std::size_t> got = receive();
            if (!got) return within_handshake(got.error());
            if (*got == 0) return error(errc::io, {}, "TLS handshake: the peer closed the connection");
        }
    }
    static error within_handshake(const error& failure) {
        return error(failure.code(), std::string(failure.expected()), "TLS handshake: " + std::string(failure.found()));
    }

    result<void> expect_host(const std::string& hostname) {
        if (hostname.empty()) {
            if (credentials_->verify_peer)
                return error(errc::invalid_argument, "the host's name, which its certificate must have", "none");
            return {};
        }
        X509_VERIFY_PARAM* const rules = SSL_get0_param(ssl_.get());
        std::array<unsigned char, 16> address;
        const bool is_address = ::inet_pton(AF_INET, hostname.c_str(), address.data()) == 1 ||
                                ::inet_pton(AF_INET6, hostname.c_str(), address.data()) == 1;
        X509_VERIFY_PARAM_set_hostflags(rules, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
        const bool set = is_address ? X509_VERIFY_PARAM_set1_ip_asc(rules, hostname.c_str()) == 1
                                    : X509_VERIFY_PARAM_set1_host(rules, hostname.c_str(), 0) == 1 &&
                                          SSL_set_tlsext_host_name(ssl_.get(), hostname.c_str()) == 1;
        if (!set) return error(errc::invalid_argument, "a host's name", hostname);
        return {};
    }

    /// Before TLS 1.3 the suite says it, since then the key counts as a session resumed.
    bool used_pre_shared_key() const noexcept {
        if (SSL_version(ssl_.get()) >= TLS1_3_VERSION) return SSL_session_reused(ssl_.get()) == 1;
        const SSL_CIPHER* const cipher = SSL_get_current_cipher(ssl_.get());
        return cipher && SSL_CIPHER_get_auth_nid(cipher) == NID_auth_psk;
    }

    /// Once; nothing is written afterwards. The caller holds writing_.
    void say_goodbye() {
        {
            const std::lock_guard session(session_);
            if (std::exchange(output_ended_, true)) return;
            ERR_clear_error();
            if (!broken_) SSL_shutdown(ssl_.get());
            ERR_clear_error();
        }
        // A peer that has all it wants may be gone by now, as QEMU is.
        (void)send_pending();
    }

    /// What OpenSSL has for the peer goes to the channel. The caller holds writing_.
    result<void> send_pending() {
        {
            const std::lock_guard session(session_);
            const std::size_t count = BIO_ctrl_pending(to_send_);
            cipher_out_.resize(count);
            if (count != 0) BIO_read(to_send_, cipher_out_.data(), static_cast<int>(count));
        }
        if (cipher_out_.empty()) return {};
        // After half a record whatever follows would be taken for its other half.
        if (out_failed_) return error(errc::io, {}, "TLS: an earlier write has failed");
        const std::span<const std::byte> bytes(cipher_out_);
        result<void> sent = out_->writev({&bytes, 1});
        out_failed_ = !sent;
        return sent;
    }

    /// What the peer sent goes to OpenSSL; 0 at the connection's end. The caller holds reading_.
    result<std::size_t> receive() {
        const std::span<std::byte> room(cipher_in_);
        const result<std::size_t> got = in_->read_some({&room, 1});
        if (!got || *got == 0) return got;
        const std::lock_guard session(session_);
        if (BIO_write(received_, cipher_in_.data(), static_cast<int>(*got)) != static_cast<int>(*got))
            return error(errc::io, {}, "TLS: out of memory");
        return got;
    }

    /// Fills `parts` with what is there; nothing where more has to be received first.
    result<std::optional<std::size_t>> decrypt(std::span<const std::span<std::byte>> parts) {
        const std::lock_guard session(session_);
        if (broken_) return error(errc::io, {}, "TLS: the session has failed");
        std::size_t done = 0;
        for (std::span<std::byte> part : parts) {
            while (!part.empty()) {
                std::size_t count = 0;
                ERR_clear_error();
                const int outcome = SSL_read_ex(ssl_.get(), part.data(), part.size(), &count);
                if (outcome == 1) {
                    done += count;
                    part = part.subspan(count);
                    continue;
                }
                if (done != 0) {
                    // What is wrong now is wrong in the next call, too; this one has something to give.
                    const int why = SSL_get_error(ssl_.get(), outcome);
                    if (why != SSL_ERROR_WANT_READ && why != SSL_ERROR_ZERO_RETURN)
                        later_ = openssl_failure("read");
                    return std::optional(done);
                }
                if (later_) return later_;
                switch (SSL_get_error(ssl_.get(), outcome)) {
                case SSL_ERROR_WANT_READ: return std::optional<std::size_t>();
                case SSL_ERROR_ZERO_RETURN: return std::optional<std::size_t>(0);
                default: return openssl_failure("read");
                }
            }
        }
        return std::optional(done);
    }

    /// The caller holds writing_.
    error write_all(std::span<const std::span<const std::byte>> parts) {
        std::size_t offset = 0; // into parts.front()
        while (!parts.empty()) {
            bool more = true;
            {
                const std::lock_guard session(session_);
                if (broken_) return error(errc::io, {}, "TLS: the session has failed");
                if (output_ended_) return error(errc::io, {}, "TLS: a write after the output's end");
                while (more && BIO_ctrl_pending(to_send_) < buffer_size) {
                    const std::span<const std::byte> record = next_record(parts, offset);
                    more = !parts.empty();
                    if (record.empty()) continue;
                    std::size_t written = 0;
                    ERR_clear_error();
                    if (SSL_write_ex(ssl_.get(), record.data(), record.size(), &written) != 1)
                        return openssl_failure("write");
                }
            }
            if (result<void> sent = send_pending(); !sent) return sent.error();
        }
        return {};
    }
    /// The next bytes that fill a record: where they lie if they lie together, or gathered.
    std::span<const std::byte> next_record(std::span<const std::span<const std::byte>>& parts, std::size_t& offset) {
        std::size_t filled = 0;
        while (!parts.empty() && filled < record_size) {
            const std::span<const std::byte> rest = parts.front().subspan(offset);
            const std::size_t count = std::min(rest.size(), record_size - filled);
            const bool whole = filled == 0 && count == record_size;
            if (count != 0 && !whole) std::memcpy(plain_.data() + filled, rest.data(), count);
            filled += count;
            offset += count;
            if (offset == parts.front().size()) {
                parts = parts.subspan(1);
                offset = 0;
            }
            if (whole) return rest.first(count);
        }
        return {plain_.data(), filled};
    }

    /// A peer that refuses us says why and closes, and in TLS 1.3 a client learns of it only when it writes or reads: where
    /// a write failed, nobody else reads and the channel can't keep us waiting, look for that alert. Where there is one it
    /// came before what made the write fail.
    error explain(error failure) {
        if (was_shut_down()) return shut_down();
        const std::unique_lock reading(reading_, std::try_to_lock);
        if (!reading || !in_->set_timeout(std::chrono::milliseconds(1))) return failure;
        for (;;) {
            {
                const std::lock_guard session(session_);
                if (broken_) return failure;
                std::byte nowhere[256];
                std::size_t count = 0;
                ERR_clear_error();
                const int outcome = SSL_peek_ex(ssl_.get(), nowhere, sizeof nowhere, &count);
                if (outcome == 1) return failure;
                const int why = SSL_get_error(ssl_.get(), outcome);
                if (why == SSL_ERROR_SSL) return openssl_failure("write");
                if (why != SSL_ERROR_WANT_READ) return failure;
            }
            const result<std::size_t> got = receive();
            if (!got || *got == 0) return failure;
        }
    }

    std::mutex reading_;
    std::mutex writing_;
    std::mutex session_;

    const std::unique_ptr<duplex_channel> out_;
    const std::unique_ptr<duplex_channel> in_;
    const std::shared_ptr<tls_state> credentials_;
    const ssl_pointer ssl_;
    BIO* const received_; // ssl_ owns both
    BIO* const to_send_;
    std::vector<std::byte> cipher_in_;  // reading_
    std::vector<std::byte> cipher_out_; // writing_
    std::vector<std::byte> plain_;      // writing_
    bool out_failed_ = false;           // writing_
    bool broken_ = false;               // session_
    bool output_ended_ = false;         // session_
    error later_;                       // session_
    std::string user_;                  // session_, of a client with a pre-shared key that is known here
    std::string unknown_user_;          // session_
    std::atomic<bool> shut_ = false;
    std::atomic<bool> abandoned_ = false;
    std::atomic<unsigned> users_ = 1;
};

/// A direction of a session, or both.
class tls_channel final : public duplex_channel {
public:
    explicit tls_channel(std::shared_ptr<tls_session> session) noexcept : session_(std::move(session)) {}
    tls_channel(std::shared_ptr<tls_session> session, tls_session::timeout_type timeout) noexcept
        : session_(std::move(session)), timeout_(timeout) {
        session_->add_user();
    }
    // Whoever doesn't close hasn't said that this is the end, and the peer is to know the difference.
    ~tls_channel() override {
        if (!closed_) (void)session_->drop_user(false, timeout_);
    }

    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        if (result<void> usable = this->usable(); !usable) return usable;
        return session_->writev(parts, timeout_);
    }
    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        if (result<void> usable = this->usable(); !usable) return usable.error();
        return session_->read_some(parts, timeout_);
    }
    result<void> close() override {
        if (std::exchange(closed_, true)) return {};
        return session_->drop_user(true, timeout_);
    }
    void shutdown() noexcept override { session_->shutdown(); }
    void end_output() noexcept override {
        if (!closed_) session_->end_output(timeout_);
    }
    bool is_ended() noexcept override { return session_->is_ended(); }
    result<std::unique_ptr<duplex_channel>> get_return_path() override {
        if (result<void> usable = this->usable(); !usable) return usable.error();
        return std::unique_ptr<duplex_channel>(std::make_unique<tls_channel>(session_, timeout_));
    }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override {
        timeout_ = timeout;
        return true;
    }
    void limit_unsent(std::size_t bytes) noexcept override {
        if (!closed_) session_->limit_unsent(bytes);
    }
    void limit_unread(std::size_t bytes) noexcept override {
        if (!closed_) session_->limit_unread(bytes);
    }

private:
    result<void> usable() const {
        if (closed_) return error(errc::io, {}, "channel is closed");
        if (session_->was_shut_down()) return error(errc::io, {}, "channel was shut down");
        return {};
    }

    std::shared_ptr<tls_session> session_;
    tls_session::timeout_type timeout_{};
    bool closed_ = false;
};

} // namespace detail

inline unsigned tls_credentials::client_key(
    SSL* ssl, const char*, char* identity, unsigned identity_size, unsigned char* key, unsigned key_size) {
    const detail::tls_state& state = detail::tls_session::of(ssl).credentials();
    const std::vector<unsigned char>& ours = state.keys.at(state.username);
    if (state.username.size() >= identity_size || ours.size() > key_size) return 0;
    std::memcpy(identity, state.username.c_str(), state.username.size() + 1);
    std::copy(ours.begin(), ours.end(), key);
    return static_cast<unsigned>(ours.size());
}

inline unsigned tls_credentials::server_key(SSL* ssl, const char* identity, unsigned char* key, unsigned key_size) {
    detail::tls_session& session = detail::tls_session::of(ssl);
    const auto found = session.credentials().keys.find(identity);
    if (found == session.credentials().keys.end() || found->second.size() > key_size) {
        session.refuse_user(identity);
        return 0;
    }
    session.take_user(identity);
    std::copy(found->second.begin(), found->second.end(), key);
    return static_cast<unsigned>(found->second.size());
}

/// TLS over a connected channel, as the side that connected. `hostname`: whom one expects there, a name or an address, as
/// QEMU's tls-hostname; of no meaning to a pre-shared key. A peer that can't show what the credentials ask for is refused with
/// `errc::io` and the reason before anything else is sent; a peer that refuses us says so in the first read or write.
///
/// `how`: the longest that the handshake as a whole may take, on channels that have `set_timeout`, which is 0 afterwards;
/// where it is 0 the channel's own bounds each wait. `how.stop` ends the handshake, and the channel with it.
inline result<std::unique_ptr<duplex_channel>> tls_client(std::unique_ptr<duplex_channel> channel,
    const tls_credentials& credentials, const std::string& hostname, const opening_options& how = {}) {
    auto session = detail::tls_session::make(std::move(channel), credentials, tls_endpoint::client, hostname, how);
    if (!session) return session.error();
    return std::unique_ptr<duplex_channel>(std::make_unique<detail::tls_channel>(std::move(*session)));
}

/// The same as the side that accepted.
inline result<std::unique_ptr<duplex_channel>> tls_server(
    std::unique_ptr<duplex_channel> channel, const tls_credentials& credentials, const opening_options& how = {}) {
    auto session = detail::tls_session::make(std::move(channel), credentials, tls_endpoint::server, {}, how);
    if (!session) return session.error();
    return std::unique_ptr<duplex_channel>(std::make_unique<detail::tls_channel>(std::move(*session)));
}

} // namespace vmstate
