/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
#include "sample-types.h"

#include "base/json-out.h"

#include <stddef.h>

_Static_assert(sizeof(enum pile_order) == sizeof(unsigned), "enums are read as unsigned");

static const char *const pile_order_values[] = {
    [PILE_ORDER_UP] = "up",
    [PILE_ORDER_DOWN] = "down",
};

const struct schema_type pile_order_type = {
    .name = "pile-order",
    .kind = SCHEMA_ENUM,
    .size = sizeof(enum pile_order),
    .count = 2,
    .values = pile_order_values,
};

_Static_assert(sizeof(enum node_driver) == sizeof(unsigned), "enums are read as unsigned");

static const char *const node_driver_values[] = {
    [NODE_DRIVER_HEAP] = "heap",
    [NODE_DRIVER_PILE] = "pile",
};

const struct schema_type node_driver_type = {
    .name = "node-driver",
    .kind = SCHEMA_ENUM,
    .size = sizeof(enum node_driver),
    .count = 2,
    .values = node_driver_values,
};

static const struct schema_member stone_ref_members[] = {
    {
        .name = "name",
        .type = &schema_string,
        .offset = offsetof(struct stone_ref, name),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 4095},
    },
    {
        .name = "definition",
        .type = &stone_type,
        .offset = offsetof(struct stone_ref, definition),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .indirect = true,
    },
    {
        .name = "ground",
        .type = &schema_null,
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
    },
    {
        .name = "depth",
        .type = &schema_uint,
        .offset = offsetof(struct stone_ref, depth),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = UINT64_C(18446744073709551615)},
    },
};

const struct schema_type stone_ref_type = {
    .name = "stone-ref",
    .kind = SCHEMA_ALTERNATE,
    .size = sizeof(struct stone_ref),
    .count = 4,
    .members = stone_ref_members,
};

static const struct schema_refusal pile_options_refusals[] = {
    {"aio", "piles do no I/O"},
    {NULL, NULL},
};

static const struct schema_member pile_options_members[] = {
    {
        .name = "file",
        .type = &stone_ref_type,
        .offset = offsetof(struct pile_options, file),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
    },
    {
        .name = "order",
        .type = &pile_order_type,
        .offset = offsetof(struct pile_options, order),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .default_number = PILE_ORDER_UP,
    },
};

const struct schema_type pile_options_type = {
    .name = "pile-options",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct pile_options),
    .count = 2,
    .members = pile_options_members,
    .refusals = pile_options_refusals,
};

static const struct schema_member node_members[] = {
    {
        .name = "driver",
        .type = &node_driver_type,
        .offset = offsetof(struct node, driver),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
    },
};

static const struct schema_variant node_variants[] = {
    [NODE_DRIVER_HEAP] = {&pile_options_type, offsetof(struct node, u.heap)},
    [NODE_DRIVER_PILE] = {&pile_options_type, offsetof(struct node, u.pile)},
};

const struct schema_type node_type = {
    .name = "node",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct node),
    .count = 1,
    .members = node_members,
    .tag = &node_members[0],
    .variants = node_variants,
};

static const struct schema_refusal colour_refusals[] = {
    {"pink", "stones are not pink"},
    {NULL, NULL},
};

_Static_assert(sizeof(enum colour) == sizeof(unsigned), "enums are read as unsigned");

static const char *const colour_values[] = {
    [COLOUR_RED] = "red",
    [COLOUR_DARK_GREY] = "dark-grey",
};

const struct schema_type colour_type = {
    .name = "colour",
    .kind = SCHEMA_ENUM,
    .size = sizeof(enum colour),
    .count = 2,
    .values = colour_values,
    .refusals = colour_refusals,
};

_Static_assert(sizeof(enum shape) == sizeof(unsigned), "enums are read as unsigned");

static const char *const shape_values[] = {
    [SHAPE_ROUND] = "round",
    [SHAPE_FLAT] = "flat",
    [SHAPE_UNIX] = "unix",
};

const struct schema_type shape_type = {
    .name = "shape",
    .kind = SCHEMA_ENUM,
    .size = sizeof(enum shape),
    .count = 3,
    .values = shape_values,
};

static const struct schema_member place_members[] = {
    {
        .name = "x",
        .type = &schema_int,
        .offset = offsetof(struct place, x),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .limits = {.min = INT64_C(-10), .max = 10, .unit = "m"},
        .default_number = (uint64_t)INT64_C(-3),
    },
    {
        .name = "y",
        .type = &schema_int,
        .offset = offsetof(struct place, y),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .limits = {.min = INT64_MIN, .max = UINT64_C(9223372036854775807)},
    },
};

const struct schema_type place_type = {
    .name = "place",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct place),
    .count = 2,
    .members = place_members,
};

static const struct schema_member round_shape_members[] = {
    {
        .name = "radius",
        .type = &schema_uint,
        .offset = offsetof(struct round_shape, radius),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 65535},
    },
};

const struct schema_type round_shape_type = {
    .name = "round-shape",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct round_shape),
    .count = 1,
    .members = round_shape_members,
};

const struct schema_type colour_array_type = {
    .name = "[colour]",
    .kind = SCHEMA_ARRAY,
    .size = sizeof(struct colour_array),
    .element = &colour_type,
};

static const struct schema_member flat_shape_members[] = {
    {
        .name = "label",
        .type = &schema_string,
        .offset = offsetof(struct flat_shape, label),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
        .limits = {.max = 4095},
    },
    {
        .name = "faces",
        .type = &colour_array_type,
        .offset = offsetof(struct flat_shape, faces),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 4096},
    },
};

const struct schema_type flat_shape_type = {
    .name = "flat-shape",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct flat_shape),
    .count = 2,
    .members = flat_shape_members,
};

const struct schema_type stone_array_type = {
    .name = "[stone]",
    .kind = SCHEMA_ARRAY,
    .size = sizeof(struct stone_array),
    .element = &stone_type,
};

static const struct schema_member report_members[] = {
    {
        .name = "stones",
        .type = &stone_array_type,
        .offset = offsetof(struct report, stones),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 4096},
    },
    {
        .name = "total",
        .type = &schema_uint,
        .offset = offsetof(struct report, total),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = UINT64_C(18446744073709551615)},
    },
    {
        .name = "mean",
        .type = &schema_number,
        .offset = offsetof(struct report, mean),
        .flag_offset = offsetof(struct report, has_mean),
        .presence = SCHEMA_OPTIONAL,
    },
    {
        .name = "note",
        .type = &schema_any,
        .offset = offsetof(struct report, note),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
    },
    {
        .name = "limit",
        .type = &schema_int,
        .offset = offsetof(struct report, limit),
        .flag_offset = offsetof(struct report, has_limit),
        .presence = SCHEMA_OPTIONAL,
        .limits = {.min = INT64_MIN, .max = UINT64_C(9223372036854775807)},
    },
};

const struct schema_type report_type = {
    .name = "report",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct report),
    .count = 5,
    .members = report_members,
};

static const struct schema_member label_members[] = {
    {
        .name = "title",
        .type = &schema_string,
        .offset = offsetof(struct label, title),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .limits = {.max = 5},
        .default_string = "none",
    },
    {
        .name = "amount",
        .type = &amount_type,
        .offset = offsetof(struct label, amount),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
        .indirect = true,
    },
    {
        .name = "scale",
        .type = &schema_number,
        .offset = offsetof(struct label, scale),
        .flag_offset = offsetof(struct label, has_scale),
        .presence = SCHEMA_OPTIONAL,
    },
};

const struct schema_type label_type = {
    .name = "label",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct label),
    .count = 3,
    .members = label_members,
};

const struct schema_type string_array_type = {
    .name = "[string]",
    .kind = SCHEMA_ARRAY,
    .size = sizeof(struct string_array),
    .element = &schema_string,
    .element_limits = {.max = 4095},
};

static const struct schema_refusal stone_refusals[] = {
    {"smell", "stones do not smell"},
    {NULL, NULL},
};

static const struct schema_member stone_members[] = {
    {
        .name = "name",
        .type = &schema_string,
        .offset = offsetof(struct stone, name),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.min = 1, .max = 8, .identifier = true},
    },
    {
        .name = "shape",
        .type = &shape_type,
        .offset = offsetof(struct stone, shape),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .default_number = SHAPE_FLAT,
    },
    {
        .name = "weight",
        .type = &schema_size,
        .offset = offsetof(struct stone, weight),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.min = 1, .max = UINT64_C(18446744073709551615)},
    },
    {
        .name = "colour",
        .type = &colour_type,
        .offset = offsetof(struct stone, colour),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .default_number = COLOUR_DARK_GREY,
    },
    {
        .name = "heavy",
        .type = &schema_bool,
        .offset = offsetof(struct stone, heavy),
        .flag_offset = offsetof(struct stone, has_heavy),
        .presence = SCHEMA_OPTIONAL,
    },
    {
        .name = "place",
        .type = &place_type,
        .offset = offsetof(struct stone, place),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
    },
    {
        .name = "last-place",
        .type = &place_type,
        .offset = offsetof(struct stone, last_place),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
        .indirect = true,
    },
    {
        .name = "on",
        .type = &stone_ref_type,
        .offset = offsetof(struct stone, on),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
        .indirect = true,
    },
    {
        .name = "tags",
        .type = &string_array_type,
        .offset = offsetof(struct stone, tags),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .limits = {.max = 3},
    },
};

static const struct schema_variant stone_variants[] = {
    [SHAPE_ROUND] = {&round_shape_type, offsetof(struct stone, u.round)},
    [SHAPE_FLAT] = {&flat_shape_type, offsetof(struct stone, u.flat)},
    [SHAPE_UNIX] = {NULL, 0},
};

const struct schema_type stone_type = {
    .name = "stone",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct stone),
    .count = 9,
    .members = stone_members,
    .tag = &stone_members[1],
    .variants = stone_variants,
    .refusals = stone_refusals,
};

const struct schema_type uint_array_type = {
    .name = "[u64]",
    .kind = SCHEMA_ARRAY,
    .size = sizeof(struct uint_array),
    .element = &schema_uint,
    .element_limits = {.max = UINT64_C(18446744073709551615)},
};

static const struct schema_member amount_members[] = {
    {
        .name = "exact",
        .type = &schema_number,
        .offset = offsetof(struct amount, exact),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
    },
    {
        .name = "some",
        .type = &schema_bool,
        .offset = offsetof(struct amount, some),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
    },
    {
        .name = "each",
        .type = &uint_array_type,
        .offset = offsetof(struct amount, each),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 4096},
    },
};

const struct schema_type amount_type = {
    .name = "amount",
    .kind = SCHEMA_ALTERNATE,
    .size = sizeof(struct amount),
    .count = 3,
    .members = amount_members,
};

static const struct schema_member stone_weigh_args_members[] = {
    {
        .name = "name",
        .type = &schema_string,
        .offset = offsetof(struct stone_weigh_args, name),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 4095},
    },
    {
        .name = "times",
        .type = &schema_uint,
        .offset = offsetof(struct stone_weigh_args, times),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .limits = {.max = 3, .unit = "times"},
        .default_number = 1,
    },
};

const struct schema_type stone_weigh_args_type = {
    .name = "stone-weigh-args",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct stone_weigh_args),
    .count = 2,
    .members = stone_weigh_args_members,
};

static const struct schema_member qmp_capabilities_args_members[] = {
    {
        .name = "enable",
        .type = &string_array_type,
        .offset = offsetof(struct qmp_capabilities_args, enable),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_DEFAULT,
        .limits = {.max = 4096},
    },
};

const struct schema_type qmp_capabilities_args_type = {
    .name = "qmp-capabilities-args",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct qmp_capabilities_args),
    .count = 1,
    .members = qmp_capabilities_args_members,
};

static const struct schema_member stone_fell_event_members[] = {
    {
        .name = "name",
        .type = &schema_string,
        .offset = offsetof(struct stone_fell_event, name),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = 4095},
    },
    {
        .name = "height",
        .type = &schema_uint,
        .offset = offsetof(struct stone_fell_event, height),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_MANDATORY,
        .limits = {.max = UINT64_C(18446744073709551615), .unit = "m"},
    },
};

const struct schema_type stone_fell_event_type = {
    .name = "stone-fell-event",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct stone_fell_event),
    .count = 2,
    .members = stone_fell_event_members,
};

json_t *event_stone_fell(const struct stone_fell_event *data)
{
    return json_pack("{s:s, s:o}", "event", "STONE_FELL", "data", json_out(&stone_fell_event_type, data));
}

json_t *event_night(void)
{
    return json_pack("{s:s}", "event", "NIGHT");
}

const struct schema_command sample_commands[] = {
    {"qmp_capabilities", &qmp_capabilities_args_type, NULL},
    {"query-stones", NULL, &report_type},
    {"quit", NULL, NULL},
    {"stone-add", &stone_type, NULL},
    {"stone-weigh", &stone_weigh_args_type, &uint_array_type},
};

const size_t sample_command_count = 5;

const struct schema_driver sample_drivers[] = {
    {"heap", SCHEMA_DRIVER_FILTER, &pile_options_type},
    {"pile", SCHEMA_DRIVER_FILTER, &pile_options_type},
};

const size_t sample_driver_count = 2;
