// SPDX-License-Identifier: BSL-1.0
// mc146818rtc: the real-time clock with its CMOS memory. Its table is in QEMU's hw/rtc/mc146818rtc.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace pc_devices {

namespace rtc {

// Places in the CMOS memory.
inline constexpr std::size_t seconds = 0;
inline constexpr std::size_t minutes = 2;
inline constexpr std::size_t hours = 4;
inline constexpr std::size_t day_of_month = 7;
inline constexpr std::size_t month = 8;
inline constexpr std::size_t year = 9;
inline constexpr std::size_t reg_a = 10;
inline constexpr std::size_t reg_b = 11;
inline constexpr std::size_t century = 0x32;

inline constexpr unsigned reg_b_pie = 0x40;    // periodic interrupt enabled
inline constexpr unsigned reg_b_binary = 0x04; // binary, not BCD
inline constexpr unsigned reg_b_24h = 0x02;

} // namespace rtc

struct RTCState {
    std::uint8_t cmos_data[128] = {};
    std::uint8_t cmos_index = 0;
    std::int32_t base_year = 0;
    std::uint64_t base_rtc = 0;       ///< seconds since 1970 at last_update
    std::uint64_t last_update = 0;    ///< rtc clock, ns
    std::int64_t offset = 0;          ///< ns
    std::int64_t periodic_timer = -1; ///< expiry, ns; -1: not pending
    std::int64_t next_periodic_time = 0;
    std::int64_t update_timer = -1; ///< expiry, ns; -1: not pending
    std::uint64_t next_alarm_time = 0;
    std::uint16_t irq_reinject_on_ack_count = 0;
    std::uint32_t irq_coalesced = 0;
    std::uint32_t period = 0; ///< of the periodic interrupt, in ticks of 32768 Hz; 0: off
};

/// A number as the clock's registers hold it; -1 if it is none, as an alarm's "don't care".
constexpr int rtc_from_bcd(const RTCState& s, unsigned value) {
    if ((value & 0xc0) == 0xc0) {
        return -1;
    }
    if ((s.cmos_data[rtc::reg_b] & rtc::reg_b_binary) != 0) {
        return static_cast<int>(value);
    }
    return static_cast<int>((value >> 4) * 10 + (value & 0x0f));
}

/// The time in the CMOS memory, in seconds since 1970.
constexpr std::uint64_t rtc_cmos_time(const RTCState& s) {
    const auto number = [&s](std::size_t at, unsigned mask = 0xff) {
        return rtc_from_bcd(s, s.cmos_data[at] & mask);
    };
    int hour = number(rtc::hours, 0x7f);
    if ((s.cmos_data[rtc::reg_b] & rtc::reg_b_24h) == 0) {
        hour = hour % 12 + ((s.cmos_data[rtc::hours] & 0x80) != 0 ? 12 : 0);
    }
    const int year = number(rtc::year) + s.base_year + number(rtc::century) * 100;
    // Any register may hold any number: months and days past the end carry over, as they do in C's mktime.
    const auto first_of_month =
        std::chrono::year{year} / std::chrono::January / 1 + std::chrono::months{number(rtc::month) - 1};
    const auto time = std::chrono::sys_days{first_of_month} +
                      std::chrono::days{number(rtc::day_of_month) - 1} + std::chrono::hours{hour} +
                      std::chrono::minutes{number(rtc::minutes)} + std::chrono::seconds{number(rtc::seconds)};
    return static_cast<std::uint64_t>(time.time_since_epoch().count());
}

/// The period that registers A and B ask for.
constexpr std::uint32_t rtc_periodic_clock_ticks(const RTCState& s) {
    const unsigned rate = s.cmos_data[rtc::reg_a] & 0x0fu;
    if ((s.cmos_data[rtc::reg_b] & rtc::reg_b_pie) == 0 || rate == 0) {
        return 0;
    }
    // The two fastest rates of the chip's other time base are those of codes 8 and 9 here.
    return 1u << ((rate <= 2 ? rate + 7 : rate) - 1);
}

inline bool rtc_irq_reinject_on_ack_count_needed(const RTCState& s) {
    return s.irq_reinject_on_ack_count != 0;
}

// What an old stream does not carry starts from here; QEMU relies on the reset before the load.
inline void rtc_pre_load(RTCState& s) {
    s.irq_reinject_on_ack_count = 0;
    s.irq_coalesced = 0;
    s.update_timer = -1;
    s.next_alarm_time = 0;
}

// QEMU also brings the CMOS time up to its clock before saving, and re-arms its timers after loading: work of
// a running clock, of which a state at rest knows nothing.
inline void rtc_post_load(RTCState& s, int version_id) {
    if (version_id <= 2) {
        s.base_rtc = rtc_cmos_time(s);
        s.last_update = 0; // "now" on a clock that has not run yet
        s.offset = 0;
    }
    if (version_id < 2) {
        s.period = rtc_periodic_clock_ticks(s);
    }
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_rtc_irq_reinject_on_ack_count = vmstate::describe<RTCState>(
    {.name = "mc146818rtc/irq_reinject_on_ack_count", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<rtc_irq_reinject_on_ack_count_needed>,
    vmstate::field<&RTCState::irq_reinject_on_ack_count>);

inline constexpr auto vmstate_rtc = vmstate::describe<RTCState>(
    {.name = "mc146818rtc", .version_id = 3, .minimum_version_id = 1},
    vmstate::pre_load<rtc_pre_load>,
    vmstate::post_load<rtc_post_load>,
    vmstate::field<&RTCState::cmos_data>,
    vmstate::field<&RTCState::cmos_index>,
    vmstate::unused<28>,
    vmstate::field<&RTCState::periodic_timer, vmstate::as_timer>,
    vmstate::field<&RTCState::next_periodic_time>,
    vmstate::unused<24>,
    vmstate::field<&RTCState::irq_coalesced, vmstate::since<2>>,
    vmstate::field<&RTCState::period, vmstate::since<2>>,
    vmstate::field<&RTCState::base_rtc, vmstate::since<3>>,
    vmstate::field<&RTCState::last_update, vmstate::since<3>>,
    vmstate::field<&RTCState::offset, vmstate::since<3>>,
    vmstate::field<&RTCState::update_timer, vmstate::as_timer, vmstate::since<3>>,
    vmstate::field<&RTCState::next_alarm_time, vmstate::since<3>>,
    vmstate::subsection<vmstate_rtc_irq_reinject_on_ack_count>,
    vmstate::transient<&RTCState::base_year>);
// clang-format on

} // namespace pc_devices
