// SPDX-License-Identifier: BSL-1.0
//
// A description is a Boost.Hana sequence of its items, for those who include <vmstate/describe/hana.hpp>: any Hana
// algorithm runs over it, at compile time where Hana's does. Prints a description that way.
#include <vmstate/describe.hpp>
#include <vmstate/describe/hana.hpp>

#include <boost/hana/any_of.hpp>
#include <boost/hana/filter.hpp>
#include <boost/hana/find_if.hpp>
#include <boost/hana/for_each.hpp>
#include <boost/hana/length.hpp>
#include <boost/hana/not_equal.hpp>
#include <boost/hana/optional.hpp>

#include <cstdint>
#include <iostream>
#include <string_view>
#include <type_traits>

namespace hana = boost::hana;

namespace example {

/// QEMU's PC speaker and its 8254 channel, much shortened.
struct SpeakerState {
    std::uint8_t data_on;
    std::uint8_t dummy_refresh_clock;
    std::int64_t next_transition_time;
    std::uint16_t latched_count[3];
    void* audio_voice;
};

bool has_latches(const SpeakerState& s) { return s.data_on != 0; }

constexpr auto vmstate_speaker = vmstate::describe<SpeakerState>(
    {.name = "speaker", .version_id = 2, .minimum_version_id = 1},
    vmstate::field<&SpeakerState::data_on>,
    vmstate::field<&SpeakerState::dummy_refresh_clock>,
    vmstate::field<&SpeakerState::next_transition_time, vmstate::since<2>>,
    vmstate::field<&SpeakerState::latched_count, vmstate::when<has_latches>>,
    vmstate::unused<4>,
    vmstate::transient<&SpeakerState::audio_voice>);

// What Hana asks about an item is a type, so the answers are constants.
constexpr auto is_field = [](auto item) { return hana::bool_c<decltype(item)::kind == vmstate::item_kind::field>; };
constexpr auto is_conditional = [](auto item) {
    if constexpr (decltype(item)::kind == vmstate::item_kind::field)
        return hana::bool_c<decltype(item)::attributes::when_t::present>;
    else return hana::false_c;
};

// hana::filter makes a tuple of the items that answer yes.
constexpr auto fields = hana::filter(vmstate_speaker, is_field);
static_assert(hana::length(vmstate_speaker) == hana::size_c<6>);
static_assert(hana::length(fields) == hana::size_c<4>);
static_assert(hana::any_of(vmstate_speaker, is_conditional));

// hana::find_if finds the first, or nothing: known when this is compiled.
constexpr auto conditional = hana::find_if(vmstate_speaker, is_conditional);
static_assert(conditional != hana::nothing);
static_assert((*conditional).name() == "latched_count");

template <class Member>
constexpr std::size_t count_of = std::is_array_v<Member> ? std::extent_v<Member> : 1;

} // namespace example

using namespace example;

int main() {
    std::cout << vmstate_speaker.name << ", version " << vmstate_speaker.version_id << ", "
              << decltype(hana::length(fields))::value << " fields:\n";
    hana::for_each(fields, [](auto item) {
        using field = decltype(item);
        using element = std::remove_all_extents_t<typename field::type>;
        std::cout << "  " << field::name() << ": " << count_of<typename field::type> << " x " << 8 * sizeof(element)
                  << (std::is_signed_v<element> ? " bits, signed" : " bits");
        if (field::attributes::since != 0) std::cout << ", since version " << field::attributes::since;
        if (field::attributes::when_t::present) std::cout << ", where its predicate says so";
        std::cout << '\n';
    });
    std::cout << "the first that a predicate decides on: " << (*conditional).name() << '\n';
}
