/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the simulator know of each other. */
#ifndef CAIRN_LOOP_SIM_INTERNAL_H
#define CAIRN_LOOP_SIM_INTERNAL_H

#include "loop/loop-internal.h"
#include "loop/sim/sim.h"

extern const struct engine engine_sim;

enum sim_task_state {
    TASK_RUNNABLE,
    TASK_POLLING,  /* until woken, a completion, or the deadline */
    TASK_STARTING, /* until `awaited` has reported */
    TASK_JOINING,  /* until `awaited` has ended */
    TASK_ENDED,
};

/* A simulated thread: a stack, and mostly a loop that runs on it. */
struct sim_task {
    struct list link; /* sim.tasks, in order of creation */
    unsigned number;
    char name[16];
    struct fiber fiber;
    void *map;
    size_t map_size;
    struct fiber *resume; /* where it goes on */
    struct loop *self;    /* loop_self() there */
    struct loop *loop;    /* between engine start and stop */
    enum sim_task_state state;
    uint64_t deadline_ns;
    uint64_t stalled_until_ns;
    bool woken;
    bool reported;
    struct sim_task *awaited;
    struct loop_thread *thread; /* what it runs; NULL: the main loop */
    struct list done;           /* sim_io: to be completed by its next poll */
};

/* What faults make of one operation. */
struct sim_strike {
    int error; /* negative errno, or 0 */
    bool cut_short;
    bool hang;
    bool late;
    bool sync_drops;
    bool reset;
    bool half_open;
    uint64_t delay_ns;
};

/* An operation on its way. */
struct sim_io {
    struct list link; /* sim.ios, or the task's `done` */
    struct timer timer;
    struct io_op *op;
    struct sim_task *task;
    uint64_t number;
    struct sim_strike strike;
    bool hung;
    bool done;
    int64_t result;
    /* Of the disk. */
    struct sim_file *file;
    struct sim_file *source; /* IO_COPY */
    uint64_t mark;           /* IO_SYNC: the newest change when it was submitted */
    char *name;              /* for faults and reports */
    /* The effect, at the time of the timer: finishes the io. NULL: something else will. */
    void (*effect)(struct sim_io *io);
};

struct sim {
    struct sim_options options;
    struct prng prng;        /* what happens next */
    struct prng random_prng; /* loop_random() */
    uint64_t now_ns;
    uint64_t hash;
    uint64_t steps;
    uint64_t io_count;
    uint64_t file_ops;
    struct timer_heap events;
    struct list tasks;
    unsigned task_count;
    struct sim_task *running;
    struct fiber scheduler;
    struct list ios; /* neither done nor complete */
    struct list faults;
    struct sim_disk *disk;
    bool killed;
    bool verbose;
    /* The network. */
    struct list listeners;
    struct list connections;
    unsigned next_port;
};

/* The first of January 2026. */
#define SIM_WALL_OFFSET_NS ((uint64_t)1767225600 * NS_PER_S)

/* The run under way. */
struct sim *sim_self(void);

enum sim_trace_kind {
    TRACE_SWITCH,
    TRACE_SUBMIT,
    TRACE_EFFECT,
    TRACE_COMPLETE,
    TRACE_CANCEL,
    TRACE_CUT
};

/* Adds to the trace hash (S4): numbers, never addresses. */
void sim_trace(enum sim_trace_kind kind, uint64_t a, uint64_t b, uint64_t c);
uint64_t sim_hash_bytes(uint64_t hash, const void *data, size_t len);

bool sim_chance(unsigned per_mille);
uint64_t sim_between(uint64_t low, uint64_t high);

/* An operation of the running task, which goes on until sim_io_finish(). */
struct sim_io *sim_io_new(struct io_op *op, const char *name);
void sim_io_finish(struct sim_io *io, int64_t result);
void sim_io_free(struct sim_io *io);
/* Runs the effect at that time. */
void sim_io_at(struct sim_io *io, uint64_t when_ns);

/* Counts the operation for all faults that apply and says which strike. */
struct sim_strike sim_strike(enum io_op_kind kind, const char *name);
/* Whether any fault could strike; counts nothing. */
bool sim_fault_watches(enum io_op_kind kind, const char *name);

/* The disk (sim-file.c). */
int64_t sim_file_inline_rw(struct file *f, bool write, uint64_t offset, const struct iovec *iov,
                           int iov_count);
bool sim_file_try_inline(struct io_op *op);
void sim_file_submit(struct io_op *op);
void sim_file_cancel(struct sim_io *io);
void sim_file_close(struct file *f);
/* The process has ended: what was under way in the kernel still happens, or not. */
void sim_file_settle(void);
void sim_file_close_all(void);

/* The network (sim-net.c). */
void sim_net_submit(struct io_op *op);
void sim_net_cancel(struct sim_io *io);
int64_t sim_net_try_send(struct socket *s, const struct iovec *iov, int iov_count);
int64_t sim_net_try_recv(struct socket *s, void *buf, size_t len);
void sim_net_shutdown(struct socket *s);
void sim_net_close(struct socket *s);
/* Lets a connection operation that hung try again. */
void sim_net_unhang(struct sim_io *io);
void sim_net_process_ended(void);

#endif
