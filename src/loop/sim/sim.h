/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated machine that tests run the whole engine on: several loops in one thread, virtual time, a seeded choice of
 * all that could happen next, a disk that loses what was not flushed, and a network that cuts and stalls.
 *
 *     struct sim_options o;
 *     sim_options_init(&o, seed);
 *     sim_run(&o, body, arg);           body is a coroutine; loop_thread_start() makes further loops
 *
 * The same seed gives the same run, to the last choice (S4): sim_trace_hash() tells. In builds with sim points each atomic
 * is a place where another loop may go on (T1). CAIRN_SIM_TRACE=1 in the environment prints the choices.
 */
#ifndef CAIRN_LOOP_SIM_SIM_H
#define CAIRN_LOOP_SIM_SIM_H

#include "base/context.h"
#include "base/list.h"
#include "base/prng.h"
#include "loop/file.h"
#include "loop/loop.h"
#include "loop/op.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sim_disk;

/* ---- faults (S5) ---- */

#define SIM_OP(kind) (1u << (kind)) /* of enum io_op_kind */
#define SIM_ANY_OP   UINT32_MAX

enum sim_fault_kind {
    SIM_ERROR, /* the operation fails with `error`; a failed write may have happened in part */
    SIM_SHORT, /* a transfer of less than was asked for, at least one byte */
    SIM_HANG, /* it never ends, cancelled or not, until sim_unhang(); a connect ends at its deadline */
    SIM_DELAY, /* it takes delay_ns longer */
    SIM_LATE,  /* it takes no notice of being cancelled and completes in its own time */
    SIM_SYNC_DROPS, /* a sync fails with -EIO and part of what was unflushed is gone for ever; the next sync succeeds */
    SIM_RESET, /* sockets: the connection is reset */
    SIM_HALF_OPEN, /* sockets: from here on nothing arrives any more, in either direction, and nobody is told */
};

/*
 * A fault, in memory of the test's own that stays until the fault is removed or the run ends. It strikes operations of
 * `ops` on names that match.
 */
struct sim_fault {
    /* Set by the test. */
    const char *
        name; /* pattern as for fnmatch(3): of a path, "unix:PATH" or "HOST:PORT" as listened on; NULL: all */
    uint32_t ops; /* SIM_OP()s; 0: all */
    enum sim_fault_kind kind;
    int error; /* positive errno */
    uint64_t delay_ns;
    uint64_t at;        /* from the k-th such operation on, counted from 1; 0: by chance */
    uint64_t times;     /* how often at most; 0: once with `at`, else without limit */
    unsigned per_mille; /* without `at`: the chance of each */

    /* For the test to read. */
    uint64_t seen;  /* operations that it applied to */
    uint64_t fired; /* those that it struck */

    struct list link;
};

void sim_fault_add(struct sim_fault *f);
void sim_fault_remove(struct sim_fault *f);

/* Lets operations that hang go on, on names that match (NULL: all); returns how many there were. */
unsigned sim_unhang(const char *name);

/* ---- running ---- */

/* Chances are per mille. */
struct sim_options {
    uint64_t seed;
    struct sim_disk *disk;     /* borrowed; NULL: an empty one for this run */
    struct sim_fault **faults; /* there from the start; may be NULL */
    size_t fault_count;

    unsigned
        preempt_per_mille; /* at each atomic, another loop goes on; needs a build with sim points */
    unsigned stall_per_mille; /* of those: the loop loses its CPU for up to stall_max_ns */
    uint64_t stall_max_ns;
    unsigned shuffle_per_mille; /* of ticks: ready coroutines run in a seeded order */

    unsigned
        inline_per_mille;     /* reads that the page cache answers at once; all I/O on tmpfs (L2) */
    unsigned short_per_mille; /* transfers of files and sockets that are short */
    unsigned
        cancel_per_mille; /* cancelled file I/O that ends early; the rest completes in its own time */
    unsigned
        writeback_per_mille; /* writes after which some older ones become durable by themselves */
    uint64_t disk_min_ns;    /* latencies */
    uint64_t disk_max_ns;
    uint64_t net_min_ns;
    uint64_t net_max_ns;

    /*
     * The run may end before main_fn does: killed, or in a deadlock, which otherwise is reported and aborts. What the
     * simulated process had allocated is leaked then, and hidden from the leak checker.
     */
    bool may_end_early;
    uint64_t kill_at_ns; /* virtual time of a SIGKILL; 0: none */
    uint64_t kill_at_op; /* it comes when the k-th file operation has been submitted; 0: never */

    uint64_t max_steps; /* scheduling steps after which a run counts as endless */
};

/* Sets all of it; many of the chances and latencies differ from seed to seed, so that seeds explore different worlds. */
void sim_options_init(struct sim_options *o, uint64_t seed);

enum sim_end { SIM_RETURNED, SIM_KILLED, SIM_DEADLOCK };

/*
 * Runs main_fn(arg) in a coroutine on the first loop of a simulated process, until it has returned. All other loops must
 * have been stopped by then. Operations that still hang are given up with the process.
 */
enum sim_end sim_run(const struct sim_options *o, co_entry_fn *main_fn, void *arg);

/* Ends the process here and now, as SIGKILL does. Needs may_end_early. */
void sim_kill(void) __attribute__((noreturn));

/* Of this run or the last: all choices, submissions and completions. */
uint64_t sim_trace_hash(void);
/* Of the last deadlock: who waits. Borrowed until the next run. */
const char *sim_report(void);
/* Virtual monotonic time of the run. */
uint64_t sim_now(void);
/* The seeded source of this run, for random tests. */
struct prng *sim_prng(void);
/* Takes the CPU from a loop until that time: it is silent although it has work. */
void sim_stall(struct loop *loop, uint64_t until_ns);

/* ---- the disk ---- */

/*
 * Files by absolute path. All directories exist. What is written becomes durable by sync, by a durable write, or by itself at
 * some time; names become durable by file_co_sync_dir() alone. file_co_resolve() sees those directories that hold files. The
 * disk outlives the runs on it.
 */
struct sim_disk *sim_disk_new(void);
/* Returns NULL; NULL is fine. */
struct sim_disk *sim_disk_free(struct sim_disk *d);

struct sim_file_setup {
    enum file_type type; /* FILE_TYPE_REGULAR or FILE_TYPE_BLOCK */
    uint64_t size;
    unsigned memory_align; /* for FILE_DIRECT; 0: 512 */
    unsigned offset_align;
    unsigned logical_block_size; /* of a block device; 0: 512 */
    bool tmpfs;                  /* I/O is inline memory copies (L2); no alignment */
    bool read_only;              /* opening for writing fails with -EROFS */
    bool no_punch;               /* punch and zero fail with -EOPNOTSUPP */
    bool no_copy;                /* copying to it, or from it, fails with -EOPNOTSUPP */
};

/* Makes a file, durable as its name is. Files that runs create are regular ones with alignment 512. */
void sim_disk_make(struct sim_disk *d, const char *path, const struct sim_file_setup *setup);

/* Look at and change content between runs or within one, as the running process sees it. -ENOENT. */
int64_t sim_disk_size(struct sim_disk *d, const char *path);
int sim_disk_read(struct sim_disk *d, const char *path, uint64_t offset, void *buf, size_t len);
/* Creates the file if it is not there; durable at once. */
void sim_disk_write(struct sim_disk *d, const char *path, uint64_t offset, const void *buf,
                    size_t len);
/* File operations submitted since the disk was made, to choose kill_at_op from. */
uint64_t sim_disk_ops(const struct sim_disk *d);

/*
 * The power fails, between runs: the disk comes back in one of the states that are possible then. Each unflushed write was
 * kept, dropped, or torn at 512 bytes, each by itself, and of each directory's unflushed name changes the first few happened.
 */
void sim_disk_power_cut(struct sim_disk *d, uint64_t seed);

/* ---- threads ---- */

/*
 * T2: from here on atomics of the calling thread spin or yield for a random while; seed 0 ends it. Needs a build with sim
 * points.
 */
void sim_install_random_spins(uint64_t seed);

#endif
