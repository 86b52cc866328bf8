// SPDX-License-Identifier: BSL-1.0
//
// What the compiler refuses. A rule is a function that is not constexpr: `describe` calls it when the rule is broken, which
// makes the description no constant, and the compiler's message is the rule's name, with what breaks it as the template
// argument. Depends on describe/wire_form.hpp.
#pragma once

#include <vmstate/describe/wire_form.hpp>

namespace vmstate::rules {

template <class Where>
void long_double_has_no_wire_form() {}
template <class Where>
void wchar_t_has_no_wire_form() {}
template <class Where>
void a_pointer_to_a_scalar_must_have_length() {}
template <class Where>
void a_struct_member_must_have_a_description() {}
template <class Where>
void a_union_has_no_wire_form() {}
template <class Where>
void a_reference_has_no_wire_form() {}
template <class Where>
void a_function_has_no_wire_form() {}
/// void, or a struct that is only declared here: in a device struct that is mostly a wire, a backend, a parent.
template <class Where>
void a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient() {}
template <class Where>
void a_const_member_can_not_be_loaded() {}
template <class Where>
void an_optional_has_a_wire_form_only_with_as_timer() {}
template <class Where>
void a_vector_string_or_unique_ptr_to_array_must_have_length() {}
template <class Where>
void a_list_or_map_must_have_as() {}
template <class Where>
void elements_of_a_list_or_map_must_be_structs_with_a_description() {}
template <class Where>
void a_key_of_a_map_must_be_an_integer_or_have_key_as() {}
/// QEMU has no VSTRUCT of lists and trees: their elements travel at their description's own version.
template <class Where>
void elements_of_a_list_or_map_can_not_have_a_version_in_as() {}
template <class Where>
void this_type_has_no_wire_form() {}
template <class Where>
void a_predicate_must_take_the_described_struct_and_return_bool() {}
template <class Where>
void a_hook_must_take_the_described_struct() {}
/// What it did to a copy would be lost.
template <class Where>
void a_hook_must_take_its_struct_by_reference_not_a_copy() {}
/// QEMU's hooks return an int, of which the sign is the verdict: not here.
template <class Where>
void a_hook_must_return_nothing_bool_or_result() {}
template <class Where>
void the_description_in_as_must_describe_the_elements_type() {}
template <class Where>
void a_slice_must_lie_inside_its_array() {}
template <class Where>
void between_bounds_must_fit_the_members_type() {}
/// QEMU's reader would refuse the nested description's stream as too new.
template <class Where>
void the_version_in_as_must_not_be_above_its_descriptions_version_id() {}
/// Elements of lists, maps and temporaries are saved at their own version, but loaded at the field's `since`.
template <class Where>
void an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see() {}
template <class Where>
void an_attribute_must_not_be_given_twice() {}
template <class Where>
void an_attribute_must_fit_its_member() {}
template <class Where>
void a_member_must_belong_to_the_described_struct() {}
template <class Where>
void a_codec_must_model_wire_codec() {}
template <class Where>
void a_length_must_be_an_integer() {}
template <class Where>
void a_length_must_come_before_its_array() {}
/// The length is gated by a version or a predicate that lets the array through without it.
template <class Where>
void a_length_must_be_present_whenever_its_array_is() {}
template <class Where>
void a_member_must_not_be_described_twice() {}
template <class Where>
void two_fields_must_not_have_one_wire_name() {}
template <class Where>
void a_subsection_must_not_be_given_twice() {}
template <class Where>
void two_subsections_must_not_have_one_name() {}
template <class Where>
void a_subsection_must_have_needed() {}
/// After every nested body the reader looks for a subsection of that body; it would take its ancestor's for its own.
template <class Where>
void a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name() {}
/// Or the description must say that it is one view among several: `partial`.
template <class Where>
void every_member_must_be_in_a_field_or_a_subsection_or_transient() {}
template <class Where>
void an_item_must_not_be_given_twice() {}
template <class Where>
void a_temporary_must_be_constructible_from_the_described_struct() {}
template <class Where>
void since_must_not_be_above_version_id() {}
template <class Where>
void minimum_version_id_must_not_be_above_version_id() {}
template <class Where>
void a_subsection_name_must_start_with_its_parents_name_and_a_slash() {}
template <class Where>
void a_description_must_have_a_name() {}
template <class Where>
void a_name_must_have_at_most_255_bytes() {}
template <class Where>
void version_ids_must_not_be_negative() {}

} // namespace vmstate::rules

namespace vmstate::detail {

/// Calls the rule that is broken: not a constant expression, so the compiler stops here and says its name.
template <refusal Rule, class Where>
consteval void refuse() {
    if constexpr (Rule == refusal::long_double_has_no_wire_form)
        rules::long_double_has_no_wire_form<Where>();
    else if constexpr (Rule == refusal::wchar_t_has_no_wire_form)
        rules::wchar_t_has_no_wire_form<Where>();
    else if constexpr (Rule == refusal::a_pointer_to_a_scalar_must_have_length)
        rules::a_pointer_to_a_scalar_must_have_length<Where>();
    else if constexpr (Rule == refusal::a_struct_member_must_have_a_description)
        rules::a_struct_member_must_have_a_description<Where>();
    else if constexpr (Rule == refusal::a_union_has_no_wire_form)
        rules::a_union_has_no_wire_form<Where>();
    else if constexpr (Rule == refusal::a_reference_has_no_wire_form)
        rules::a_reference_has_no_wire_form<Where>();
    else if constexpr (Rule == refusal::a_function_has_no_wire_form)
        rules::a_function_has_no_wire_form<Where>();
    else if constexpr (Rule == refusal::a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient)
        rules::a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient<Where>();
    else if constexpr (Rule == refusal::a_const_member_can_not_be_loaded)
        rules::a_const_member_can_not_be_loaded<Where>();
    else if constexpr (Rule == refusal::an_optional_has_a_wire_form_only_with_as_timer)
        rules::an_optional_has_a_wire_form_only_with_as_timer<Where>();
    else if constexpr (Rule == refusal::a_vector_string_or_unique_ptr_to_array_must_have_length)
        rules::a_vector_string_or_unique_ptr_to_array_must_have_length<Where>();
    else if constexpr (Rule == refusal::a_list_or_map_must_have_as)
        rules::a_list_or_map_must_have_as<Where>();
    else if constexpr (Rule == refusal::elements_of_a_list_or_map_must_be_structs_with_a_description)
        rules::elements_of_a_list_or_map_must_be_structs_with_a_description<Where>();
    else if constexpr (Rule == refusal::a_key_of_a_map_must_be_an_integer_or_have_key_as)
        rules::a_key_of_a_map_must_be_an_integer_or_have_key_as<Where>();
    else if constexpr (Rule == refusal::elements_of_a_list_or_map_can_not_have_a_version_in_as)
        rules::elements_of_a_list_or_map_can_not_have_a_version_in_as<Where>();
    else if constexpr (Rule == refusal::this_type_has_no_wire_form)
        rules::this_type_has_no_wire_form<Where>();
    else if constexpr (Rule == refusal::a_predicate_must_take_the_described_struct_and_return_bool)
        rules::a_predicate_must_take_the_described_struct_and_return_bool<Where>();
    else if constexpr (Rule == refusal::a_hook_must_take_the_described_struct)
        rules::a_hook_must_take_the_described_struct<Where>();
    else if constexpr (Rule == refusal::a_hook_must_take_its_struct_by_reference_not_a_copy)
        rules::a_hook_must_take_its_struct_by_reference_not_a_copy<Where>();
    else if constexpr (Rule == refusal::a_hook_must_return_nothing_bool_or_result)
        rules::a_hook_must_return_nothing_bool_or_result<Where>();
    else if constexpr (Rule == refusal::the_description_in_as_must_describe_the_elements_type)
        rules::the_description_in_as_must_describe_the_elements_type<Where>();
    else if constexpr (Rule == refusal::a_slice_must_lie_inside_its_array)
        rules::a_slice_must_lie_inside_its_array<Where>();
    else if constexpr (Rule == refusal::between_bounds_must_fit_the_members_type)
        rules::between_bounds_must_fit_the_members_type<Where>();
    else if constexpr (Rule == refusal::the_version_in_as_must_not_be_above_its_descriptions_version_id)
        rules::the_version_in_as_must_not_be_above_its_descriptions_version_id<Where>();
    else if constexpr (Rule == refusal::an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see)
        rules::an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see<Where>();
    else if constexpr (Rule == refusal::an_attribute_must_not_be_given_twice)
        rules::an_attribute_must_not_be_given_twice<Where>();
    else if constexpr (Rule == refusal::an_attribute_must_fit_its_member)
        rules::an_attribute_must_fit_its_member<Where>();
    else if constexpr (Rule == refusal::a_member_must_belong_to_the_described_struct)
        rules::a_member_must_belong_to_the_described_struct<Where>();
    else if constexpr (Rule == refusal::a_codec_must_model_wire_codec)
        rules::a_codec_must_model_wire_codec<Where>();
    else if constexpr (Rule == refusal::a_length_must_be_an_integer)
        rules::a_length_must_be_an_integer<Where>();
    else if constexpr (Rule == refusal::a_length_must_come_before_its_array)
        rules::a_length_must_come_before_its_array<Where>();
    else if constexpr (Rule == refusal::a_length_must_be_present_whenever_its_array_is)
        rules::a_length_must_be_present_whenever_its_array_is<Where>();
    else if constexpr (Rule == refusal::a_member_must_not_be_described_twice)
        rules::a_member_must_not_be_described_twice<Where>();
    else if constexpr (Rule == refusal::two_fields_must_not_have_one_wire_name)
        rules::two_fields_must_not_have_one_wire_name<Where>();
    else if constexpr (Rule == refusal::a_subsection_must_not_be_given_twice)
        rules::a_subsection_must_not_be_given_twice<Where>();
    else if constexpr (Rule == refusal::two_subsections_must_not_have_one_name)
        rules::two_subsections_must_not_have_one_name<Where>();
    else if constexpr (Rule == refusal::a_subsection_must_have_needed)
        rules::a_subsection_must_have_needed<Where>();
    else if constexpr (Rule == refusal::a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name)
        rules::a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name<Where>();
    else if constexpr (Rule == refusal::every_member_must_be_in_a_field_or_a_subsection_or_transient)
        rules::every_member_must_be_in_a_field_or_a_subsection_or_transient<Where>();
    else if constexpr (Rule == refusal::an_item_must_not_be_given_twice)
        rules::an_item_must_not_be_given_twice<Where>();
    else if constexpr (Rule == refusal::a_temporary_must_be_constructible_from_the_described_struct)
        rules::a_temporary_must_be_constructible_from_the_described_struct<Where>();
}

} // namespace vmstate::detail
