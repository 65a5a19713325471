/* SPDX-License-Identifier: Apache-2.0 */
/* What a daemon is to its host: process, process id file, limits, signals, log. */
#ifndef CAIRN_DAEMON_PROCESS_H
#define CAIRN_DAEMON_PROCESS_H

#include "base/error.h"

/*
 * First of all: descriptors 0 to 2 that are closed are taken, so that no disk becomes one of them and gets what is printed. Using them
 * fails as before.
 */
void process_hold_standard_streams(void);

/* Log lines go to standard error, each after this name. The name is borrowed. */
void process_log_to_stderr(const char *program);

/* How many threads serve clients where nobody says it: a few, not more than there are processors for this process. */
unsigned process_usual_io_threads(void);

/* As many open files as the host allows. */
void process_raise_limits(void);

/*
 * The callers' errors say by which option it was asked for.
 *
 * Goes to the background: the caller goes on in a new process, and the old one waits. It ends with status 0 at
 * process_detach(), with status 1 if the new one ends before. No thread runs yet. The new process still has the standard
 * error of the old one, for what goes wrong.
 */
int process_daemonize(struct error **err);
/* All is done: lets the old process end, and gives up the standard streams. Nothing if there was none. */
void process_detach(void);

/*
 * Writes the process id into a file, which is locked as long as the process lives: -EAGAIN if another one has it.
 * process_remove_pidfile() removes it.
 */
int process_write_pidfile(const char *path, struct error **err);
void process_remove_pidfile(void);

/* SIGTERM, SIGINT and SIGHUP (but not where the caller ignores it) are blocked in this thread and all that it starts, SIGPIPE and SIGXFSZ
 * are ignored. */
void process_block_signals(void);

/* Calls fn(arg), on a thread of its own, at the first of these signals. More of them do nothing. */
typedef void process_signal_fn(int signal, void *arg);
int process_watch_signals(process_signal_fn *fn, void *arg, struct error **err);
/* fn is not called any more. */
void process_unwatch_signals(void);

#endif
