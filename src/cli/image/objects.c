/* SPDX-License-Identifier: Apache-2.0 */
/* The objects of the command line. */
#include "cli/image/objects.h"
#include "base/keyval.h"
#include "crypto/secret.h"
#include "graph/graph.h"
#include "schema-types.h"

#include <stdlib.h>

static struct object_options *objects;
static size_t object_count;

int objects_read(const char *text, struct error **err)
{
    struct object_options *o;
    int r;

    objects = realloc(objects, (object_count + 1) * sizeof(*objects));
    if (!objects)
        abort(); /* as all small memory */
    o = &objects[object_count];
    *o = (struct object_options){.id = NULL};
    r = keyval_in(&object_options_type, text, "qom-type", o, err);
    if (r < 0) {
        schema_free(&object_options_type, o);
        return error_wrap(err, r, "--object");
    }
    object_count++;
    return 0;
}

int objects_co_make(struct graph *g, struct error **err)
{
    for (size_t i = 0; i < object_count; i++) {
        int r = secrets_co_add(graph_secrets(g), objects[i].id, &objects[i].u.secret, err);

        if (r < 0)
            return error_wrap(err, r, "--object");
    }
    return 0;
}
