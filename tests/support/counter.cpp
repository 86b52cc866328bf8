// SPDX-License-Identifier: BSL-1.0
#include "support/counter.hpp"

#include "support/qemu.hpp"

#include <charconv>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace vmstate::tests::counter {

namespace {

std::uint32_t dword(std::span<const std::byte> memory, std::uint64_t address) {
    std::uint32_t value = 0;
    for (unsigned i = 0; i < 4; ++i)
        value |= std::to_integer<std::uint32_t>(memory[address + i]) << (8 * i);
    return value;
}

bool take(std::string_view& text, std::string_view word) {
    if (!text.starts_with(word)) return false;
    text.remove_prefix(word.size());
    return true;
}

bool take(std::string_view& text, std::uint32_t& number) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc{}) return false;
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
    return true;
}

} // namespace

std::vector<line> parse_output(std::string_view output) {
    std::vector<line> lines;
    while (true) {
        const auto end = output.find('\n');
        if (end == std::string_view::npos) return lines;
        const std::string whole(output.substr(0, end));
        std::string_view text = whole;
        line parsed;
        if (!take(text, "counter ") || !take(text, parsed.round) || !take(text, " ticks ") ||
            !take(text, parsed.ticks) || !text.empty())
            throw std::runtime_error(
                "the counter guest printed \"" + whole + "\" as line " + std::to_string(lines.size() + 1));
        lines.push_back(parsed);
        output.remove_prefix(end + 1);
    }
}

std::vector<line> output_of_two(const std::string& before, qemu& second) {
    if (second.status() != "running") second.cont();
    second.wait_serial(tests::lines(3), "3 more lines");
    second.stop();
    return parse_output(before + second.serial());
}

std::string check_order(const std::vector<line>& lines) {
    for (std::size_t i = 1; i < lines.size(); ++i) {
        const line& before = lines[i - 1];
        const line& after = lines[i];
        if (after.round != before.round + 1 || after.ticks <= before.ticks)
            return "round " + std::to_string(after.round) + ", ticks " + std::to_string(after.ticks) + " after round " +
                   std::to_string(before.round) + ", ticks " + std::to_string(before.ticks);
    }
    return {};
}

std::string check_memory(std::span<const std::byte> memory) {
    std::uint32_t round = 0;
    return check_memory(memory, round);
}

std::string check_memory(std::span<const std::byte> memory, std::uint32_t& round) {
    std::ostringstream wrong;
    wrong << std::hex;
    if (memory.size() < working_set_at + working_set_size) {
        wrong << "only " << memory.size() << " bytes of memory";
        return wrong.str();
    }
    if (const auto found = dword(memory, variables_at); found != magic) {
        wrong << "magic is " << found << ", not " << magic;
        return wrong.str();
    }
    round = dword(memory, variables_at + 4);

    bool previous = false; // past the place that the unfinished round had come to
    for (std::uint64_t at = working_set_at; at < working_set_at + working_set_size; at += 4) {
        const auto offset = dword(memory, at) - static_cast<std::uint32_t>(at);
        if (offset == round - 1)
            previous = true;
        else if (offset != round || previous) {
            wrong << "address " << at << " holds " << dword(memory, at) << " in round " << round;
            return wrong.str();
        }
    }
    return {};
}

} // namespace vmstate::tests::counter
