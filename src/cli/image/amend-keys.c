/* SPDX-License-Identifier: Apache-2.0 */
/* Key slots: what -o says of them. */
#include "cli/image/amend-keys.h"
#include "base/macros.h"
#include "base/number.h"
#include "crypto/luks.h"
#include "formats/luks/luks-driver.h"
#include "formats/qcow2/qcow2-crypt.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    const char *help;
} options[] = {
    {"iter-time", "<num> - How long checking the new password shall take, in milliseconds"},
    {"keyslot", "<num> - The key slot: 0 to 7"},
    {"new-secret", "<str> - ID of the secret that a slot gets"},
    {"old-secret", "<str> - ID of the secret whose slots are erased"},
    {"state", "<str> - active: a slot gets new-secret; inactive: slots are erased"},
};

bool amend_keys_is_option(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        if (strcmp(options[i].name, name) == 0)
            return true;
    }
    return false;
}

void amend_keys_help(const char *prefix)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++)
        printf("  %s%s=%s\n", prefix, options[i].name, options[i].help);
}

static const char *text_of(const json_t *keys, const char *name)
{
    return json_string_value(json_object_get(keys, name));
}

static int read_number(const json_t *keys, const char *name, uint64_t max, bool *ret_has,
                       uint64_t *ret, struct error **err)
{
    const char *text = text_of(keys, name);

    *ret_has = text;
    if (text && (number_from_text(text, ret) < 0 || *ret > max))
        return error_set(err, EINVAL, "Parameter '%s' expects a number, not '%s'", name, text);
    return 0;
}

/* All but the secrets. */
static int read_keys(const json_t *keys, struct luks_amend *ret, struct error **err)
{
    const char *state = text_of(keys, "state");
    uint64_t slot = 0;
    int r;

    *ret = (struct luks_amend){.activate = state && strcmp(state, "active") == 0};
    if (!state)
        return error_set(err, EINVAL, "Parameter 'state' is missing");
    if (!ret->activate && strcmp(state, "inactive") != 0)
        return error_set(err, EINVAL, "Parameter 'state' is active or inactive, not '%s'", state);
    r = read_number(keys, "keyslot", LUKS_SLOTS - 1, &ret->has_slot, &slot, err);
    if (r == 0)
        r = read_number(keys, "iter-time", UINT32_MAX, &ret->has_iter_ms, &ret->iter_ms, err);
    ret->slot = (unsigned)slot;
    return r;
}

int amend_keys_check(const json_t *keys, struct error **err)
{
    struct luks_amend ignored;
    const char *name;
    json_t *value;

    json_object_foreach((json_t *)(uintptr_t)keys, name, value)
    {
        if (!amend_keys_is_option(name) || !json_is_string(value))
            return error_set(err, EINVAL, "Invalid parameter 'encrypt.%s': it cannot be amended",
                             name);
    }
    return read_keys(keys, &ignored, err);
}

static int get_secret(struct graph *g, const char *id, struct secret *value,
                      const struct secret **ret, struct error **err)
{
    int r = id ? secrets_get(graph_secrets(g), id, value, err) : 0;

    *ret = id && r == 0 ? value : NULL;
    return r;
}

int amend_keys_co(struct image *image, const json_t *keys, bool force, struct error **err)
{
    AUTO(secret_release) struct secret new_secret = {.bytes = NULL};
    AUTO(secret_release) struct secret old_secret = {.bytes = NULL};
    struct luks_amend a;
    int r = read_keys(keys, &a, err);

    a.force = force;
    if (r == 0)
        r = get_secret(image->graph, text_of(keys, "new-secret"), &new_secret, &a.new_secret, err);
    if (r == 0)
        r = get_secret(image->graph, text_of(keys, "old-secret"), &old_secret, &a.old_secret, err);
    if (r < 0)
        return r;
    return strcmp(image_format(image), "luks") == 0 ? luks_node_co_amend(image->backend, &a, err)
                                                    : qcow2_co_amend_keys(image->backend, &a, err);
}
