/* SPDX-License-Identifier: Apache-2.0 */
/* The protocol's own commands: negotiation, version, the list of commands, introspection. */
#include "schema-dispatch.h"

#include "base/alloc.h"
#include "base/json-text.h"

#include <errno.h>
#include <string.h>

int qmp_qmp_capabilities(struct qmp_session *session, const struct qmp_capabilities_args *args,
                         struct error **err)
{
    if (args->enable.count > 0)
        return error_set(err, ENOTSUP, "capability '%s' is not offered",
                         qmp_capability_name(args->enable.items[0]));
    qmp_session_negotiate(session);
    return 0;
}

int qmp_query_version(struct qmp_session *session, struct version_info *ret, struct error **err)
{
    (void)err; /* cannot fail */
    ret->qemu.major = session->service->major;
    ret->qemu.minor = session->service->minor;
    ret->qemu.micro = session->service->micro;
    ret->package = xstrdup(session->service->package);
    return 0;
}

int qmp_query_commands(struct qmp_session *session, struct command_info_array *ret,
                       struct error **err)
{
    const struct qmp_service *service = session->service;

    (void)err; /* cannot fail */
    ret->items = xnew_n(struct command_info, service->command_count);
    ret->count = service->command_count;
    for (size_t i = 0; i < ret->count; i++)
        ret->items[i].name = xstrdup(service->commands[i].schema->name);
    return 0;
}

int qmp_query_qmp_schema(struct qmp_session *session, struct any_array *ret, struct error **err)
{
    const char *text = session->service->introspection;
    json_t *entities;
    size_t i;
    json_t *entity;
    int r = json_text_load(text, strlen(text), &entities, err);

    if (r < 0)
        return r;
    ret->items = xnew_n(json_t *, json_array_size(entities));
    ret->count = json_array_size(entities);
    json_array_foreach(entities, i, entity) ret->items[i] = json_incref(entity);
    json_decref(entities);
    return 0;
}
