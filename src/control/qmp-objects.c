/* SPDX-License-Identifier: Apache-2.0 */
/* Commands that make and delete objects. */
#include "control/control.h"
#include "crypto/secret.h"
#include "schema-dispatch.h"

int qmp_object_add(struct qmp_session *session, const struct object_options *args,
                   struct error **err)
{
    return secrets_co_add(graph_secrets(control_of(session)->graph), args->id, &args->u.secret,
                          err);
}

int qmp_object_del(struct qmp_session *session, const struct object_del_args *args,
                   struct error **err)
{
    return secrets_remove(graph_secrets(control_of(session)->graph), args->id, err);
}
