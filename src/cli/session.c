/* SPDX-License-Identifier: Apache-2.0 */
/* The client library's errors become the tool's. */
#include "cli/session.h"
#include "cli/cli.h"

#include <errno.h>
#include <string.h>

static int convert(struct cairn_error *from, const char *what, struct error **err)
{
    int errnum = from->errnum;
    int r;

    if (what)
        r = error_set(err, errnum, "%s: %s", what, from->message);
    else
        r = error_set(err, errnum, "%s", from->message);
    cairn_error_clear(from);
    return r;
}

int session_open(struct cairn_client **ret, const char *path, struct error **err)
{
    struct cairn_error why = CAIRN_ERROR_INIT;

    if (cairn_client_open(ret, path, CLI_COMMAND_MS, &why) < 0)
        return convert(&why, NULL, err);
    return 0;
}

void session_close(struct cairn_client **c)
{
    *c = cairn_client_close(*c);
}

int session_command(struct cairn_client *c, const char *name, json_t *arguments, json_t **ret_value,
                    struct error **err)
{
    struct cairn_error why = CAIRN_ERROR_INIT;
    int r = cairn_client_command(c, name, arguments, CLI_COMMAND_MS, ret_value, &why);

    json_decref(arguments);
    return r < 0 ? convert(&why, r == -EREMOTEIO ? name : NULL, err) : 0;
}

int session_wait_for_jobs(struct cairn_client *c, int timeout_ms, struct error **err)
{
    struct cairn_error why = CAIRN_ERROR_INIT;
    json_t *event = NULL;
    int r = cairn_client_event(c, "JOB_STATUS_CHANGE", timeout_ms, &event, &why);

    json_decref(event);
    if (r == -ETIMEDOUT) {
        cairn_error_clear(&why);
        return 0;
    }
    if (r == -EINTR) {
        cairn_error_clear(&why);
        return cli_interrupted() ? cli_interrupted_error(err) : 0;
    }
    return r < 0 ? convert(&why, NULL, err) : 0;
}
