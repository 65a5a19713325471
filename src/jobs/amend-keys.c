/* SPDX-License-Identifier: Apache-2.0 */
/* The amend job: passwords are checked on threads of their own, and the header is written through the node's backend. */
#include "jobs/amend-keys.h"
#include "base/alloc.h"
#include "crypto/luks.h"
#include "formats/luks/luks-driver.h"
#include "formats/qcow2/qcow2-crypt.h"
#include "graph/backend.h"
#include "graph/driver.h"
#include "schema-types.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct amend_job {
    struct backend *backend;
    char *owner; /* "job 'a0'" */
    bool is_luks;
    struct luks_amend amend;
    struct secret new_secret; /* what `amend` points to; wiped when the work is done */
    struct secret old_secret;
};

static int co_fn amend_job_co_run(struct job *job, struct error **err)
{
    struct amend_job *a = job_state(job);
    int r = backend_attach(a->backend);

    if (r < 0)
        return error_set(err, -r, "no memory");
    job_progress_set(job, 0, 1);
    r = a->is_luks ? luks_node_co_amend(a->backend, &a->amend, err)
                   : qcow2_co_amend_keys(a->backend, &a->amend, err);
    if (r == 0)
        job_progress_set(job, 1, 1);
    return r;
}

static void forget_secrets(struct amend_job *a)
{
    secret_release(&a->new_secret);
    secret_release(&a->old_secret);
}

static void co_fn control_fn amend_job_co_clean(struct job *job)
{
    struct amend_job *a = job_state(job);

    forget_secrets(a);
    a->backend = backend_co_free(a->backend);
}

static void amend_job_release(struct job *job)
{
    struct amend_job *a = job_state(job);

    forget_secrets(a); /* it may never have begun */
    free(a->owner);
}

static const struct job_ops amend_ops = {
    .type = JOB_TYPE_AMEND,
    .plain = true,
    .state_size = sizeof(struct amend_job),
    .co_run = amend_job_co_run,
    .co_clean = amend_job_co_clean,
    .release = amend_job_release,
};

/* What both drivers' options say. */
struct slot_options {
    enum luks_slot_state state;
    const char *new_secret;
    const char *old_secret;
    bool has_keyslot;
    uint64_t keyslot;
    bool has_iter_time;
    uint64_t iter_time;
};

#define SLOT_OPTIONS(o)                                                                            \
    ((struct slot_options){(o)->state, (o)->new_secret, (o)->old_secret, (o)->has_keyslot,         \
                           (o)->keyslot, (o)->has_iter_time, (o)->iter_time})

static int read_options(const struct amend_options *options, struct slot_options *ret,
                        struct error **err)
{
    if (options->driver == AMEND_DRIVER_LUKS) {
        *ret = SLOT_OPTIONS(&options->u.luks);
        return 0;
    }
    if (!options->u.qcow2.encrypt)
        return error_set(err, EINVAL, "'encrypt' is missing: there is nothing to amend");
    *ret = SLOT_OPTIONS(options->u.qcow2.encrypt);
    return 0;
}

static int take_secret(struct graph *g, const char *id, struct secret *value,
                       const struct secret **ret, struct error **err)
{
    int r = id ? secrets_get(graph_secrets(g), id, value, err) : 0;

    if (id && r == 0)
        *ret = value;
    return r;
}

static int take_options(struct amend_job *a, struct graph *g, const struct amend_keys_request *req,
                        struct error **err)
{
    struct slot_options o = {.new_secret = NULL};
    int r = read_options(req->options, &o, err);

    if (r < 0)
        return r;
    a->amend = (struct luks_amend){
        .activate = o.state == LUKS_SLOT_STATE_ACTIVE,
        .has_slot = o.has_keyslot,
        .slot = (unsigned)o.keyslot,
        .has_iter_ms = o.has_iter_time,
        .iter_ms = o.iter_time,
        .force = req->force,
    };
    r = take_secret(g, o.new_secret, &a->new_secret, &a->amend.new_secret, err);
    return r < 0 ? r : take_secret(g, o.old_secret, &a->old_secret, &a->amend.old_secret, err);
}

static int co_fn control_fn take_node(struct amend_job *a, struct graph *g,
                                      const struct amend_keys_request *req, struct error **err)
{
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE_UNCHANGED | ACCESS_WRITE,
                            .tolerates = ACCESS_ALL};
    const char *driver = req->options->driver == AMEND_DRIVER_LUKS ? "luks" : "qcow2";
    struct node *node;
    int r = graph_need(g, req->node_name, &node, err);

    if (r == 0 && strcmp(node_driver(node)->name, driver) != 0)
        return error_set(err, EINVAL, "node '%s' is of driver '%s', not '%s'", req->node_name,
                         node_driver(node)->name, driver);
    return r < 0 ? r : backend_co_new(&a->backend, g, req->node_name, access, a->owner, err);
}

int amend_keys_co_start(struct jobs *jobs, struct graph *g, const struct amend_keys_request *req,
                        struct error **err)
{
    const struct job_options options = {.id = req->job_id, .auto_finalize = true};
    struct amend_job *a;
    struct job *job;
    int r = job_new(&job, jobs, &amend_ops, &options, err);

    if (r < 0)
        return r;
    a = job_state(job);
    a->owner = xasprintf("job '%s'", req->job_id);
    a->is_luks = req->options->driver == AMEND_DRIVER_LUKS;
    r = take_options(a, g, req, err);
    if (r == 0)
        r = take_node(a, g, req, err);
    if (r < 0)
        job_discard(job);
    else
        job_start(job);
    return r;
}
