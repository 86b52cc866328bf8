// SPDX-License-Identifier: BSL-1.0
//
// A 16550 serial port, by National Semiconductor's PC16550D: registers, both FIFOs, loopback. It sends at its line's
// speed, so that a machine that stops has characters on their way; they go along. Nobody is at the other end to send it
// anything. Depends on describe.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include <vmstate/describe.hpp>

namespace live {

/// Sixteen characters, the oldest first.
struct uart_fifo {
    std::uint8_t count = 0;
    std::array<std::uint8_t, 16> bytes{};

    bool is_empty() const { return count == 0; }
    bool is_full() const { return count == bytes.size(); }
    void push(std::uint8_t byte) { bytes[count++] = byte; }
    std::uint8_t pop() {
        const std::uint8_t first = bytes[0];
        std::move(bytes.begin() + 1, bytes.begin() + count, bytes.begin());
        --count;
        return first;
    }
};
inline constexpr auto vmstate_uart_fifo = vmstate::describe<uart_fifo>(
    {.name = "uart-fifo"},
    vmstate::field<&uart_fifo::count, vmstate::between<0, 16>>,
    vmstate::field<&uart_fifo::bytes, vmstate::length<&uart_fifo::count>>);
static_assert(vmstate::completeness_checked<vmstate_uart_fifo>);

struct uart {
    std::uint16_t divisor = 1; ///< of 115200 baud
    std::uint8_t ier = 0;
    std::uint8_t fcr = 0; ///< bit 0: FIFOs are on
    std::uint8_t lcr = 0;
    std::uint8_t mcr = 0;
    std::uint8_t lsr_errors = 0; ///< overrun, until LSR is read
    std::uint8_t scr = 0;
    uart_fifo received;
    uart_fifo to_send; ///< its first character is in the shift register
    std::uint64_t sent_at = 0; ///< when that one has left: microseconds of the guest's time

    std::uint8_t load(std::uint32_t offset) {
        switch (offset) {
        case 0:
            if (is_divisor_selected()) return static_cast<std::uint8_t>(divisor);
            return received.is_empty() ? std::uint8_t{0} : received.pop();
        case 1: return is_divisor_selected() ? static_cast<std::uint8_t>(divisor >> 8) : ier;
        case 2: return iir();
        case 3: return lcr;
        case 4: return mcr;
        case 5: {
            const std::uint8_t value = lsr();
            lsr_errors = 0;
            return value;
        }
        case 6: return msr();
        default: return scr;
        }
    }
    /// `now` in microseconds of the guest's time.
    void store(std::uint32_t offset, std::uint8_t value, std::uint64_t now) {
        switch (offset) {
        case 0:
            if (is_divisor_selected()) divisor = static_cast<std::uint16_t>((divisor & 0xff00) | value);
            else transmit(value, now);
            break;
        case 1:
            if (is_divisor_selected()) divisor = static_cast<std::uint16_t>((divisor & 0xff) | value << 8);
            else ier = value & 0x0f;
            break;
        case 2:
            // Switched on or off, both are emptied.
            if ((value & 2) != 0 || ((value ^ fcr) & 1) != 0) received = {};
            if ((value & 4) != 0 || ((value ^ fcr) & 1) != 0) to_send = {};
            fcr = value & 0xc9;
            break;
        case 3: lcr = value; break;
        case 4: mcr = value & 0x1f; break;
        case 7: scr = value; break;
        default: break;
        }
    }
    /// The level of its interrupt line, which OUT2 lets through, as in a PC.
    bool interrupts() const { return (mcr & 0x18) == 0x08 && (iir() & 0x01) == 0; }
    /// Gives `send` the characters that have left by `now`.
    template <class Send>
    void advance(std::uint64_t now, Send send) {
        while (!to_send.is_empty() && sent_at <= now) {
            send(to_send.pop());
            sent_at += character_time();
        }
    }

private:
    static constexpr std::uint8_t overrun = 0x02;

    bool is_divisor_selected() const { return (lcr & 0x80) != 0; }
    bool has_fifos() const { return (fcr & 1) != 0; }
    /// Ten bits, in microseconds.
    std::uint64_t character_time() const { return std::max<std::uint64_t>(10'000'000ull * divisor / 115'200, 1); }

    void transmit(std::uint8_t value, std::uint64_t now) {
        if ((mcr & 0x10) != 0) {
            receive(value);
            return;
        }
        if (to_send.is_empty()) sent_at = now + character_time();
        // A full one loses what is written to it.
        if (has_fifos() ? !to_send.is_full() : to_send.count < 2) to_send.push(value);
    }
    void receive(std::uint8_t value) {
        if (has_fifos() ? received.is_full() : !received.is_empty()) lsr_errors |= overrun;
        else received.push(value);
    }
    /// THRE: the FIFO is empty, apart from the shift register without FIFOs; TEMT: that is, too.
    std::uint8_t lsr() const {
        const bool is_ready = has_fifos() ? to_send.is_empty() : to_send.count < 2;
        return static_cast<std::uint8_t>(
            lsr_errors | (received.is_empty() ? 0 : 0x01) | (is_ready ? 0x20 : 0) | (to_send.is_empty() ? 0x40 : 0));
    }
    /// By priority: line status, received data, transmitter empty.
    std::uint8_t iir() const {
        const std::uint8_t fifos = has_fifos() ? 0xc0 : 0;
        std::uint8_t cause = 0x01;
        if ((ier & 4) != 0 && lsr_errors != 0) cause = 0x06;
        else if ((ier & 1) != 0 && !received.is_empty()) cause = 0x04;
        else if ((ier & 2) != 0 && (lsr() & 0x20) != 0) cause = 0x02;
        return cause | fifos;
    }
    /// The other side is always there; in loopback it is this one.
    std::uint8_t msr() const {
        if ((mcr & 0x10) == 0) return 0xb0;
        return static_cast<std::uint8_t>((mcr & 0x0c) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5);
    }
};
inline constexpr auto vmstate_uart = vmstate::describe<uart>(
    {.name = "uart16550"},
    vmstate::field<&uart::divisor>,
    vmstate::field<&uart::ier>,
    vmstate::field<&uart::fcr>,
    vmstate::field<&uart::lcr>,
    vmstate::field<&uart::mcr>,
    vmstate::field<&uart::lsr_errors>,
    vmstate::field<&uart::scr>,
    vmstate::field<&uart::received, vmstate::as<vmstate_uart_fifo>>,
    vmstate::field<&uart::to_send, vmstate::as<vmstate_uart_fifo>>,
    vmstate::field<&uart::sent_at>);
static_assert(vmstate::completeness_checked<vmstate_uart>);

} // namespace live
