/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The demo's writer: writes stamped blocks (proof.h) over NBD into given places of a disk, without
 * end, and logs when each write was submitted and when it was acknowledged.
 *
 *   writer --init FILE BLOCKS
 *       makes a file of that many blocks, all with sequence 0.
 *   writer --unix SOCKET --export NAME --list LIST --log LOG [--depth N] [--rate N] [--seed N]
 *       writes. Line n of LIST (from 0) is the place of block n in the disk, in blocks.
 *
 * It obeys words on its standard input, and answers each with a line of JSON on its standard output:
 *
 *   phase NAME   begins a phase; tells the figures of the one that ends
 *   status       tells how much was written
 *   pause        submits no more; answers when all is acknowledged
 *   resume       goes on
 *   stop         as pause, tells the figures, and ends; so does the end of the input
 *
 * In each phase all writes but one of 64 go to another sixteenth of the blocks, at random; those go
 * anywhere. A block never has two writes under way, so that their order is known.
 *
 * With --rate, latency counts from when a write was due: a slow disk cannot slow the asking.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "histogram.h"
#include "load.h"
#include "proof.h"

#define MAX_DEPTH         256u
#define MAX_BLOCKS        (1u << 24)
#define TIMEOUT_NS        60000000000u
#define LISTEN_NS         2000000u /* how often the standard input is looked at */
#define LOG_PIECE_RECORDS 131072u  /* 4 MiB */
#define HOT_PART          16u
#define TRIES             64 /* for a block without a write under way */

struct log {
    int fd;
    struct proof_record **pieces;
    uint64_t n_pieces;
    uint64_t count; /* records, the head too: that is the next sequence */
};

enum writer_state { WRITER_GOES, WRITER_PAUSES, WRITER_PAUSED, WRITER_STOPS };

struct writer {
    /* Set before it runs. */
    uint64_t *places;
    uint64_t blocks;
    uint64_t rate;
    uint8_t *data; /* a block for each slot */

    struct log log;
    uint64_t sequences[MAX_DEPTH]; /* what each slot writes */
    bool *busy;                    /* by block: a write is under way */
    uint64_t random;
    enum writer_state state;
    uint64_t rate_start_ns;
    uint64_t rate_issued;
    uint64_t submitted;
    uint64_t acknowledged;
    bool failed; /* the log could not grow */

    /* The phase. */
    char phase[32];
    uint64_t phase_ns;
    uint64_t hot;
    uint64_t last_ack_ns;
    uint64_t gap_ns; /* the longest time without an answer */
    struct histogram latency;

    char input[256];
    size_t input_len;
};

/* Log */

/* Returns the record of a sequence; its piece is mapped. */
static struct proof_record *log_record(const struct log *log, uint64_t sequence)
{
    return &log->pieces[sequence / LOG_PIECE_RECORDS][sequence % LOG_PIECE_RECORDS];
}

static int log_grow(struct log *log)
{
    const size_t bytes = LOG_PIECE_RECORDS * sizeof(struct proof_record);
    off_t at = (off_t)(log->n_pieces * bytes);
    struct proof_record **pieces;
    void *piece;
    /* Space is taken before it is mapped: a store to a full disk would kill us. */
    int r = posix_fallocate(log->fd, at, (off_t)bytes);

    if (r != 0)
        return -r;
    pieces = realloc(log->pieces, (log->n_pieces + 1) * sizeof(struct proof_record *));
    if (pieces == NULL)
        return -ENOMEM;
    log->pieces = pieces;
    piece = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, log->fd, at);
    if (piece == MAP_FAILED)
        return -errno;
    log->pieces[log->n_pieces++] = piece;
    return 0;
}

static int log_open(struct log *log, const char *path, uint64_t blocks)
{
    struct proof_log_head head = {
        .magic = PROOF_LOG_MAGIC,
        .version = PROOF_LOG_VERSION,
        .record_bytes = sizeof(struct proof_record),
        .blocks = blocks,
    };
    int r;

    log->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (log->fd < 0)
        return -errno;
    r = log_grow(log);
    if (r < 0)
        return r;
    memcpy(log_record(log, 0), &head, sizeof(head));
    log->count = 1;
    return 0;
}

static bool log_has_room(struct log *log)
{
    return log->count < log->n_pieces * LOG_PIECE_RECORDS || log_grow(log) == 0;
}

/* Room must have been made. Returns the sequence. */
static uint64_t log_submit(struct log *log, uint64_t block, uint64_t now_ns)
{
    uint64_t sequence = log->count++;
    struct proof_record *record = log_record(log, sequence);

    record->sequence = sequence;
    record->block = block;
    __atomic_store_n(&record->submit_ns, now_ns, __ATOMIC_RELEASE);
    return sequence;
}

static void log_acknowledge(struct log *log, uint64_t sequence, uint64_t now_ns)
{
    __atomic_store_n(&log_record(log, sequence)->ack_ns, now_ns, __ATOMIC_RELEASE);
}

/* Says that there was no write up to now. */
static void writer_mark(struct writer *w)
{
    uint64_t now = clock_now_ns();

    if (log_has_room(&w->log))
        log_acknowledge(&w->log, log_submit(&w->log, PROOF_MARK, now), now);
    else
        w->failed = true;
}

/* Phases */

static void phase_begin(struct writer *w, const char *name, uint64_t now_ns)
{
    uint64_t part = w->blocks / HOT_PART;

    (void)snprintf(w->phase, sizeof(w->phase), "%s", name); /* cut short if it is too long */
    w->phase_ns = now_ns;
    w->last_ack_ns = now_ns;
    w->gap_ns = 0;
    w->hot = part > 0 ? random_below(&w->random, HOT_PART) * part : 0;
    memset(&w->latency, 0, sizeof(w->latency));
}

static void phase_print(const struct writer *w, uint64_t now_ns)
{
    const struct histogram *h = &w->latency;

    printf("{\"phase\": \"%s\", \"seconds\": %.6f, \"writes\": %" PRIu64
           ", \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, \"longest_gap_us\": %.1f}\n",
           w->phase, (double)(now_ns - w->phase_ns) / 1e9, h->count,
           histogram_percentile(h, 0.5) / 1e3, histogram_percentile(h, 0.99) / 1e3,
           (double)h->max_ns / 1e3, (double)w->gap_ns / 1e3);
    (void)fflush(stdout); /* if nobody reads, the input ends too */
}

static void status_print(const struct writer *w)
{
    printf("{\"submitted\": %" PRIu64 ", \"acknowledged\": %" PRIu64 "}\n", w->submitted,
           w->acknowledged);
    (void)fflush(stdout);
}

static void rate_restart(struct writer *w, uint64_t now_ns)
{
    w->rate_start_ns = now_ns;
    w->rate_issued = 0;
}

/* Workload */

static uint64_t due_ns(const struct writer *w)
{
    return w->rate_start_ns + (uint64_t)((double)w->rate_issued * 1e9 / (double)w->rate);
}

/* Returns a block without a write under way, or UINT64_MAX. */
static uint64_t writer_choose(struct writer *w)
{
    for (int i = 0; i < TRIES; i++) {
        uint64_t part = w->blocks / HOT_PART;
        bool anywhere = part == 0 || random_below(&w->random, 64) == 0;
        uint64_t block = anywhere ? random_below(&w->random, w->blocks)
                                  : w->hot + random_below(&w->random, part);

        if (!w->busy[block])
            return block;
    }
    return UINT64_MAX;
}

static bool writer_next(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    struct writer *w = l->state;
    size_t slot = (size_t)(s - c->slots);
    uint64_t block;

    if (w->state != WRITER_GOES || w->failed || (w->rate > 0 && due_ns(w) > now_ns))
        return false;
    block = writer_choose(w);
    if (block == UINT64_MAX)
        return false;
    if (!log_has_room(&w->log)) {
        w->failed = true;
        return false;
    }
    if (w->rate > 0) {
        s->start_ns = due_ns(w);
        w->rate_issued++;
    }
    w->busy[block] = true;
    w->sequences[slot] = log_submit(&w->log, block, now_ns);
    w->submitted++;
    s->command = NBD_CMD_WRITE;
    s->offset = w->places[block] * PROOF_BLOCK_BYTES;
    s->length = PROOF_BLOCK_BYTES;
    s->data = w->data + slot * PROOF_BLOCK_BYTES;
    proof_block_fill(s->data, block, w->sequences[slot]);
    return true;
}

static int writer_done(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    struct writer *w = l->state;
    uint64_t sequence = w->sequences[s - c->slots];

    if (s->error != 0) {
        fprintf(stderr, "writer: write %" PRIu64 " at %" PRIu64 ": the server answers error %u\n",
                sequence, s->offset, s->error);
        return -EIO;
    }
    log_acknowledge(&w->log, sequence, now_ns);
    w->busy[log_record(&w->log, sequence)->block] = false;
    w->acknowledged++;
    if (now_ns - w->last_ack_ns > w->gap_ns)
        w->gap_ns = now_ns - w->last_ack_ns;
    w->last_ack_ns = now_ns;
    histogram_add(&w->latency, now_ns - s->start_ns);
    return 0;
}

/* Control */

static int writer_obey(struct writer *w, const char *line, uint64_t now_ns)
{
    if (strncmp(line, "phase ", 6) == 0) {
        phase_print(w, now_ns);
        phase_begin(w, line + 6, now_ns);
    } else if (strcmp(line, "status") == 0) {
        status_print(w);
    } else if (strcmp(line, "pause") == 0) {
        w->state = WRITER_PAUSES;
    } else if (strcmp(line, "resume") == 0) {
        writer_mark(w);
        rate_restart(w, now_ns);
        w->last_ack_ns = now_ns;
        w->state = WRITER_GOES;
        status_print(w);
    } else if (strcmp(line, "stop") == 0) {
        w->state = WRITER_STOPS;
    } else {
        fprintf(stderr, "writer: unknown command '%s'\n", line);
        return -EINVAL;
    }
    return 0;
}

/* Obeys the whole lines that have come. */
static int writer_listen(struct writer *w, uint64_t now_ns)
{
    ssize_t n = read(STDIN_FILENO, w->input + w->input_len, sizeof(w->input) - w->input_len);
    char *end;
    int r = 0;

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0) {
        w->state = WRITER_STOPS;
        return 0;
    }
    w->input_len += (size_t)n;
    while (r == 0 && (end = memchr(w->input, '\n', w->input_len)) != NULL) {
        size_t used = (size_t)(end - w->input) + 1;

        *end = '\0';
        r = writer_obey(w, w->input, now_ns);
        memmove(w->input, w->input + used, w->input_len - used);
        w->input_len -= used;
    }
    if (r == 0 && w->input_len == sizeof(w->input)) {
        fprintf(stderr, "writer: a command is longer than %zu bytes\n", sizeof(w->input));
        return -EINVAL;
    }
    return r;
}

static int writer_round(struct load *l, uint64_t now_ns, uint64_t *ret_wake_ns)
{
    struct writer *w = l->state;
    int r = w->state == WRITER_STOPS ? 0 : writer_listen(w, now_ns);

    if (r < 0)
        return r;
    if (w->failed) {
        fprintf(stderr, "writer: the log cannot grow\n");
        return -ENOSPC;
    }
    if (w->state == WRITER_PAUSES && l->in_flight == 0) {
        w->state = WRITER_PAUSED;
        writer_mark(w);
        status_print(w);
    }
    if (w->state == WRITER_STOPS && l->in_flight == 0) {
        writer_mark(w);
        phase_print(w, now_ns);
        return w->failed ? -ENOSPC : 1;
    }
    *ret_wake_ns = now_ns + LISTEN_NS;
    if (w->state == WRITER_GOES && w->rate > 0 && l->in_flight < l->depth &&
        due_ns(w) < *ret_wake_ns)
        *ret_wake_ns = due_ns(w);
    return 0;
}

static const struct load_workload writer_workload = {
    .next = writer_next,
    .done = writer_done,
    .round = writer_round,
};

/* Beginning */

static int init_file(const char *path, const char *count)
{
    char *end;
    uint64_t blocks = strtoull(count, &end, 10);
    uint8_t data[PROOF_BLOCK_BYTES];
    FILE *file;
    int r = 0;

    if (*end != '\0' || blocks == 0 || blocks > MAX_BLOCKS) {
        fprintf(stderr, "writer: '%s' is no number of blocks from 1 to %u\n", count, MAX_BLOCKS);
        return 2;
    }
    file = fopen(path, "wbx");
    if (file == NULL) {
        fprintf(stderr, "writer: cannot make '%s': %s\n", path, strerror(errno));
        return 1;
    }
    for (uint64_t block = 0; block < blocks && r == 0; block++) {
        proof_block_fill(data, block, 0);
        r = fwrite(data, sizeof(data), 1, file) == 1 ? 0 : -1;
    }
    if (fclose(file) != 0 || r < 0) {
        fprintf(stderr, "writer: cannot write '%s': %s\n", path, strerror(errno));
        return 1;
    }
    return 0;
}

static int read_list(struct writer *w, const char *path)
{
    FILE *file = fopen(path, "r");
    unsigned long long place;

    if (file == NULL) {
        fprintf(stderr, "writer: cannot open '%s': %s\n", path, strerror(errno));
        return -1;
    }
    w->places = calloc(MAX_BLOCKS, sizeof(*w->places));
    while (w->places != NULL && w->blocks < MAX_BLOCKS && fscanf(file, "%llu\n", &place) == 1)
        w->places[w->blocks++] = place;
    if (w->blocks == 0 || !feof(file)) {
        fprintf(stderr, "writer: '%s', line %" PRIu64 ": no number of a block\n", path,
                w->blocks + 1);
        w->blocks = 0;
    }
    (void)fclose(file); /* only read */
    return w->blocks > 0 ? 0 : -1;
}

/* Every write must lie in the disk. */
static int check_places(const struct writer *w, uint64_t size_bytes)
{
    for (uint64_t block = 0; block < w->blocks; block++)
        if (w->places[block] >= size_bytes / PROOF_BLOCK_BYTES) {
            fprintf(stderr, "writer: block %" PRIu64 " of the list lies beyond the disk's end\n",
                    block);
            return -1;
        }
    return 0;
}

static const char usage[] =
    "usage: writer --init FILE BLOCKS\n"
    "       writer --unix SOCKET --export NAME --list LIST --log LOG [options]\n"
    "  --depth N   writes under way (default 16)\n"
    "  --rate N    writes per second; 0, the default: as fast as they are answered\n"
    "  --seed N    for the choice of blocks (default 1)\n"
    "it obeys 'phase NAME', 'status', 'pause', 'resume' and 'stop' on its standard input\n";

struct settings {
    const char *list;
    const char *log;
    uint64_t depth;
    uint64_t rate;
    uint64_t seed;
};

/* Takes one option and its value. */
static int set_option(struct settings *set, struct nbd_target *target, const char *name,
                      const char *value)
{
    uint64_t *number = NULL;
    char *end;

    if (strcmp(name, "--unix") == 0)
        target->unix_path = value;
    else if (strcmp(name, "--export") == 0)
        target->export_name = value;
    else if (strcmp(name, "--list") == 0)
        set->list = value;
    else if (strcmp(name, "--log") == 0)
        set->log = value;
    else if (strcmp(name, "--depth") == 0)
        number = &set->depth;
    else if (strcmp(name, "--rate") == 0)
        number = &set->rate;
    else if (strcmp(name, "--seed") == 0)
        number = &set->seed;
    else
        return -1;
    if (number == NULL)
        return 0;
    *number = strtoull(value, &end, 10);
    return *value >= '0' && *value <= '9' && *end == '\0' ? 0 : -1;
}

static int run(struct load *l, struct writer *w, const struct settings *set)
{
    int r;

    w->rate = set->rate;
    w->random = set->seed * 2 + 1;
    l->depth = (unsigned)set->depth;
    if (read_list(w, set->list) < 0)
        return 1;
    w->busy = calloc(w->blocks, sizeof(*w->busy));
    w->data = malloc((size_t)MAX_DEPTH * PROOF_BLOCK_BYTES);
    if (w->busy == NULL || w->data == NULL) {
        fprintf(stderr, "writer: no memory\n");
        return 1;
    }
    r = log_open(&w->log, set->log, w->blocks);
    if (r < 0) {
        fprintf(stderr, "writer: cannot make the log '%s': %s\n", set->log, strerror(-r));
        return 1;
    }
    if (load_open(l) < 0 || check_places(w, l->export.size_bytes) < 0)
        return 1;
    /* Asked now and then between writes. */
    if (fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK) < 0) {
        fprintf(stderr, "writer: cannot listen: %s\n", strerror(errno));
        return 1;
    }
    phase_begin(w, "start", clock_now_ns());
    rate_restart(w, w->phase_ns);
    return load_run(l) < 0 ? 1 : 0;
}

int main(int argc, char **argv)
{
    static struct writer w = {.state = WRITER_GOES};
    struct load l = {.epoll_fd = -1,
                     .n_conns = 1,
                     .timeout_ns = TIMEOUT_NS,
                     .workload = &writer_workload,
                     .state = &w};
    struct settings set = {.depth = 16, .seed = 1};
    int status;

    if (argc == 4 && strcmp(argv[1], "--init") == 0)
        return init_file(argv[2], argv[3]);
    for (int i = 1; i < argc; i += 2)
        if (i + 1 == argc || set_option(&set, &l.target, argv[i], argv[i + 1]) < 0) {
            fprintf(stderr, "writer: cannot use '%s'\n%s", argv[i], usage);
            return 2;
        }
    if (l.target.unix_path == NULL || l.target.export_name == NULL || set.list == NULL ||
        set.log == NULL || set.depth == 0 || set.depth > MAX_DEPTH || set.rate > 10000000) {
        (void)fputs(usage, stderr); /* the exit status tells too */
        return 2;
    }
    status = run(&l, &w, &set);
    load_close(&l);
    return status;
}
