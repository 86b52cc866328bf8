// SPDX-License-Identifier: BSL-1.0
// The example's device descriptions against what QEMU 7.2's streams and their JSON descriptions say: sizes, names and
// types of fields, subsections, and bodies that a real QEMU wrote.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "vocabulary_support.hpp"

#include "../../examples/pc_devices/pc_devices.hpp"

using namespace pc_devices;
using vmstate::schema_of;
using namespace vmstate::tests;

namespace {

std::string zeros(std::size_t count) { return std::string(2 * count, '0'); }

/// Loads a body that a QEMU wrote, and expects the same bytes back.
template <const auto& Description, class State>
void check_round_trip(State& state, const std::string& body) {
    REQUIRE(outcome(loaded<Description>(body, state)) == "ok");
    CHECK(saved<Description>(state) == hex(body));
}

template <const auto& Description, class State>
vmstate::error error_of_loading(State& state, const std::string& body) {
    const auto result = loaded<Description>(body, state);
    REQUIRE(!result.has_value());
    return result.error();
}

/// Bytes of the fields that a version has; `lengths` elements where a length decides.
constexpr std::size_t body_size(const vmstate::schema& body, int version, std::size_t lengths = 0) {
    std::size_t size = 0;
    for (const vmstate::schema_field& field : body.fields) {
        if (field.since > version) {
            continue;
        }
        const std::size_t element =
            field.has_nested ? body_size(*field.nested, field.nested_version) : field.size;
        size += element * (field.repeat == vmstate::repetition::by_length ? lengths : field.count);
    }
    return size;
}

/// Whether the fields are these, each as "name type" in the words of QEMU's JSON description.
constexpr bool lists(const vmstate::schema& body, std::initializer_list<std::string_view> entries) {
    if (body.fields.size() != entries.size()) {
        return false;
    }
    return std::equal(body.fields.begin(), body.fields.end(), entries.begin(),
        [](const vmstate::schema_field& field, std::string_view entry) {
            const std::size_t space = entry.find(' ');
            return entry.substr(0, space) == field.name && entry.substr(space + 1) == field.type;
        });
}

constexpr bool has_subsections(const vmstate::schema& body, std::initializer_list<std::string_view> names) {
    return std::equal(body.subsections.begin(), body.subsections.end(), names.begin(), names.end(),
        [](const vmstate::schema* one, std::string_view name) { return one->name == name; });
}

constexpr bool has_versions(const vmstate::schema& body, std::string_view name, int version, int minimum) {
    return body.name == name && body.version_id == version && body.minimum_version_id == minimum;
}

// ---- what is known before the program runs -------------------------------------------------------------------

static_assert(has_versions(schema_of<vmstate_timers>(), "timer", 2, 1));
static_assert(body_size(schema_of<vmstate_timers>(), 2) == 24 && body_size(schema_of<vmstate_timers>(), 1) == 16);
static_assert(lists(schema_of<vmstate_timers>(),
    {"cpu_ticks_offset int64", "unused unused_buffer", "cpu_clock_offset int64"}));
static_assert(has_subsections(schema_of<vmstate_timers>(), {"timer/icount"}));
static_assert(has_subsections(schema_of<icount_vmstate_timers>(),
    {"timer/icount/warp_timer", "timer/icount/timers", "timer/icount/shift"}));
static_assert(lists(schema_of<icount_vmstate_warp_timer>(), {"vm_clock_warp_start int64", "icount_warp_timer timer"}));
static_assert(lists(schema_of<icount_vmstate_shift>(), {"icount_time_shift int16", "last_delta int64"}));
static_assert(schema_of<icount_vmstate_shift>().version_id == 2);

static_assert(has_versions(schema_of<vmstate_cpu_common>(), "cpu_common", 1, 1));
static_assert(body_size(schema_of<vmstate_cpu_common>(), 1) == 8);
static_assert(has_subsections(schema_of<vmstate_cpu_common>(),
    {"cpu_common/exception_index", "cpu_common/crash_occurred"}));
static_assert(lists(schema_of<vmstate_cpu_common_exception_index>(), {"exception_index int32"}));
static_assert(lists(schema_of<vmstate_cpu_common_crash_occurred>(), {"crash_occurred bool"}));

static_assert(has_versions(schema_of<vmstate_vapic>(), "kvm-tpr-opt", 1, 1));
static_assert(body_size(schema_of<vmstate_vapic>(), 1) == 144);
static_assert(body_size(schema_of<vmstate_guest_rom>(), 1) == 124);
static_assert(body_size(schema_of<vmstate_handlers>(), 1) == 44);
static_assert(lists(schema_of<vmstate_vapic>(), {"rom_state struct", "state uint32", "real_tpr_addr uint32",
    "rom_state_vaddr uint32", "vapic_paddr uint32", "rom_state_paddr uint32"}));

static_assert(has_versions(schema_of<vmstate_i8257>(), "dma", 1, 1));
static_assert(body_size(schema_of<vmstate_i8257>(), 1) == 75 && body_size(schema_of<vmstate_i8257_regs>(), 1) == 17);
static_assert(lists(schema_of<vmstate_i8257>(),
    {"command uint8", "mask uint8", "flip_flop uint8", "dshift int32", "regs struct"}));
static_assert(lists(schema_of<vmstate_i8257_regs>(),
    {"now int32", "base uint16", "mode uint8", "page uint8", "pageh uint8", "dack uint8", "eop uint8"}));

static_assert(has_versions(schema_of<vmstate_pic_common>(), "i8259", 1, 1));
static_assert(body_size(schema_of<vmstate_pic_common>(), 1) == 16);

static_assert(has_versions(schema_of<vmstate_ioapic_common>(), "ioapic", 3, 1));
static_assert(body_size(schema_of<vmstate_ioapic_common>(), 3) == 206);
static_assert(body_size(schema_of<vmstate_ioapic_common>(), 1) == 194);
static_assert(lists(schema_of<vmstate_ioapic_common>(),
    {"id uint8", "ioregsel uint8", "unused unused_buffer", "irr uint32", "ioredtbl uint64"}));

static_assert(schema_of<vmstate_hpet>().version_id == 2 && vmstate_hpet.oldest_version_id() == 1);
static_assert(body_size(schema_of<vmstate_hpet>(), 2, 3) == 151 && body_size(schema_of<vmstate_hpet_v1>(), 1) == 150);
static_assert(body_size(schema_of<vmstate_hpet_timer>(), 1) == 42);
static_assert(lists(schema_of<vmstate_hpet_timer>(), {"tn uint8", "config uint64", "cmp uint64", "fsb uint64",
    "period uint64", "wrap_flag uint8", "qemu_timer timer"}));
static_assert(has_subsections(schema_of<vmstate_hpet>(), {"hpet/rtc_irq_level", "hpet/offset"}));

static_assert(has_versions(schema_of<vmstate_rtc>(), "mc146818rtc", 3, 1));
static_assert(body_size(schema_of<vmstate_rtc>(), 3) == 245 && body_size(schema_of<vmstate_rtc>(), 2) == 205 &&
              body_size(schema_of<vmstate_rtc>(), 1) == 197);
static_assert(lists(schema_of<vmstate_rtc>(),
    {"cmos_data buffer", "cmos_index uint8", "unused unused_buffer", "periodic_timer timer", "next_periodic_time int64",
        "unused unused_buffer", "irq_coalesced uint32", "period uint32", "base_rtc uint64", "last_update uint64",
        "offset int64", "update_timer timer", "next_alarm_time uint64"}));
static_assert(has_subsections(schema_of<vmstate_rtc>(), {"mc146818rtc/irq_reinject_on_ack_count"}));

static_assert(has_versions(schema_of<vmstate_pit_common>(), "i8254", 3, 2));
static_assert(body_size(schema_of<vmstate_pit_common>(), 3) == 108 &&
              body_size(schema_of<vmstate_pit_common>(), 2) == 104);
static_assert(has_versions(schema_of<vmstate_pit_channel>(), "pit channel", 2, 2));
static_assert(lists(schema_of<vmstate_pit_channel>(),
    {"count int32", "latched_count uint16", "count_latched uint8", "status_latched uint8", "status uint8",
        "read_state uint8", "write_state uint8", "write_latch uint8", "rw_mode uint8", "mode uint8", "bcd uint8",
        "gate uint8", "count_load_time int64", "next_transition_time int64"}));

static_assert(has_versions(schema_of<vmstate_spk>(), "pcspk", 1, 1) && body_size(schema_of<vmstate_spk>(), 1) == 2);
static_assert(has_versions(schema_of<vmstate_port92_isa>(), "port92", 1, 1));
static_assert(body_size(schema_of<vmstate_port92_isa>(), 1) == 1);

static_assert(has_versions(schema_of<vmstate_ps2_keyboard>(), "ps2kbd", 3, 2));
static_assert(body_size(schema_of<vmstate_ps2_keyboard>(), 3) == 284 &&
              body_size(schema_of<vmstate_ps2_keyboard>(), 2) == 280);
static_assert(has_versions(schema_of<vmstate_ps2_common>(), "PS2 Common State", 3, 2));
static_assert(body_size(schema_of<vmstate_ps2_common>(), 3) == 272);
static_assert(has_subsections(schema_of<vmstate_ps2_keyboard>(),
    {"ps2kbd/ledstate", "ps2kbd/need_high_bit", "ps2kbd/command_reply_queue"}));
static_assert(has_versions(schema_of<vmstate_ps2_mouse>(), "ps2mouse", 2, 2));
static_assert(body_size(schema_of<vmstate_ps2_mouse>(), 2) == 291);
static_assert(lists(schema_of<vmstate_ps2_mouse>(),
    {"parent_obj struct", "mouse_status uint8", "mouse_resolution uint8", "mouse_sample_rate uint8", "mouse_wrap uint8",
        "mouse_type uint8", "mouse_detect_state uint8", "mouse_dx int32", "mouse_dy int32", "mouse_dz int32",
        "mouse_buttons uint8"}));

static_assert(has_versions(schema_of<vmstate_kbd_isa>(), "pckbd", 3, 3));
static_assert(has_versions(schema_of<vmstate_kbd>(), "pckbd", 3, 3));
static_assert(lists(schema_of<vmstate_kbd_isa>(), {"kbd struct"}));
static_assert(body_size(schema_of<vmstate_kbd>(), 3) == 4);
static_assert(has_subsections(schema_of<vmstate_kbd>(), {"pckbd_outport", "pckbd/extended_state"}));
static_assert(body_size(schema_of<vmstate_kbd_outport>(), 1) == 1);
static_assert(body_size(schema_of<vmstate_kbd_extended_state>(), 0) == 10);
static_assert(schema_of<vmstate_kbd_extended_state>().version_id == 0);

static_assert(has_versions(schema_of<vmstate_vmmouse>(), "vmmouse", 0, 0));
static_assert(body_size(schema_of<vmstate_vmmouse>(), 0) == 4105);
static_assert(lists(schema_of<vmstate_vmmouse>(),
    {"queue_size int32 equal", "queue uint32", "nb_queue uint16", "status uint16", "absolute uint8"}));

static_assert(has_versions(schema_of<vmstate_globalstate>(), "globalstate", 1, 1));
static_assert(body_size(schema_of<vmstate_globalstate>(), 1) == 104);
static_assert(lists(schema_of<vmstate_globalstate>(), {"size uint32", "runstate buffer"}));

static_assert(vmstate::completeness_checked<vmstate_kbd> && vmstate::completeness_checked<vmstate_kbd_isa> &&
              vmstate::completeness_checked<vmstate_ps2_keyboard> && vmstate::completeness_checked<vmstate_ps2_mouse> &&
              vmstate::completeness_checked<vmstate_pic_common> && vmstate::completeness_checked<vmstate_pit_common> &&
              vmstate::completeness_checked<vmstate_rtc> && vmstate::completeness_checked<vmstate_port92_isa> &&
              vmstate::completeness_checked<vmstate_i8257> && vmstate::completeness_checked<vmstate_vmmouse> &&
              vmstate::completeness_checked<vmstate_vapic> && vmstate::completeness_checked<vmstate_ioapic_common> &&
              vmstate::completeness_checked<vmstate_hpet> && vmstate::completeness_checked<vmstate_timers> &&
              vmstate::completeness_checked<vmstate_cpu_common>);

// ---- bodies that QEMU 7.2.22 wrote ---------------------------------------------------------------------------

const std::string kbd_extended = "0514" "'pckbd/extended_state'" "00000000";

} // namespace

TEST_CASE("the keyboard controller's sections are QEMU's in every state of its subsections") {
    ISAKBDState s;
    SECTION("after reset") {
        check_round_trip<vmstate_kbd_isa>(s, "00180300" + kbd_extended + "00000000000000000000");
        CHECK(s.kbd.outport == 0xcf);
    }
    SECTION("A20 switched off through the output port") {
        check_round_trip<vmstate_kbd_isa>(
            s, "00180300" "050d 'pckbd_outport' 00000001 dd" + kbd_extended + "00000000000000000000");
        CHECK(s.kbd.outport == 0xdd);
    }
    SECTION("and a byte of the controller's own waiting") {
        check_round_trip<vmstate_kbd_isa>(
            s, "00190304" "050d 'pckbd_outport' 00000001 dd" + kbd_extended + "00000000" "00000004" "0003");
        CHECK(s.kbd.outport == 0xdd);
        CHECK(s.kbd.pending == kbd::pending_ctrl_kbd);
        CHECK(s.kbd.cbdata == 0x03);
    }
    SECTION("of a machine type without the extended state") {
        s.kbd.extended_state = false;
        check_round_trip<vmstate_kbd_isa>(s, "001c6100");
    }
}

TEST_CASE("a keyboard controller without extended state says what is pending the old way") {
    ISAKBDState s;
    s.kbd.extended_state = false;
    check_round_trip<vmstate_kbd_isa>(s, "003d4703");
    CHECK(s.kbd.pending == (kbd::pending_kbd | kbd::pending_aux));
    CHECK(s.kbd.obsrc == kbd::obsrc_mouse);
    CHECK(s.kbd.outport == 0xff);
}

TEST_CASE("a running throttle timer of the keyboard controller stays running") {
    ISAKBDState s;
    check_round_trip<vmstate_kbd_isa>(s, "00180300" + kbd_extended + "00000001" "00000001" "1c00");
    CHECK(s.kbd.throttle_timer_pending);
}

TEST_CASE("the keyboard controller's output port is refused in another version, and when cut short") {
    ISAKBDState s;
    CHECK(error_of_loading<vmstate_kbd_isa>(s, "00180300" "050d 'pckbd_outport' 00000002 dd").code() ==
          vmstate::errc::version_too_new);
    CHECK(error_of_loading<vmstate_kbd_isa>(s, "00180300" "050d 'pckbd_outport' 00000001").code() ==
          vmstate::errc::truncated);
}

TEST_CASE("the keyboard's sections are QEMU's with lit lamps and a reply ahead of the queue") {
    PS2KbdState s;
    const std::string queue_with_reply = zeros(253) + "faab83";
    check_round_trip<vmstate_ps2_keyboard>(s,
        "ffffffff" "000000fd" "00000000" "00000003" + queue_with_reply + "00000001" "00000000" "00000002"
        "050f" "'ps2kbd/ledstate'" "00000003" "00000007"
        "051a" "'ps2kbd/command_reply_queue'" "00000000" "00000000");
    CHECK(s.ledstate == 7);
    CHECK(s.cwptr == 0);
    CHECK(s.parent_obj.count == 3);

    // The next load without these subsections finds their defaults.
    check_round_trip<vmstate_ps2_keyboard>(
        s, "ffffffff" "00000000" "00000000" "00000000" + zeros(256) + "00000001" "00000000" "00000002");
    CHECK(s.ledstate == 0);
    CHECK(s.cwptr == -1);

    s.need_high_bit = true;
    CHECK(saved<vmstate_ps2_keyboard>(s).substr(2 * 284) == hex("0514 'ps2kbd/need_high_bit' 00000001 01"));
}

TEST_CASE("an impossible PS/2 queue is made a possible one") {
    PS2MouseState s;
    const std::string queue = "7fffffff" "80000000" "7fffffff" + zeros(256);
    REQUIRE(outcome(loaded<vmstate_ps2_mouse>("ffffffff" + queue + zeros(19), s)) == "ok");
    CHECK(s.parent_obj.rptr == 255);
    CHECK(s.parent_obj.count == ps2_queue_size);
    CHECK(s.parent_obj.wptr == 15);
}

TEST_CASE("a keyboard of version 2 has scan code set 2") {
    PS2KbdState s;
    s.scancode_set = 1;
    const std::string body = "ffffffff" + zeros(12 + 256) + "00000001" "00000000";
    REQUIRE(outcome(loaded<vmstate_ps2_keyboard>(body, s, 2)) == "ok");
    CHECK(s.scancode_set == 2);
    CHECK(s.scan_enabled == 1);
}

TEST_CASE("the interval timer's section is QEMU's, and its second copy of the next transition counts") {
    PITCommonState s;
    const std::string channels = "00002e9c2e9c03000003039c030200010000000000000000" "0000000000989a5c"
                                 "000100000000000000000000000300010000000000000000" "0000000000000000"
                                 "000100000000000000000000000300010000000000000000" "0000000000000000";
    check_round_trip<vmstate_pit_common>(s, "00000000" + channels + "0000000000989a5c");
    CHECK(s.channels[0].count == 0x2e9c);
    CHECK(s.channels[0].next_transition_time == 0x989a5c);
    CHECK(s.channels[2].gate == 1);

    REQUIRE(outcome(loaded<vmstate_pit_common>("00000001" + channels + "ffffffffffffffff", s)) == "ok");
    CHECK(s.channels[0].next_transition_time == -1);
    CHECK(s.irq_disabled == 1);
    s.channels[0].next_transition_time = 7;
    CHECK(saved<vmstate_pit_common>(s).substr(2 * 100) == "0000000000000007");

    REQUIRE(outcome(loaded<vmstate_pit_common>(channels + "0000000000989a5c", s, 2)) == "ok");
    CHECK(s.channels[0].next_transition_time == 0x989a5c);
}

TEST_CASE("the clock's section is QEMU's, and older versions get what they lack from the CMOS memory") {
    // From a stopped machine, 2026-11-21 23:05:32 in BCD.
    const std::string cmos = "3200050023000721112626021080" + zeros(6) + "068002003c" + zeros(24) + "3c20" + zeros(5) +
                             "30" + zeros(4) + "12" + zeros(66);
    RTCState s;
    const std::string body = cmos + "0f" + zeros(28) + "ffffffffffffffff" + zeros(8) + zeros(24);
    SECTION("version 3") {
        check_round_trip<vmstate_rtc>(s, body + zeros(8) + "000000006b0223b9" "18ea31f4d7243ac8" + zeros(8) +
                                             "18ea34ee6def40c8" "18ea34ee6def40c8");
        CHECK(s.base_rtc == 0x6b0223b9);
        CHECK(s.update_timer == 0x18ea34ee6def40c8);
        CHECK(s.periodic_timer == -1);
    }
    SECTION("ticks that could not be delivered") {
        check_round_trip<vmstate_rtc>(s, body + "0000000300000020" + zeros(40) +
                                             "0525 'mc146818rtc/irq_reinject_on_ack_count'"
                                             "00000001" "0005");
        CHECK(s.irq_reinject_on_ack_count == 5);
        CHECK(s.irq_coalesced == 3);
    }
    SECTION("version 2 knows the period but not the time") {
        REQUIRE(outcome(loaded<vmstate_rtc>(body + "0000000000000020", s, 2)) == "ok");
        CHECK(s.period == 0x20);
        CHECK(s.base_rtc == 1795302332);
    }
    SECTION("version 1 knows neither") {
        s.irq_coalesced = 9;
        REQUIRE(outcome(loaded<vmstate_rtc>(body, s, 1)) == "ok");
        CHECK(s.irq_coalesced == 0);
        CHECK(s.period == 0);
        CHECK(s.update_timer == -1);
    }
}

TEST_CASE("the CMOS memory's time is read in BCD and in binary, with 24 hours and with 12") {
    RTCState s;
    const auto set = [&s](std::uint8_t century, std::uint8_t year, std::uint8_t month, std::uint8_t day,
                         std::uint8_t hour, std::uint8_t minute, std::uint8_t second, std::uint8_t mode) {
        s.cmos_data[0x32] = century;
        s.cmos_data[9] = year;
        s.cmos_data[8] = month;
        s.cmos_data[7] = day;
        s.cmos_data[4] = hour;
        s.cmos_data[2] = minute;
        s.cmos_data[0] = second;
        s.cmos_data[11] = mode;
    };
    set(0x20, 0x26, 0x11, 0x21, 0x23, 0x05, 0x32, 0x02);
    CHECK(rtc_cmos_time(s) == 1795302332);
    set(20, 26, 11, 21, 23, 5, 32, 0x06);
    CHECK(rtc_cmos_time(s) == 1795302332);
    set(0x20, 0x26, 0x11, 0x21, 0x91, 0x05, 0x32, 0x00); // 11 in the evening
    CHECK(rtc_cmos_time(s) == 1795302332);
    set(0x20, 0x26, 0x11, 0x21, 0x92, 0x05, 0x32, 0x00); // 12 at noon
    CHECK(rtc_cmos_time(s) == 1795302332 - 11 * 3600);
    set(0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff); // no time, but no harm
    CHECK_NOTHROW(rtc_cmos_time(s));
}

TEST_CASE("the event timers' section is QEMU's with their subsections") {
    const auto timer = [](std::string_view tn) {
        return std::string(tn) + "0000000400000030" "ffffffffffffffff" + zeros(16) + "00" "ffffffffffffffff";
    };
    HPETState s;
    SECTION("in legacy mode, with the clock's line up") {
        check_round_trip<vmstate_hpet>(s,
            "0000000000000003" "0000000000000000" "0000000000000003" "03" + timer("00") + timer("01") + timer("02") +
                "0512" "'hpet/rtc_irq_level'" "00000001" "01"
                "050b" "'hpet/offset'" "00000001" "0000000000000000");
        CHECK(s.rtc_irq_level == 1);
        CHECK(s.timer[2].tn == 2);
        CHECK(s.timer[2].qemu_timer == -1);
    }
    SECTION("of a machine type that doesn't save the offset") {
        s.hpet_offset_saved = false;
        check_round_trip<vmstate_hpet>(s, "0000000000000001" "0000000000000000" "0000000000000003" "03" + timer("00") +
                                              timer("01") + timer("02"));
    }
    SECTION("with eight timers") {
        std::string body = "0000000000000000" "0000000000000000" "0000000000000000" "08";
        for (const char* tn : {"00", "01", "02", "03", "04", "05", "06", "07"}) {
            body += timer(tn);
        }
        check_round_trip<vmstate_hpet>(s, body);
        CHECK(s.num_timers == 8);
        CHECK((s.capability & hpet::id_num_tim_mask) == 7u << hpet::id_num_tim_shift);
    }
    SECTION("version 1, which always has three") {
        s.num_timers = 8;
        s.rtc_irq_level = 1;
        REQUIRE(outcome(loaded<vmstate_hpet>("0000000000000001" "0000000000000000" "0000000000000003" +
                                                           timer("00") + timer("01") + timer("02"), s, 1)) == "ok");
        CHECK(s.num_timers == 3);
        CHECK(s.rtc_irq_level == 0);
        CHECK(s.timer[2].tn == 2);
        CHECK((s.capability & hpet::id_num_tim_mask) == 2u << hpet::id_num_tim_shift);
    }
}

TEST_CASE("an impossible number of event timers is refused before they are read") {
    HPETState s;
    for (const char* number : {"00", "02", "21", "ff"}) {
        const vmstate::error error = error_of_loading<vmstate_hpet>(s, zeros(24) + number + zeros(255 * 42));
        INFO(number);
        CHECK(error.code() == vmstate::errc::validation_failed);
        CHECK_THAT(error.message(), contains("num_timers in range"));
    }
}

TEST_CASE("the I/O interrupt controller's old versions have no requests") {
    IOAPICCommonState s;
    const std::string table = zeros(23 * 8) + "0000000000010000";
    check_round_trip<vmstate_ioapic_common>(s, "0110" + zeros(8) + "00000005" + table);
    CHECK(s.irr == 5);
    CHECK(s.ioredtbl[23] == 0x10000);
    REQUIRE(outcome(loaded<vmstate_ioapic_common>("0210" + table, s, 1)) == "ok");
    CHECK(s.id == 2);
    CHECK(s.irr == 0);
}

TEST_CASE("the machine's clocks are QEMU's with every kind of instruction counting") {
    TimersState s;
    SECTION("none") {
        check_round_trip<vmstate_timers>(s, "00000000528c8504" "0000000000000000" "000000001fbfe393");
        CHECK(s.use_icount == icount_mode::off);
        CHECK(s.cpu_clock_offset == 0x1fbfe393);
    }
    SECTION("shift=7,sleep=off") {
        check_round_trip<vmstate_timers>(s, "0000000165b65f4a" "0000000000000000" "00000000b2db2d8e"
            "050c" "'timer/icount'" "00000001" "00000068f2f53971" "0000000000a3d215");
        CHECK(s.use_icount == icount_mode::fixed);
    }
    SECTION("shift=auto") {
        check_round_trip<vmstate_timers>(s, "0000000165b3e654" "0000000000000000" "00000000b2d9f148"
            "050c" "'timer/icount'" "00000001" "00000000a3095a27" "0000000000568fea"
            "0517" "'timer/icount/warp_timer'" "00000001" "00000000b06e8498" "00000000b3b307e7"
            "0513" "'timer/icount/timers'" "00000001" "00000000ee6b2800" "00000000b305faaf"
            "0512" "'timer/icount/shift'" "00000002" "0005" "fffffffffb086d05");
        CHECK(s.use_icount == icount_mode::adaptive);
        CHECK(s.icount_time_shift == 5);
        CHECK(s.last_delta == -83333883);
    }
}

TEST_CASE("a vCPU's exception and crash are sent where there is one") {
    CPUState s;
    check_round_trip<vmstate_cpu_common>(s, "0000000100000000");
    CHECK(s.halted == 1);
    check_round_trip<vmstate_cpu_common>(s, "0000000000000002"
        "051a" "'cpu_common/exception_index'" "00000001" "0000000e"
        "0519" "'cpu_common/crash_occurred'" "00000001" "01");
    CHECK(s.exception_index == 14);
    CHECK(s.crash_occurred);
    REQUIRE(outcome(loaded<vmstate_cpu_common>("0000000000000003", s)) == "ok");
    CHECK(s.interrupt_request == 2);
    CHECK(s.exception_index == -1);
    CHECK(!s.crash_occurred);
}

TEST_CASE("the option ROM of qemu-kvm, which had no standby, is on standby when it has an address") {
    VAPICROMState s;
    check_round_trip<vmstate_vapic>(s, zeros(124) + "00000002" + zeros(12) + "000c0020");
    CHECK(s.state == vapic_mode::standby);
    REQUIRE(outcome(loaded<vmstate_vapic>(zeros(124) + "00000000" + zeros(12) + "000c0020", s)) == "ok");
    CHECK(s.state == vapic_mode::standby);
    REQUIRE(outcome(loaded<vmstate_vapic>(zeros(144), s)) == "ok");
    CHECK(s.state == vapic_mode::inactive);
}

TEST_CASE("the DMA controller refuses a width that it hasn't got") {
    I8257State s;
    check_round_trip<vmstate_i8257>(s, "00ff0100000001" "0000001200000000" + zeros(60));
    CHECK(s.dshift == 1);
    CHECK(s.regs[0].now[0] == 0x12);
    CHECK(error_of_loading<vmstate_i8257>(s, "00ff0100000028" + zeros(68)).code() == vmstate::errc::out_of_range);
}

TEST_CASE("the VMware pointer refuses a queue of another size, and one that is fuller than full") {
    VMMouseState s;
    check_round_trip<vmstate_vmmouse>(s, "00000400" + zeros(4096) + "0400" "ffff" "01");
    CHECK(s.nb_queue == 1024);
    CHECK(error_of_loading<vmstate_vmmouse>(s, "00000401" + zeros(4096) + "0000ffff01").code() ==
          vmstate::errc::value_mismatch);
    CHECK(error_of_loading<vmstate_vmmouse>(s, "00000400" + zeros(4096) + "0401ffff01").code() ==
          vmstate::errc::out_of_range);
}

TEST_CASE("the run state is sent by name, and only a known one is accepted") {
    GlobalState s;
    check_round_trip<vmstate_globalstate>(s, "00000007" "'paused'" + zeros(94));
    CHECK(s.received);
    CHECK(s.state == run_state::paused);

    global_state_store(s, run_state::guest_panicked);
    CHECK(saved<vmstate_globalstate>(s) == hex("0000000f 'guest-panicked'" + zeros(86)));

    const vmstate::error unknown = error_of_loading<vmstate_globalstate>(s, "00000007" "'pausee'" + zeros(94));
    CHECK_THAT(unknown.message(), contains("pausee"));
    CHECK_THAT(unknown.message(), contains("globalstate"));
    CHECK(error_of_loading<vmstate_globalstate>(s, "00000065" + std::string(200, '6')).code() ==
          vmstate::errc::out_of_range);
}

TEST_CASE("old machine types leave out the speaker, and a run state that goes without saying") {
    pc_machine_devices devices;
    devices.apply_compat("pc-i440fx-7.2");
    CHECK(pcspk_migrate_needed(devices.pcspk));
    CHECK(devices.i8042.kbd.extended_state);
    CHECK(devices.hpet.hpet_offset_saved);

    devices.apply_compat("pc-i440fx-2.11");
    CHECK(!devices.i8042.kbd.extended_state);
    CHECK(!devices.hpet.hpet_offset_saved);
    CHECK(pcspk_migrate_needed(devices.pcspk));

    devices.apply_compat("pc-q35-2.3");
    CHECK(!pcspk_migrate_needed(devices.pcspk));
    global_state_store(devices.globalstate, run_state::paused);
    CHECK(!global_state_needed(devices.globalstate));
    global_state_store(devices.globalstate, run_state::shutdown);
    CHECK(global_state_needed(devices.globalstate));
}

TEST_CASE("machine types are told apart by their names") {
    CHECK(machine_kind_of("pc-i440fx-7.2") == machine_kind::pc);
    CHECK(machine_kind_of("pc-q35-7.2") == machine_kind::q35);
    CHECK(machine_kind_of("isapc") == machine_kind::isapc);
    CHECK(machine_kind_of("microvm") == machine_kind::microvm);
    CHECK(machine_kind_of("none") == machine_kind::none);
    CHECK(machine_version_of("pc-i440fx-7.2") == machine_version{7, 2});
    CHECK(machine_version_of("pc-q35-2.11") == machine_version{2, 11});
    CHECK(!machine_version_of("isapc"));
    CHECK(!machine_version_of("pc-i440fx-7."));
    CHECK(!machine_version_of(""));
}

TEST_CASE("each kind of machine has the devices of its streams, in their order") {
    const auto sections_of = [](machine_kind kind, std::size_t vcpus) {
        pc_machine_devices devices(kind, vcpus);
        std::string sections;
        devices.for_each_device([&]<const auto& description>(auto& device, const vmstate::device_options& options) {
            static_cast<void>(device);
            sections += options.id + '#' + std::to_string(options.instance_id) + ' ';
            CHECK(options.id == description.name);
        });
        return sections;
    };
    const std::string pc_tail = "i8259#0 i8259#1 ioapic#0 hpet#0 mc146818rtc#0 i8254#0 pcspk#0 ps2kbd#0 ps2mouse#0 "
                                "pckbd#0 vmmouse#0 port92#0 globalstate#0 ";
    CHECK(sections_of(machine_kind::pc, 1) == "timer#0 cpu_common#0 kvm-tpr-opt#0 dma#0 dma#1 " + pc_tail);
    CHECK(sections_of(machine_kind::q35, 2) == "timer#0 cpu_common#0 cpu_common#1 kvm-tpr-opt#0 dma#0 dma#1 " + pc_tail);
    CHECK(sections_of(machine_kind::isapc, 1) ==
          "timer#0 cpu_common#0 dma#0 dma#1 i8259#0 i8259#1 mc146818rtc#0 i8254#0 pcspk#0 ps2kbd#0 ps2mouse#0 pckbd#0 "
          "vmmouse#0 port92#0 globalstate#0 ");
    CHECK(sections_of(machine_kind::microvm, 1) == "timer#0 cpu_common#0 kvm-tpr-opt#0 ioapic#0 ioapic#1 i8259#0 "
                                                   "i8259#1 i8254#0 mc146818rtc#0 globalstate#0 ");
    CHECK(sections_of(machine_kind::none, 1) == "timer#0 globalstate#0 ");
}

TEST_CASE("a run state that nobody has stored is saved by the name of the one that there is") {
    GlobalState fresh;
    fresh.state = run_state::paused;
    const std::string body = saved<vmstate_globalstate>(fresh);
    GlobalState again;
    REQUIRE(outcome(loaded<vmstate_globalstate>(body, again)) == "ok");
    CHECK(again.state == run_state::paused);
    CHECK(again.size == 7); // with its NUL
    // One that was stored goes first.
    global_state_store(fresh, run_state::running);
    REQUIRE(outcome(loaded<vmstate_globalstate>(saved<vmstate_globalstate>(fresh), again)) == "ok");
    CHECK(again.state == run_state::running);
}

TEST_CASE("a machine of these devices is saved, and loaded by another one") {
    for (const machine_kind kind :
        {machine_kind::pc, machine_kind::q35, machine_kind::isapc, machine_kind::microvm, machine_kind::none}) {
        pc_machine_devices there(kind, 2);
        global_state_store(there.globalstate, run_state::running);
        there.timers.cpu_clock_offset = 12345;
        there.pic[1].imr = 0xfe;
        there.ioapic[0].irr = 0x100;
        there.keyboard.ledstate = 2;
        there.i8042.kbd.outport = 0xdd;
        vmstate::machine source{{.name = "a machine"}};
        REQUIRE(outcome(there.register_with(source)) == "ok");
        vmstate::memory_output_channel stream;
        REQUIRE(outcome(vmstate::save(source, stream)) == "ok");

        pc_machine_devices here(kind, 2);
        vmstate::machine destination{{.name = "a machine"}};
        REQUIRE(outcome(here.register_with(destination)) == "ok");
        vmstate::memory_input_channel same_stream(stream.written());
        REQUIRE(outcome(vmstate::load(destination, same_stream)) == "ok");
        CHECK(here.globalstate.state == run_state::running);
        CHECK(here.timers.cpu_clock_offset == 12345);
        CHECK((here.pic[1].imr == 0xfe) == (kind != machine_kind::none));
        CHECK((here.i8042.kbd.outport == 0xdd) == (kind != machine_kind::none && kind != machine_kind::microvm));

        pc_machine_devices less(kind, 2);
        vmstate::machine refusing{{.name = "a machine"}};
        REQUIRE(outcome(less.register_with(refusing, [](std::string_view id, std::uint32_t) { return id != "timer"; })) ==
                "ok");
        vmstate::memory_input_channel again(stream.written());
        const auto refused = vmstate::load(refusing, again);
        REQUIRE(!refused);
        CHECK(refused.error().code() == vmstate::errc::unknown_section);

        const auto twice = there.register_with(source);
        REQUIRE(!twice);
        CHECK(twice.error().code() == vmstate::errc::duplicate);
    }
}
