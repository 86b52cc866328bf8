// SPDX-License-Identifier: BSL-1.0
//
// The machine: everything of it that goes into a stream, registered under QEMU's rules for ids, instances, aliases and
// priorities. Knows nothing of the stream's format: save.hpp and load.hpp do. Depends on section.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <vmstate/machine/options.hpp>
#include <vmstate/machine/section.hpp>

namespace vmstate {

/// What became of a registration, with a `result`'s words. Need not be looked at: the machine remembers a failure, and
/// `save` and `load` report it before they touch anything.
class registration {
public:
    registration(std::uint32_t instance_id, std::uint32_t section_id) noexcept
        : instance_id_(instance_id), section_id_(section_id) {}
    registration(vmstate::error failure) noexcept : failure_(std::move(failure)) {}

    bool has_value() const noexcept { return !failure_; }
    bool has_error() const noexcept { return !has_value(); }
    explicit operator bool() const noexcept { return has_value(); }
    operator result<void>() const {
        if (failure_) return failure_;
        return {};
    }
    /// Why it failed. The path begins with the call: `add_device/pckbd#4`.
    const vmstate::error& error() const noexcept { return failure_; }
    /// The section's instance number, after `instance_id_any` the one that was free; 0 after a failure. All RAM blocks
    /// are in one section.
    std::uint32_t instance_id() const noexcept { return instance_id_; }
    std::uint32_t section_id() const noexcept { return section_id_; }

private:
    vmstate::error failure_;
    std::uint32_t instance_id_ = 0;
    std::uint32_t section_id_ = 0;
};

/// A machine's devices and memory. It refers to them: they have to stay where they are until they are removed or the
/// machine is gone. Devices are saved by descending priority, and in the order of their registration within one.
class machine {
public:
    using section_list = std::vector<std::unique_ptr<section>>;

    explicit machine(machine_options options = {}) : options_(std::move(options)) {
        if (!options_.valid_page_size())
            refuse_options(error(errc::invalid_argument, "a page size of 1024 to 65536, a power of two",
                std::to_string(options_.guest_page_size())));
        if (options_.name.size() > max_name_size)
            refuse_options(error(errc::invalid_argument, "a machine's name of at most 255 bytes",
                std::to_string(options_.name.size())));
        for (const std::string& capability : options_.capabilities)
            if (capability != "x-ignore-shared")
                refuse_options(error(errc::unsupported, {}, "capability " + capability));
    }

    const machine_options& options() const noexcept { return options_; }

    /// Registers a described device: vmstate_register(). Fails with `errc::duplicate` if the id has that instance
    /// already, with `errc::invalid_argument` for an id longer than 255 bytes or an alias that no old version needs.
    template <const auto& Description>
    registration add_device(detail::struct_of<Description>& object, const device_options& device = {}) {
        return add_described(operations_of<Description>, std::addressof(object), device);
    }
    /// Takes all registrations of the object with this description back, those that failed among them.
    template <const auto& Description>
    void remove_device(detail::struct_of<Description>& object) {
        forget_failures({add_device_call, &operations_of<Description>, std::addressof(object), {}});
        remove_if([&](const section& entry) {
            const auto* device = std::get_if<described_device>(&entry.content);
            return device != nullptr && device->object == std::addressof(object) &&
                   device->operations == &operations_of<Description>;
        });
    }

    /// Registers the legacy pair of functions: register_savevm().
    registration add_handlers(std::string_view id, handlers pair) {
        section entry;
        entry.idstr = id;
        entry.version_id = pair.version_id;
        const std::uint32_t instance_id = pair.instance_id;
        const bool allow_duplicate = pair.allow_duplicate;
        entry.content = std::move(pair);
        registration added = add(std::move(entry), instance_id, allow_duplicate);
        return added ? added : remember({add_handlers_call, nullptr, nullptr, std::string(id)}, added.error());
    }
    /// Takes all registrations with this id back, those that failed among them.
    void remove_handlers(std::string_view id) {
        forget_failures({add_handlers_call, nullptr, nullptr, std::string(id)});
        remove_if([&](const section& entry) {
            return entry.idstr == id && std::holds_alternative<handlers>(entry.content);
        });
    }

    /// Registers guest memory. All blocks are in one section, which is registered with the first of them.
    registration add_ram(std::string_view name, std::span<std::byte> memory, ram_options ram = {}) {
        if (!options_.valid_page_size()) return options_failure_;
        const culprit block{add_ram_call, nullptr, nullptr, std::string(name)};
        const std::uint64_t used = ram.used_length.value_or(memory.size());
        const std::size_t page_size = options_.guest_page_size();
        if (name.empty() || name.size() > max_name_size)
            return remember(
                block, error(errc::invalid_argument, "a RAM block's name of 1 to 255 bytes", std::string(name)));
        if (used == 0 || used > memory.size() || used % page_size != 0 || memory.size() % page_size != 0)
            return remember(block, error(errc::invalid_argument, "whole pages of memory",
                                       std::to_string(used) + " of " + std::to_string(memory.size()) + " bytes")
                                       .within(name));
        section* entry = ram_entry();
        if (entry == nullptr) {
            registration added = add_ram_section();
            if (!added) return remember(block, added.error());
            entry = ram_entry();
        }
        if (entry->ram()->find(name) != nullptr) return remember(block, error(errc::duplicate).within(name));
        entry->ram()->insert(
            std::make_unique<ram_block>(ram_block{std::string(name), memory, used, std::move(ram)}));
        return {entry->instance_id, entry->section_id};
    }
    registration add_ram(std::string_view name, std::span<std::uint8_t> memory, ram_options ram = {}) {
        return add_ram(name, std::as_writable_bytes(memory), std::move(ram));
    }
    /// The same for memory that was mapped by `ram_memory`, which has to outlive the machine; what it knows of its pages
    /// and its file goes before `ram`.
    registration add_ram(std::string_view name, const ram_memory& memory, ram_options ram = {}) {
        ram.host_page_size = memory.page_size();
        ram.file = memory.file();
        return add_ram(name, memory.span(), std::move(ram));
    }
    /// Takes the block out, and back what failed for one of this name.
    void remove_ram(std::string_view name) {
        forget_failures({add_ram_call, nullptr, nullptr, std::string(name)});
        if (section* entry = ram_entry()) entry->ram()->remove(name);
    }
    /// The machine's memory; null before the first `add_ram`.
    ram_section* ram() noexcept {
        section* entry = ram_entry();
        return entry != nullptr ? entry->ram() : nullptr;
    }
    const ram_section* ram() const noexcept { return const_cast<machine*>(this)->ram(); }

    /// Whether the machine can be saved and loaded at all: the first registration that failed and was not taken back,
    /// or a device that forbids migration.
    result<void> check() const {
        if (options_failure_) return options_failure_;
        if (!failures_.empty()) return failures_.front().failure;
        for (const std::unique_ptr<section>& entry : sections_) {
            const auto* device = std::get_if<described_device>(&entry->content);
            if (device != nullptr && device->operations->is_unmigratable)
                return error(errc::not_migratable).within(section_path(*entry));
        }
        return {};
    }

    /// What is registered and was not in the stream that was loaded last: sections as errors name them, and RAM blocks
    /// as "ram/<name>". Their values are what they were, as in QEMU, which says nothing of it either: a source leaves
    /// out what it doesn't need. Before the first load it is everything.
    std::vector<std::string> not_in_stream() const {
        std::vector<std::string> missing;
        for (const std::unique_ptr<section>& entry : sections_) {
            if (const auto* ram = std::get_if<ram_section>(&entry->content)) {
                for (const std::unique_ptr<ram_block>& block : ram->blocks())
                    if (!ram->was_in_stream(*block)) missing.push_back(section_path(*entry) + '/' + block->name);
            } else if (!entry->load_section_id) {
                missing.push_back(section_path(*entry));
            }
        }
        return missing;
    }

    /// Every section in the order of saving. For save.hpp and load.hpp.
    section_list& sections() noexcept { return sections_; }
    const section_list& sections() const noexcept { return sections_; }

    /// The section that one of the stream belongs to, or null: by id and instance, by alias, by the name of old
    /// streams. Of several with the same id the first that the stream hasn't had yet.
    section* find_section(std::string_view idstr, std::uint32_t instance_id) noexcept {
        section* found = nullptr;
        for (const std::unique_ptr<section>& entry : sections_) {
            if (entry->is_carried() || !entry->is_called(idstr, instance_id)) continue;
            if (!entry->load_section_id) return entry.get();
            if (found == nullptr) found = entry.get();
        }
        return found;
    }
    registration add_ram_section() {
        section entry;
        entry.idstr = ram_section::id;
        entry.version_id = ram_section::version_id;
        entry.content.emplace<ram_section>();
        return add(std::move(entry), 0, false);
    }
    /// Forgets what an earlier stream brought.
    void remove_carried() {
        remove_if([](const section& entry) { return entry.is_carried(); });
    }
    /// Takes over the order and the section ids of a stream that was loaded: `order` has its sections, those of
    /// `carried` among them. A section that the stream hadn't keeps its place behind the one that it came after, and
    /// gets a number that is free.
    void adopt_order(const std::vector<section*>& order, section_list carried) {
        std::unordered_map<const section*, std::unique_ptr<section>> of_stream;
        for (section* entry : order) of_stream.emplace(entry, nullptr);
        for (std::unique_ptr<section>& entry : carried) of_stream[entry.get()] = std::move(entry);

        std::unordered_map<const section*, section_list> followers;
        const section* anchor = nullptr;
        for (std::unique_ptr<section>& entry : sections_) {
            if (const auto place = of_stream.find(entry.get()); place != of_stream.end()) {
                anchor = entry.get();
                place->second = std::move(entry);
            } else {
                followers[anchor].push_back(std::move(entry));
            }
        }
        sections_.clear();
        for (section* entry : order)
            next_section_id_ =
                std::max(next_section_id_, (entry->section_id = entry->load_section_id.value_or(0)) + 1);
        const auto append = [this](std::unique_ptr<section> entry) { sections_.push_back(std::move(entry)); };
        const auto append_followers = [&](const section* of) {
            for (std::unique_ptr<section>& entry : followers[of]) {
                entry->section_id = next_section_id_++;
                append(std::move(entry));
            }
        };
        append_followers(nullptr);
        for (section* entry : order) {
            append(std::move(of_stream[entry]));
            append_followers(entry);
        }
    }

private:
    /// Whose registration failed: a device's has an object and its description, the others have a name.
    struct culprit {
        std::string_view call;
        const device_operations* operations;
        const void* object;
        std::string name;

        bool operator==(const culprit&) const = default;
    };
    struct failed_registration {
        culprit who;
        error failure;
    };
    static constexpr std::string_view add_device_call = "add_device";
    static constexpr std::string_view add_handlers_call = "add_handlers";
    static constexpr std::string_view add_ram_call = "add_ram";

    registration add_described(
        const device_operations& operations, void* object, const device_options& device) {
        section entry;
        entry.idstr = device.id.empty() ? std::string(operations.name) : device.id;
        entry.version_id = operations.version_id;
        entry.priority = operations.priority;
        entry.alias_id = device.alias_id;
        entry.content = described_device{&operations, object};
        // An alias is there for the streams of old versions: if none of them can be loaded any more, it is a mistake.
        if (device.alias_id && device.alias_required_for_version < operations.minimum_version_id)
            return remember({add_device_call, &operations, object, {}},
                error(errc::invalid_argument,
                    "an alias that a version from " + std::to_string(operations.minimum_version_id) + " on needs",
                    std::to_string(device.alias_required_for_version))
                    .within(entry.idstr));
        const std::string bare_suffix = '/' + std::string(operations.name);
        if (entry.idstr.size() > bare_suffix.size() && entry.idstr.ends_with(bare_suffix))
            entry.compat = section::compat_id{std::string(operations.name),
                device.compat_instance_id.value_or(next_compat_instance_id(operations.name))};
        registration added = add(std::move(entry), device.instance_id, device.allow_duplicate);
        return added ? added : remember({add_device_call, &operations, object, {}}, added.error());
    }

    /// Keeps no failure: its caller knows whose it is.
    registration add(section entry, std::uint32_t instance_id, bool allow_duplicate) {
        if (entry.idstr.empty() || entry.idstr.size() > max_name_size)
            return error(errc::invalid_argument, "a section's id of 1 to 255 bytes",
                std::to_string(entry.idstr.size()));
        entry.instance_id = instance_id == instance_id_any ? next_instance_id(entry.idstr) : instance_id;
        if (!allow_duplicate)
            for (const std::unique_ptr<section>& other : sections_)
                if (!other->is_carried() && other->idstr == entry.idstr &&
                    other->instance_id == entry.instance_id)
                    return registration(
                        error(errc::duplicate, "another instance id than " + std::to_string(entry.instance_id))
                            .within(section_path(entry)));
        entry.section_id = next_section_id_++;
        const registration done(entry.instance_id, entry.section_id);
        const auto lower = std::find_if(sections_.begin(), sections_.end(),
            [&](const std::unique_ptr<section>& other) { return other->priority < entry.priority; });
        sections_.insert(lower, std::make_unique<section>(std::move(entry)));
        return done;
    }

    std::uint32_t next_instance_id(std::string_view idstr) const noexcept {
        std::uint32_t next = 0;
        for (const std::unique_ptr<section>& entry : sections_)
            if (entry->idstr == idstr && entry->instance_id >= next) next = entry->instance_id + 1;
        return next;
    }
    std::uint32_t next_compat_instance_id(std::string_view idstr) const noexcept {
        std::uint32_t next = 0;
        for (const std::unique_ptr<section>& entry : sections_)
            if (entry->compat && entry->compat->idstr == idstr && entry->compat->instance_id >= next)
                next = entry->compat->instance_id + 1;
        return next;
    }
    template <class Predicate>
    void remove_if(const Predicate& predicate) {
        std::erase_if(sections_, [&](const std::unique_ptr<section>& entry) { return predicate(*entry); });
    }
    section* ram_entry() noexcept {
        for (const std::unique_ptr<section>& entry : sections_)
            if (entry->ram() != nullptr) return entry.get();
        return nullptr;
    }
    /// Keeps a failure for save and load.
    registration remember(culprit who, error failure) {
        failure.within(who.call);
        failures_.push_back({std::move(who), failure});
        return failure;
    }
    void forget_failures(const culprit& who) {
        std::erase_if(failures_, [&](const failed_registration& failed) { return failed.who == who; });
    }
    void refuse_options(error failure) {
        if (!options_failure_) options_failure_ = std::move(failure.within("machine_options"));
    }

    machine_options options_;
    section_list sections_;
    std::uint32_t next_section_id_ = 0;
    error options_failure_;                     ///< the first; nothing takes it back
    std::vector<failed_registration> failures_; ///< in the order of the calls
};

} // namespace vmstate
