// SPDX-License-Identifier: BSL-1.0
//
// The processor: a RISC-V hart, RV32IM, by The RISC-V Instruction Set Manual, volume I. It has no interrupts and no
// privilege levels: what can't be executed stops it. Depends on describe.hpp.
#pragma once

#include <array>
#include <cstdint>

#include <vmstate/describe.hpp>

namespace live {

/// Why it stands still for good.
enum class halt : std::uint32_t { none, ebreak, illegal_instruction, bad_access };

/// What a hart remembers; all of it goes along.
struct hart_state {
    std::array<std::uint32_t, 32> x{}; ///< x[0] stays 0
    std::uint32_t pc = 0;
    halt halted = halt::none;
    std::uint32_t halted_by = 0; ///< the instruction, or the address of the access
};
inline constexpr auto vmstate_hart = vmstate::describe<hart_state>(
    {.name = "riscv-hart"},
    vmstate::field<&hart_state::x, vmstate::slice<1, 31>>,
    vmstate::field<&hart_state::pc>,
    vmstate::field<&hart_state::halted>,
    vmstate::field<&hart_state::halted_by>);
static_assert(vmstate::completeness_checked<vmstate_hart>);

enum class run_end {
    slice,  ///< as many instructions as were asked for
    wait,   ///< at a WFI, and there is nothing yet that ends it; it is executed again in the next slice
    halted, ///< see `halt`
};

namespace detail {

/// Instruction fields; immediates are sign-extended.
struct instruction {
    std::uint32_t bits;

    constexpr std::uint32_t opcode() const { return bits & 0x7f; }
    constexpr std::uint32_t rd() const { return bits >> 7 & 31; }
    constexpr std::uint32_t funct3() const { return bits >> 12 & 7; }
    constexpr std::uint32_t rs1() const { return bits >> 15 & 31; }
    constexpr std::uint32_t rs2() const { return bits >> 20 & 31; }
    constexpr std::uint32_t funct7() const { return bits >> 25; }
    constexpr std::uint32_t i() const { return arithmetic_shift(bits, 20); }
    constexpr std::uint32_t s() const { return (arithmetic_shift(bits, 20) & ~31u) | rd(); }
    constexpr std::uint32_t b() const {
        return (arithmetic_shift(bits, 19) & ~0xfffu) | (bits << 4 & 0x800) | (bits >> 20 & 0x7e0) | (bits >> 7 & 0x1e);
    }
    constexpr std::uint32_t u() const { return bits & ~0xfffu; }
    constexpr std::uint32_t j() const {
        return (arithmetic_shift(bits, 11) & ~0xfffffu) | (bits & 0xff000) | (bits >> 9 & 0x800) | (bits >> 20 & 0x7fe);
    }
    static constexpr std::uint32_t arithmetic_shift(std::uint32_t value, std::uint32_t by) {
        return static_cast<std::uint32_t>(static_cast<std::int32_t>(value) >> by);
    }
};

/// Division as the M extension defines it: nothing traps.
constexpr std::uint32_t divide(std::uint32_t a, std::uint32_t b) {
    if (b == 0) return ~0u;
    if (a == 0x80000000u && b == ~0u) return a;
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(a) / static_cast<std::int32_t>(b));
}
constexpr std::uint32_t remainder(std::uint32_t a, std::uint32_t b) {
    if (b == 0) return a;
    if (a == 0x80000000u && b == ~0u) return 0;
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(a) % static_cast<std::int32_t>(b));
}

} // namespace detail

/// Executes at most `count` instructions. The bus has, for 1, 2 or 4 bytes,
///   bool load(std::uint32_t address, std::uint32_t size, std::uint32_t& value);  // zero-extended
///   bool store(std::uint32_t address, std::uint32_t size, std::uint32_t value);
///   bool is_interrupt_pending();  // what ends a WFI
template <class Bus>
run_end run(hart_state& hart, Bus& bus, unsigned count) {
    if (hart.halted != halt::none) return run_end::halted;
    const auto stop = [&hart](halt why, std::uint32_t by) {
        hart.halted = why;
        hart.halted_by = by;
        return run_end::halted;
    };
    auto& x = hart.x;
    for (; count != 0; --count) {
        detail::instruction at{};
        if (!bus.load(hart.pc, 4, at.bits)) return stop(halt::bad_access, hart.pc);
        const std::uint32_t a = x[at.rs1()];
        const std::uint32_t b = x[at.rs2()];
        std::uint32_t next = hart.pc + 4;
        std::uint32_t result = 0;
        bool has_result = true;
        switch (at.opcode()) {
        case 0x37: result = at.u(); break;           // LUI
        case 0x17: result = hart.pc + at.u(); break; // AUIPC
        case 0x6f:                                   // JAL
            result = next;
            next = hart.pc + at.j();
            break;
        case 0x67: // JALR
            if (at.funct3() != 0) return stop(halt::illegal_instruction, at.bits);
            result = next;
            next = (a + at.i()) & ~1u;
            break;
        case 0x63: { // BEQ, BNE, BLT, BGE, BLTU, BGEU
            bool taken = false;
            switch (at.funct3() >> 1) {
            case 0: taken = a == b; break;
            case 2: taken = static_cast<std::int32_t>(a) < static_cast<std::int32_t>(b); break;
            case 3: taken = a < b; break;
            default: return stop(halt::illegal_instruction, at.bits);
            }
            if (taken != ((at.funct3() & 1) != 0)) next = hart.pc + at.b();
            has_result = false;
            break;
        }
        case 0x03: { // LB, LH, LW, LBU, LHU
            if (at.funct3() == 3 || at.funct3() > 5) return stop(halt::illegal_instruction, at.bits);
            const std::uint32_t size = 1u << (at.funct3() & 3);
            if (!bus.load(a + at.i(), size, result)) return stop(halt::bad_access, a + at.i());
            const std::uint32_t unused = 32 - 8 * size;
            if ((at.funct3() & 4) == 0) result = detail::instruction::arithmetic_shift(result << unused, unused);
            break;
        }
        case 0x23: // SB, SH, SW
            if (at.funct3() > 2) return stop(halt::illegal_instruction, at.bits);
            if (!bus.store(a + at.s(), 1u << at.funct3(), b)) return stop(halt::bad_access, a + at.s());
            has_result = false;
            break;
        case 0x13:   // with an immediate
        case 0x33: { // with a register
            const bool is_register = at.opcode() == 0x33;
            const std::uint32_t c = is_register ? b : at.i();
            if (is_register && at.funct7() == 1) {
                const auto wide = [](std::uint32_t value) { return std::int64_t{static_cast<std::int32_t>(value)}; };
                switch (at.funct3()) {
                case 0: result = a * b; break;
                case 1: result = static_cast<std::uint32_t>(wide(a) * wide(b) >> 32); break;
                case 2: result = static_cast<std::uint32_t>(wide(a) * std::int64_t{b} >> 32); break;
                case 3: result = static_cast<std::uint32_t>(std::uint64_t{a} * b >> 32); break;
                case 4: result = detail::divide(a, b); break;
                case 5: result = b == 0 ? ~0u : a / b; break;
                case 6: result = detail::remainder(a, b); break;
                case 7: result = b == 0 ? a : a % b; break;
                }
                break;
            }
            // SUB, SRA and SRAI have 0x20 there; the other immediates have no funct7.
            const bool is_shift = at.funct3() == 1 || at.funct3() == 5;
            const bool is_other = (is_register || is_shift) && at.funct7() == 0x20;
            const bool may_be_other = at.funct3() == 5 || (is_register && at.funct3() == 0);
            if ((is_register || is_shift) && at.funct7() != 0 && !(is_other && may_be_other))
                return stop(halt::illegal_instruction, at.bits);
            switch (at.funct3()) {
            case 0: result = is_other ? a - c : a + c; break;
            case 1: result = a << (c & 31); break;
            case 2: result = static_cast<std::int32_t>(a) < static_cast<std::int32_t>(c) ? 1 : 0; break;
            case 3: result = a < c ? 1 : 0; break;
            case 4: result = a ^ c; break;
            case 5: result = is_other ? detail::instruction::arithmetic_shift(a, c & 31) : a >> (c & 31); break;
            case 6: result = a | c; break;
            case 7: result = a & c; break;
            }
            break;
        }
        case 0x0f: has_result = false; break; // FENCE: one hart, and every access in order
        case 0x73:
            if (at.bits == 0x10500073) { // WFI
                if (!bus.is_interrupt_pending()) return run_end::wait;
                has_result = false;
                break;
            }
            if (at.bits == 0x00100073) return stop(halt::ebreak, at.bits);
            return stop(halt::illegal_instruction, at.bits);
        default: return stop(halt::illegal_instruction, at.bits);
        }
        if (has_result && at.rd() != 0) x[at.rd()] = result;
        hart.pc = next;
    }
    return run_end::slice;
}

} // namespace live
