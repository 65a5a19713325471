/* SPDX-License-Identifier: Apache-2.0 */
/* Changing images in use. */
#include "control/control.h"
#include "jobs/amend-keys.h"
#include "schema-dispatch.h"

int qmp_x_blockdev_amend(struct qmp_session *session, const struct x_blockdev_amend_args *args,
                         struct error **err)
{
    const struct amend_keys_request request = {
        .job_id = args->job_id,
        .node_name = args->node_name,
        .options = &args->options,
        .force = args->force,
    };
    struct control *c = control_of(session);

    return amend_keys_co_start(c->jobs, c->graph, &request, err);
}
