// SPDX-License-Identifier: BSL-1.0
// Certificates, revocation lists and keys for TLS, made while the test runs, in directories with QEMU's file names.
// Depends on OpenSSL (link vmstate::tls).
#pragma once

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace vmstate::tests {

namespace detail {

template <auto Free>
struct freed_by {
    template <class T>
    void operator()(T* object) const noexcept {
        Free(object);
    }
};
using key_pointer = std::unique_ptr<EVP_PKEY, freed_by<EVP_PKEY_free>>;
using x509_pointer = std::unique_ptr<X509, freed_by<X509_free>>;
using crl_pointer = std::unique_ptr<X509_CRL, freed_by<X509_CRL_free>>;

inline void must(bool done, const char* what) {
    if (!done) throw std::runtime_error(std::string("OpenSSL: ") + what);
}

template <class Write>
void write_pem(const std::filesystem::path& path, Write write) {
    std::FILE* const file = std::fopen(path.c_str(), "w");
    if (!file) throw std::runtime_error("cannot write " + path.string());
    const bool written = write(file) == 1;
    must(std::fclose(file) == 0 && written, "writing a PEM file");
}

} // namespace detail

/// What a certificate says.
struct certificate_options {
    std::string name = "vmstate test";
    std::string alternative_names = "DNS:localhost,IP:127.0.0.1,IP:::1"; ///< none where empty
    std::string purpose = "serverAuth";                                  ///< or clientAuth
    long begin = -3600;                                                  ///< seconds from now
    long end = 3600 * 24;
};

/// A certificate with its key.
class certificate {
public:
    certificate(detail::x509_pointer x509, detail::key_pointer key) : x509_(std::move(x509)), key_(std::move(key)) {}

    X509* x509() const noexcept { return x509_.get(); }
    EVP_PKEY* key() const noexcept { return key_.get(); }
    /// `<name>-cert.pem` and `<name>-key.pem`.
    void write(const std::filesystem::path& directory, const std::string& name) const {
        detail::write_pem(directory / (name + "-cert.pem"),
            [&](std::FILE* file) { return PEM_write_X509(file, x509_.get()); });
        detail::write_pem(directory / (name + "-key.pem"), [&](std::FILE* file) {
            return PEM_write_PKCS8PrivateKey(file, key_.get(), nullptr, nullptr, 0, nullptr, nullptr);
        });
    }

private:
    detail::x509_pointer x509_;
    detail::key_pointer key_;
};

/// An authority of the test's own.
class certificate_authority {
public:
    explicit certificate_authority(const std::string& name = "vmstate test authority")
        : own_(make({.name = name, .alternative_names = {}, .purpose = {}}, nullptr, 1)) {}

    certificate issue(const certificate_options& options) { return make(options, &own_, ++serial_); }
    void write(const std::filesystem::path& directory) const {
        detail::write_pem(directory / "ca-cert.pem",
            [&](std::FILE* file) { return PEM_write_X509(file, own_.x509()); });
    }
    /// A list that names one certificate, or none.
    void write_revocation_list(const std::filesystem::path& directory, const certificate* revoked) const {
        const detail::crl_pointer list(X509_CRL_new());
        X509_CRL_set_version(list.get(), 1);
        X509_CRL_set_issuer_name(list.get(), X509_get_subject_name(own_.x509()));
        ASN1_TIME* const begin = X509_gmtime_adj(nullptr, -3600);
        ASN1_TIME* const end = X509_gmtime_adj(nullptr, 3600 * 24);
        X509_CRL_set1_lastUpdate(list.get(), begin);
        X509_CRL_set1_nextUpdate(list.get(), end);
        if (revoked) {
            X509_REVOKED* const entry = X509_REVOKED_new();
            X509_REVOKED_set_serialNumber(entry, X509_get_serialNumber(revoked->x509()));
            X509_REVOKED_set_revocationDate(entry, begin);
            X509_CRL_add0_revoked(list.get(), entry); // takes it over
        }
        ASN1_TIME_free(begin);
        ASN1_TIME_free(end);
        X509_CRL_sort(list.get());
        detail::must(X509_CRL_sign(list.get(), own_.key(), EVP_sha256()) > 0, "signing a revocation list");
        detail::write_pem(directory / "ca-crl.pem",
            [&](std::FILE* file) { return PEM_write_X509_CRL(file, list.get()); });
    }

private:
    /// Signed by `issuer`, or by itself: then it is an authority.
    static certificate make(const certificate_options& options, const certificate* issuer, long serial) {
        detail::key_pointer key(EVP_EC_gen("P-256"));
        detail::x509_pointer x509(X509_new());
        detail::must(key && x509, "making a certificate");
        X509* const made = x509.get();
        X509_set_version(made, 2);
        ASN1_INTEGER_set(X509_get_serialNumber(made), serial);
        X509_gmtime_adj(X509_getm_notBefore(made), options.begin);
        X509_gmtime_adj(X509_getm_notAfter(made), options.end);
        X509_set_pubkey(made, key.get());
        X509_NAME_add_entry_by_txt(X509_get_subject_name(made), "CN", MBSTRING_UTF8,
            reinterpret_cast<const unsigned char*>(options.name.c_str()), -1, -1, 0);
        X509* const signer = issuer ? issuer->x509() : made;
        X509_set_issuer_name(made, X509_get_subject_name(signer));

        X509V3_CTX context;
        X509V3_set_ctx_nodb(&context);
        X509V3_set_ctx(&context, signer, made, nullptr, nullptr, 0);
        const auto extend = [&](int kind, const std::string& value) {
            if (value.empty()) return;
            X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, &context, kind, value.c_str());
            detail::must(extension && X509_add_ext(made, extension, -1) == 1, value.c_str());
            X509_EXTENSION_free(extension);
        };
        extend(NID_basic_constraints, issuer ? "critical,CA:FALSE" : "critical,CA:TRUE");
        extend(NID_key_usage, issuer ? "critical,digitalSignature,keyEncipherment" : "critical,keyCertSign,cRLSign");
        extend(NID_ext_key_usage, options.purpose);
        extend(NID_subject_alt_name, options.alternative_names);
        extend(NID_subject_key_identifier, "hash");
        if (issuer) extend(NID_authority_key_identifier, "keyid");
        detail::must(X509_sign(made, issuer ? issuer->key() : key.get(), EVP_sha256()) > 0, "signing a certificate");
        return {std::move(x509), std::move(key)};
    }

    certificate own_;
    long serial_ = 1;
};

/// `keys.psk`.
inline void write_keys(const std::filesystem::path& directory, const std::string& lines) {
    std::ofstream file(directory / "keys.psk");
    file << lines;
    if (!file.flush()) throw std::runtime_error("cannot write keys.psk");
}

} // namespace vmstate::tests
