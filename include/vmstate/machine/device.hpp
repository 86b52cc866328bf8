// SPDX-License-Identifier: BSL-1.0
//
// What a machine knows of a registered device: a row of functions. For a described struct they are the code that codec/
// generates from the description; for the legacy pair they are the user's. Depends on codec/.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <vmstate/codec/codec.hpp>
#include <vmstate/codec/field_visitor.hpp>
#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/wire.hpp>

namespace vmstate {

/// One per description, constant, shared by all devices of the kind.
struct device_operations {
    std::string_view name; ///< the description's, QEMU's vmsd name
    int version_id;
    int minimum_version_id;
    int priority;
    bool is_unmigratable;
    result<void> (*save)(writer&, void*);
    result<void> (*load)(reader&, void*, int version_id);
    bool (*is_needed)(const void*);
    void (*walk)(void*, field_visitor&);
};

template <const auto& Description>
inline constexpr device_operations operations_of{
    Description.name,
    Description.version_id,
    Description.minimum_version_id,
    Description.priority(),
    Description.is_unmigratable(),
    [](writer& out, void* object) {
        return save<Description>(out, *static_cast<detail::struct_of<Description>*>(object));
    },
    [](reader& in, void* object, int version_id) {
        return load<Description>(in, *static_cast<detail::struct_of<Description>*>(object), version_id);
    },
    [](const void* object) {
        return is_needed<Description>(*static_cast<const detail::struct_of<Description>*>(object));
    },
    [](void* object, field_visitor& visitor) {
        walk<Description>(*static_cast<detail::struct_of<Description>*>(object), visitor);
    },
};

/// How a device is registered: vmstate_register() and vmstate_register_with_alias_id().
struct device_options {
    /// The section's name in the stream; empty for the description's own. For a device with a path it is QEMU's
    /// `<path>/<description's name>`: "0000:00:01.1/ide". Such a section is found under the bare name too, as old
    /// streams have it.
    std::string id = {};
    /// Which one of several with this id; `instance_id_any` for the next free number.
    std::uint32_t instance_id = 0;
    /// The instance number under the bare name, for an id with a path; empty for the next free one.
    std::optional<std::uint32_t> compat_instance_id = {};
    /// Another instance id that old streams use for this device, and the oldest version that needs it.
    std::optional<std::uint32_t> alias_id = {};
    int alias_required_for_version = 0;
    /// Registers an id and instance a second time. QEMU's isapc does so ("isa-ide" 0, twice); QEMU 8.2 and later don't
    /// allow it. When loading, the first such section goes to the one registered first.
    bool allow_duplicate = false;
};

namespace detail {

/// What a user's function returns, nothing, a bool or a result, as a result.
template <class Function, class... Arguments>
result<void> call_handler(Function& function, Arguments&&... arguments) {
    using outcome = std::invoke_result_t<Function&, Arguments...>;
    if constexpr (std::is_void_v<outcome>) {
        function(std::forward<Arguments>(arguments)...);
        return {};
    } else if constexpr (std::is_same_v<std::remove_cvref_t<outcome>, bool>) {
        if (function(std::forward<Arguments>(arguments)...)) return {};
        return error(errc::hook_failed, {}, "the section's function said no");
    } else {
        return function(std::forward<Arguments>(arguments)...);
    }
}

/// A function of the user's over a writer or a reader, which may ignore what comes after it.
template <class Stream, class... More>
class handler {
    template <class Function>
    static constexpr bool fits =
        std::is_invocable_v<Function&, Stream&, More...> || std::is_invocable_v<Function&, Stream&>;

public:
    handler() = default;
    template <class Function>
        requires(!std::is_same_v<std::remove_cvref_t<Function>, handler> && fits<std::decay_t<Function>>)
    handler(Function&& function)
        : function_(
              [f = std::forward<Function>(function)](Stream& stream, More... more) mutable -> result<void> {
                  if constexpr (std::is_invocable_v<std::decay_t<Function>&, Stream&, More...>)
                      return call_handler(f, stream, more...);
                  else
                      return call_handler(f, stream);
              }) {}

    explicit operator bool() const noexcept { return static_cast<bool>(function_); }
    result<void> operator()(Stream& stream, More... more) const { return function_(stream, more...); }

private:
    std::function<result<void>(Stream&, More...)> function_;
};

} // namespace detail

/// register_savevm(): a body that only the two functions understand. `save(writer&)` and `load(reader&, int version_id)`
/// return void, bool or result<void>; `load` need not take the version. Without `save` nothing is written, without
/// `load` the section is refused.
struct handlers {
    int version_id = 0;
    detail::handler<writer> save = {};
    detail::handler<reader, int> load = {};
    std::uint32_t instance_id = 0;
    bool allow_duplicate = false;
};

} // namespace vmstate
