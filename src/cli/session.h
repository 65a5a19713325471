/* SPDX-License-Identifier: Apache-2.0 */
/* Talking to a daemon, with errors as the tool prints them. */
#ifndef CAIRN_CLI_SESSION_H
#define CAIRN_CLI_SESSION_H

#include "base/error.h"
#include "cairn/client.h"

/* `path` is a control socket. */
int session_open(struct cairn_client **ret, const char *path, struct error **err);
/* For AUTO(). */
void session_close(struct cairn_client **c);

/*
 * One command. Takes `arguments`, NULL for none. ret_value may be NULL. -EREMOTEIO: it is refused; *err names the command. -ENOENT:
 * what it names does not exist.
 */
int session_command(struct cairn_client *c, const char *name, json_t *arguments, json_t **ret_value,
                    struct error **err);

/*
 * Waits for a JOB_STATUS_CHANGE of any job, for at most that time; 0 also when there was none. -EINTR when a signal has come.
 */
int session_wait_for_jobs(struct cairn_client *c, int timeout_ms, struct error **err);

#endif
