/* SPDX-License-Identifier: Apache-2.0 */
/* What `info` says of VMDK images only, as the peer does. */
#include "base/alloc.h"
#include "base/json-text.h"
#include "cli/image/info-tables.h"
#include "formats/vmdk/vmdk.h"

#include <inttypes.h>
#include <stdio.h>

static json_t *extent_json(const struct node *node, unsigned i, const struct image_layer *layer)
{
    const struct vmdk_line *line = &vmdk_descriptor(node)->lines[i];
    bool one = vmdk_is_one_file(node);
    AUTO(free_ptr) char *name = one || !line->name ? NULL : image_combine(layer->path, line->name);
    json_t *o = json_object();
    bool compressed;
    uint64_t grain = vmdk_grain_bytes(node, i, &compressed);

    if (compressed)
        json_object_set_new(o, "compressed", json_true());
    json_object_set_new(o, "virtual-size",
                        json_from_uint(one ? node_size(node) : line->sectors * VMDK_SECTOR));
    json_object_set_new(o, "filename", json_string_lossy(name ? name : layer->filename));
    if (grain)
        json_object_set_new(o, "cluster-size", json_from_uint(grain));
    json_object_set_new(o, "format", json_string(one ? "" : line->type));
    return o;
}

json_t *info_vmdk_json(const struct node *node, const struct image_layer *layer)
{
    const struct vmdk_descriptor *d = vmdk_descriptor(node);
    json_t *extents = json_array();

    for (unsigned i = 0; i < d->count; i++)
        json_array_append_new(extents, extent_json(node, i, layer));
    return json_pack("{s:s, s:{s:I, s:I, s:o, s:o}}", "type", "vmdk", "data", "cid",
                     (json_int_t)d->cid, "parent-cid", (json_int_t)d->parent_cid, "create-type",
                     json_string_lossy(d->create_type), "extents", extents);
}

static json_int_t number(const json_t *o, const char *key)
{
    return json_integer_value(json_object_get(o, key));
}

static const char *text(const json_t *o, const char *key)
{
    return json_string_value(json_object_get(o, key));
}

void info_print_vmdk(const json_t *specific)
{
    const json_t *data = json_object_get(specific, "data");
    const json_t *x;
    size_t i;

    if (!data)
        return;
    printf("Format specific information:\n    cid: %" JSON_INTEGER_FORMAT
           "\n    parent cid: %" JSON_INTEGER_FORMAT "\n    create type: %s\n    extents:\n",
           number(data, "cid"), number(data, "parent-cid"), text(data, "create-type"));
    json_array_foreach(json_object_get(data, "extents"), i, x)
    {
        printf("        [%zu]:\n", i);
        if (json_object_get(x, "compressed"))
            printf("            compressed: true\n");
        printf("            virtual size: %" JSON_INTEGER_FORMAT "\n            filename: %s\n",
               number(x, "virtual-size"), text(x, "filename"));
        if (json_object_get(x, "cluster-size"))
            printf("            cluster size: %" JSON_INTEGER_FORMAT "\n",
                   number(x, "cluster-size"));
        printf("            format: %s\n", text(x, "format"));
    }
}
