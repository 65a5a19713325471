/* SPDX-License-Identifier: Apache-2.0 */
/* What a daemon is to its host. */
#include "daemon/process.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/log.h"
#include "base/macros.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define IO_THREADS_USUAL 4

static const char *log_name;

/* One write: lines of several threads do not mix. */
static void log_to_stderr(enum log_level level, const char *line)
{
    char text[1200];
    int len;

    len = snprintf(text, sizeof(text), "%s: %s%s\n", log_name,
                   level == LOG_WARNING ? "warning: " : "", line);
    if (len > 0)
        (void)!write(STDERR_FILENO, text,
                     MIN((size_t)len, sizeof(text) - 1)); /* nowhere to complain */
}

void process_hold_standard_streams(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        bool is_open = fcntl(fd, F_GETFD) >= 0 || errno != EBADF;

        /* The lowest free number is the one that it gets. */
        if (!is_open && open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            _exit(1); /* there is nobody to tell */
    }
}

void process_log_to_stderr(const char *program)
{
    log_name = program;
    log_set_hook(log_to_stderr, LOG_INFO);
}

unsigned process_usual_io_threads(void)
{
    cpu_set_t cpus;
    int count = sched_getaffinity(0, sizeof(cpus), &cpus) < 0 ? 1 : CPU_COUNT(&cpus);

    return MIN((unsigned)count, (unsigned)IO_THREADS_USUAL);
}

void process_raise_limits(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit); /* then the lower limit holds */
    }
}

/* The end of a pipe to the process that waits, or -1. */
static int waiting_fd = -1;

/* In the old process: never returns. */
static void __attribute__((noreturn)) wait_for_detach(int fd, pid_t child)
{
    char c;
    ssize_t n;
    int status;

    do {
        n = read(fd, &c, 1);
    } while (n < 0 && errno == EINTR);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ; /* it only made the daemon, and ended */
    _exit(n == 1 ? 0 : 1);
}

int process_daemonize(struct error **err)
{
    int fds[2];
    pid_t pid;

    if (pipe2(fds, O_CLOEXEC) < 0)
        return error_set(err, errno, "cannot make a pipe: %s", strerror(errno));
    pid = fork();
    if (pid < 0) {
        int errnum = errno;

        close(fds[0]);
        close(fds[1]);
        return error_set(err, errnum, "cannot make a process: %s", strerror(errnum));
    }
    if (pid > 0) {
        close(fds[1]);
        wait_for_detach(fds[0], pid);
    }
    close(fds[0]);
    (void)setsid(); /* a new process leads no group: this cannot fail */
    /* One that leads no session gets no controlling terminal, whatever it opens. */
    pid = fork();
    if (pid < 0)
        return error_set(err, errno, "cannot make a process: %s", strerror(errno));
    if (pid > 0)
        _exit(0);
    waiting_fd = fds[1];
    return 0;
}

void process_detach(void)
{
    int null;

    if (waiting_fd < 0)
        return;
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = STDIN_FILENO; null >= 0 && fd <= STDERR_FILENO; fd++)
        (void)dup2(null, fd); /* of open descriptors: cannot fail */
    if (null > STDERR_FILENO)
        close(null);
    (void)!write(waiting_fd, "", 1); /* if nobody waits any more, nobody needs it */
    close(waiting_fd);
    waiting_fd = -1;
}

static char *pidfile_path; /* absolute */
static int pidfile_fd = -1;

static int open_locked(const char *path, struct error **err)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);

    if (fd < 0)
        return error_set(err, errno, "%s", strerror(errno));
    if (fcntl(fd, F_SETLK, &lock) < 0) {
        int errnum = errno;

        close(fd);
        if (errnum == EAGAIN || errnum == EACCES)
            return error_set(err, EAGAIN, "another process has it");
        return error_set(err, errnum, "cannot lock it: %s", strerror(errnum));
    }
    return fd;
}

int process_write_pidfile(const char *path, struct error **err)
{
    char text[32];
    int len = snprintf(text, sizeof(text), "%ld\n", (long)getpid());
    int fd = open_locked(path, err);

    if (fd < 0)
        return fd;
    if (ftruncate(fd, 0) < 0 || pwrite(fd, text, (size_t)len, 0) != len) {
        int errnum = errno;

        (void)unlink(path); /* what it holds is of no use */
        close(fd);
        return error_set(err, errnum, "cannot write it: %s", strerror(errnum));
    }
    pidfile_fd = fd;
    pidfile_path = xstrdup(path);
    return 0;
}

void process_remove_pidfile(void)
{
    if (!pidfile_path)
        return;
    (void)unlink(pidfile_path); /* gone already is as good */
    close(pidfile_fd); /* after that: who waits for the lock finds a file of another name */
    free(pidfile_path);
    pidfile_path = NULL;
}

static sigset_t ending_signals(void)
{
    struct sigaction old;
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    if (sigaction(SIGHUP, NULL, &old) < 0 || old.sa_handler != SIG_IGN) /* nohup wants it ignored */
        sigaddset(&set, SIGHUP);
    return set;
}

void process_block_signals(void)
{
    sigset_t set = ending_signals();

    pthread_sigmask(SIG_BLOCK, &set, NULL);
    (void)signal(SIGPIPE, SIG_IGN); /* who sends sees EPIPE */
    (void)signal(SIGXFSZ, SIG_IGN); /* who writes sees EFBIG */
}

static struct {
    pthread_t thread;
    process_signal_fn *fn;
    void *arg;
    bool ending; /* atomic */
} watch;

static void *watch_main(void *unused)
{
    sigset_t set = ending_signals();
    bool told = false;
    int signal;

    (void)unused;
    while (sigwait(&set, &signal) == 0 && !atomic_get(&watch.ending)) {
        if (!told)
            watch.fn(signal, watch.arg);
        told = true;
    }
    return NULL;
}

int process_watch_signals(process_signal_fn *fn, void *arg, struct error **err)
{
    int r;

    watch.fn = fn;
    watch.arg = arg;
    r = pthread_create(&watch.thread, NULL, watch_main, NULL);
    return r ? error_set(err, r, "cannot start a thread: %s", strerror(r)) : 0;
}

void process_unwatch_signals(void)
{
    atomic_set(&watch.ending, true);
    (void)pthread_kill(watch.thread, SIGTERM); /* it waits for this */
    pthread_join(watch.thread, NULL);
}
