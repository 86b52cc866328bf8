// SPDX-License-Identifier: BSL-1.0
#include "shared.hpp"

#include <support/catch.hpp>

TEST_CASE("two translation units share one description") {
    odr::device state;
    const auto here = vmstate::to_bytes<odr::vmstate_device>(state);
    REQUIRE(here.has_value());
    CHECK(*here == odr::save_elsewhere(state));
    CHECK(static_cast<const void*>(&odr::vmstate_device) == odr::description_elsewhere());
    CHECK(vmstate::fingerprint_of<odr::vmstate_device>() == odr::fingerprint_elsewhere());

    odr::device other;
    other.values = {};
    other.extra = 0;
    other.queue.clear();
    REQUIRE(odr::load_elsewhere(*here, other));
    CHECK(other.values == state.values);
    CHECK(other.extra == 6);
    CHECK(other.queue.size() == 1);
    CHECK(other.restarts == 1);
}
