/* SPDX-License-Identifier: Apache-2.0 */
/* LUKS headers, for people and programs. */
#include "cli/image/info-luks.h"
#include "base/macros.h"
#include "crypto/luks-header.h"
#include "loop/iobuf.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static json_t *slots_json(const struct luks_header *h)
{
    json_t *slots = json_array();

    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        const struct luks_slot *s = &h->slots[i];
        json_t *o = json_pack("{s:b}", "active", s->active);

        if (s->active)
            json_object_set_new(o, "iters", json_integer(s->iterations));
        json_object_set_new(o, "key-offset",
                            json_integer((json_int_t)s->material_sector * LUKS_SECTOR));
        if (s->active)
            json_object_set_new(o, "stripes", json_integer(LUKS_STRIPES));
        json_array_append_new(slots, o);
    }
    return slots;
}

static json_t *header_json(const struct luks_header *h, bool in_qcow2)
{
    struct luks_names n;
    json_t *o;

    luks_header_names(h, &n);
    o = json_pack("{s:s, s:s, s:s, s:s}", "ivgen-alg", n.iv, "hash-alg", h->hash, "cipher-alg",
                  n.cipher, "uuid", h->uuid);
    if (*n.iv_hash)
        json_object_set_new(o, "ivgen-hash-alg", json_string(n.iv_hash));
    if (in_qcow2)
        json_object_set_new(o, "format", json_string("luks"));
    json_object_set_new(o, "cipher-mode", json_string(n.mode));
    json_object_set_new(o, "slots", slots_json(h));
    json_object_set_new(o, "payload-offset",
                        json_integer((json_int_t)h->payload_sector * LUKS_SECTOR));
    json_object_set_new(o, "master-key-iters", json_integer(h->digest_iterations));
    return o;
}

static int co_fn control_fn read_at(json_t **ret, struct graph *g, const struct image_layer *layer,
                                    uint64_t offset, uint64_t len, struct error **err)
{
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct luks_header h;
    struct backend *b;
    struct iobuf *buf;
    int r = image_co_backend(&b, g, layer->file_node, access, err);

    if (r < 0)
        return r;
    buf = iobuf_new(LUKS_HEADER_BYTES);
    r = buf ? image_co_read(b, offset, buf->data, LUKS_HEADER_BYTES, buf) : -ENOMEM;
    if (r < 0)
        r = error_set(err, -r, "cannot read '%s': %s", layer->filename, strerror(-r));
    else
        r = luks_header_parse(&h, buf->data, (size_t)MIN(len, (uint64_t)LUKS_HEADER_BYTES), len,
                              err);
    iobuf_unref(buf);
    (void)backend_co_free(b);
    if (r == 0)
        *ret = header_json(&h, offset != 0);
    return r < 0 ? error_wrap(err, r, "'%s'", layer->filename) : 0;
}

int info_luks_co_read(json_t **ret, struct graph *g, const struct image_layer *layer,
                      struct error **err)
{
    uint64_t offset;
    uint64_t len;
    int r;

    *ret = NULL;
    if (strcmp(layer->format, "luks") == 0)
        return read_at(ret, g, layer, 0, layer->file_size, err);
    if (layer->header.crypt_method != QCOW2_CRYPT_LUKS)
        return 0;
    r = qcow2_header_encryption(&layer->header, layer->file_size, &offset, &len, err);
    return r < 0 ? error_wrap(err, r, "'%s'", layer->filename)
                 : read_at(ret, g, layer, offset, len, err);
}

static void print_value(const json_t *value)
{
    if (json_is_boolean(value))
        printf("%s\n", json_is_true(value) ? "true" : "false");
    else if (json_is_integer(value))
        printf("%lld\n", (long long)json_integer_value(value));
    else
        printf("%s\n", json_string_value(value));
}

/* `ivgen-alg` is for programs, `ivgen alg` for people. */
static void print_key(const char *indent, const char *key)
{
    printf("%s", indent);
    for (; *key; key++)
        printf("%c", *key == '-' ? ' ' : *key);
    printf(": ");
}

void info_print_luks(const json_t *luks, const char *indent)
{
    const char *key;
    json_t *value;
    json_t *slot;
    size_t i;

    json_object_foreach((json_t *)(uintptr_t)luks, key, value)
    {
        if (!json_is_array(value)) {
            print_key(indent, key);
            print_value(value);
            continue;
        }
        printf("%sslots:\n", indent);
        json_array_foreach(value, i, slot)
        {
            const char *member;
            json_t *of_slot;

            printf("%s    [%zu]:\n", indent, i);
            json_object_foreach(slot, member, of_slot)
            {
                printf("%s    ", indent);
                print_key("    ", member);
                print_value(of_slot);
            }
        }
    }
}
