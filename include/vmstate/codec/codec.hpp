// SPDX-License-Identifier: BSL-1.0
//
// What is done with a description: save, load, measure, walk. Depends on codec/body.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <vmstate/codec/body.hpp>

namespace vmstate {

/// Saves `state`: pre_save, fields, needed subsections, post_save (QEMU: vmstate_save_state). No header, no footer.
/// Errors: what a hook says, `null_pointer`, `out_of_range` for a length that its member cannot hold, and the writer's.
/// A const state can be saved where no hook has to change it.
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
result<void> save(writer& w, S& state) {
    using base = std::conditional_t<std::is_const_v<S>, const detail::struct_of<Description>, detail::struct_of<Description>>;
    if (detail::save_body<Description, Description.version_id>(w, static_cast<base&>(state))) [[likely]] return {};
    return w.failure();
}

/// Loads a stream of `version_id` into `state`: pre_load, fields, subsections, post_load (QEMU: vmstate_load_state).
/// After an error the state is partly loaded and must not run.
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
result<void> load(reader& r, S& state, int version_id) {
    if (detail::load_with_version<Description, false>(r, static_cast<detail::struct_of<Description>&>(state), version_id, nullptr)) [[likely]]
        return {};
    return r.failure();
}

/// Whether the description is sent at all: its `needed`, true without one.
template <const auto& Description, class S>
bool is_needed(const S& state) {
    return detail::needed_by<Description>(static_cast<const detail::struct_of<Description>&>(state));
}

/// The bytes that `save` would write for the state as it stands. No hook is called. A constant expression where the
/// layout is fixed, whatever the state.
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
constexpr std::size_t wire_size(const S& state) {
    return detail::measure_body<Description, Description.version_id>(
        static_cast<const detail::struct_of<Description>&>(state));
}

/// Tells `visitor` what `save` would write, entry by entry in wire order. No hook is called.
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
void walk(S& state, field_visitor& visitor) {
    using base = std::conditional_t<std::is_const_v<S>, const detail::struct_of<Description>, detail::struct_of<Description>>;
    detail::walk_body<Description, Description.version_id>(static_cast<base&>(state), visitor);
}

/// The body of `state` as a vector of bytes.
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
result<std::vector<std::byte>> to_bytes(S& state) {
    vector_writer w(wire_size<Description>(std::as_const(state)));
    result<void> saved = save<Description>(w, state);
    if (saved.has_error()) {
        error failure = saved.error();
        failure.within(Description.name);
        return failure;
    }
    return w.take();
}
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
result<std::vector<std::byte>> to_bytes(S&& temporary) {
    return to_bytes<Description>(static_cast<S&>(temporary));
}

/// Loads a body that fills `bytes` exactly.
template <const auto& Description, class S>
    requires std::is_base_of_v<detail::struct_of<Description>, S>
result<void> from_bytes(std::span<const std::byte> bytes, S& state, int version_id = Description.version_id) {
    memory_reader r(bytes);
    if (load<Description>(r, state, version_id).has_error()) {
        error failure = r.failure();
        failure.within(Description.name);
        return failure;
    }
    if (r.remaining() == 0) return {};
    error failure(errc::trailing_bytes, "the end", std::to_string(r.remaining()) + (r.remaining() == 1 ? " byte" : " bytes"));
    failure.at_offset(r.offset()).within(Description.name);
    return failure;
}

} // namespace vmstate
