// SPDX-License-Identifier: BSL-1.0
// vmstate::zlib and vmstate::zstd bring what multifd's pages are compressed with, ready to link.
#include <vmstate/ram/multifd_zlib.hpp>
#include <vmstate/ram/multifd_zstd.hpp>

int main() {
    for (const vmstate::multifd_compression& how : {vmstate::multifd_zlib(), vmstate::multifd_zstd()})
        if (!how.make_compressor() || !how.make_decompressor()) return 1;
    return 0;
}
