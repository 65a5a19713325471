/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nbd-load: put load on an NBD server, or verify it, and print what was measured as one JSON
 * object.
 *
 * The measured window lies between two points of time; what is answered in it counts. The processor
 * time of the server (--server-pid) and our own are read at the same two points. The server's is
 * its process CPU clock: exact to the nanosecond, summed by the kernel over all threads, those that
 * have ended and io_uring's workers included.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "histogram.h"
#include "load.h"

#define MAX_CONNS   1024u
#define MAX_DEPTH   4096u
#define MAX_REQUEST (32u * 1024u * 1024u)

enum exit_status { EXIT_IO_ERRORS = 1, EXIT_FAILED = 2, EXIT_MISMATCH = 3 };

enum operation { OP_RANDREAD, OP_RANDWRITE, OP_RANDRW, OP_READ, OP_WRITE, OP_RW };

static const char *const operation_names[] = {
    [OP_RANDREAD] = "randread", [OP_RANDWRITE] = "randwrite", [OP_RANDRW] = "randrw",
    [OP_READ] = "read",         [OP_WRITE] = "write",         [OP_RW] = "rw",
};

struct settings {
    enum operation op;
    unsigned read_percent; /* of randrw, rw and --verify */
    uint32_t block_bytes;
    uint64_t stride_bytes; /* from one place to the next; 0: block_bytes */
    uint64_t size_bytes;   /* 0: the whole export */
    uint64_t warm_ns;
    uint64_t time_ns;
    uint64_t rate; /* requests per second, 0: as fast as they are answered */
    uint64_t seed;
    pid_t server_pid; /* 0: not asked for */
    bool verify;
};

enum bench_phase { BENCH_WARM, BENCH_MEASURE, BENCH_DRAIN };

struct bench {
    const struct settings *set;
    uint64_t blocks;
    uint8_t *data; /* what all writes send */
    uint64_t random;
    clockid_t server_clock;

    enum bench_phase phase;
    uint64_t warm_end_ns;
    uint64_t end_ns;
    uint64_t rate_start_ns;
    uint64_t issued; /* with a rate: requests so far */

    /* Of the measured window; the clocks hold their start until the window ends. */
    uint64_t window_ns;
    uint64_t server_cpu_ns;
    uint64_t own_cpu_ns;
    uint64_t n_sends;
    uint64_t n_recvs;
    uint64_t reads;
    uint64_t writes;
    uint64_t errors;
    uint64_t behind; /* with a rate: requests that were due and not issued at the end */
    struct histogram latency;
};

static uint64_t cpu_clock_ns(clockid_t id)
{
    struct timespec ts;

    if (clock_gettime(id, &ts) < 0)
        return 0; /* the process is gone: its connection tells */
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Window */

static void window_begin(struct load *l, struct bench *b, uint64_t now_ns)
{
    b->phase = BENCH_MEASURE;
    b->server_cpu_ns = b->set->server_pid > 0 ? cpu_clock_ns(b->server_clock) : 0;
    b->own_cpu_ns = cpu_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    b->n_sends = l->n_sends;
    b->n_recvs = l->n_recvs;
    b->window_ns = now_ns;
    b->end_ns = now_ns + b->set->time_ns;
}

static void window_end(struct load *l, struct bench *b, uint64_t now_ns)
{
    b->phase = BENCH_DRAIN;
    if (b->set->server_pid > 0)
        b->server_cpu_ns = cpu_clock_ns(b->server_clock) - b->server_cpu_ns;
    b->own_cpu_ns = cpu_clock_ns(CLOCK_PROCESS_CPUTIME_ID) - b->own_cpu_ns;
    b->n_sends = l->n_sends - b->n_sends;
    b->n_recvs = l->n_recvs - b->n_recvs;
    b->window_ns = now_ns - b->window_ns;
    if (b->set->rate > 0) {
        uint64_t due = (uint64_t)((double)(now_ns - b->rate_start_ns) / 1e9 * (double)b->set->rate);

        b->behind = due > b->issued ? due - b->issued : 0;
    }
}

/* Workload */

/* When the next request is due. Its latency counts from there: a slow server cannot slow the asking. */
static uint64_t due_ns(const struct bench *b)
{
    return b->rate_start_ns + (uint64_t)((double)b->issued * 1e9 / (double)b->set->rate);
}

static bool op_is_read(struct bench *b)
{
    switch (b->set->op) {
    case OP_RANDREAD:
    case OP_READ:
        return true;
    case OP_RANDWRITE:
    case OP_WRITE:
        return false;
    case OP_RANDRW:
    case OP_RW:
        return random_below(&b->random, 100) < b->set->read_percent;
    }
    return true;
}

static bool bench_next(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    struct bench *b = l->state;
    bool sequential = b->set->op >= OP_READ;
    bool read;

    if (b->phase == BENCH_DRAIN)
        return false;
    if (b->set->rate > 0) {
        uint64_t due = due_ns(b);

        if (due > now_ns)
            return false;
        s->start_ns = due;
        b->issued++;
    }
    read = op_is_read(b);
    s->command = read ? NBD_CMD_READ : NBD_CMD_WRITE;
    s->length = b->set->block_bytes;
    s->data = read ? NULL : b->data;
    if (sequential) {
        s->offset = c->position;
        c->position += b->set->stride_bytes;
        if (c->position >= b->blocks * b->set->stride_bytes)
            c->position = 0;
    } else {
        s->offset = random_below(&b->random, b->blocks) * b->set->stride_bytes;
    }
    return true;
}

static int bench_done(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    struct bench *b = l->state;

    if (s->error != 0 && b->errors++ == 0)
        fprintf(stderr,
                "nbd-load: connection %u: request at %" PRIu64
                ", %u bytes: the server answers error %u\n",
                c->index, s->offset, s->length, s->error);
    if (b->phase != BENCH_MEASURE)
        return 0;
    if (s->command == NBD_CMD_READ)
        b->reads++;
    else
        b->writes++;
    histogram_add(&b->latency, now_ns - s->start_ns);
    return 0;
}

static int bench_round(struct load *l, uint64_t now_ns, uint64_t *ret_wake_ns)
{
    struct bench *b = l->state;

    switch (b->phase) {
    case BENCH_WARM:
        if (now_ns >= b->warm_end_ns)
            window_begin(l, b, now_ns);
        *ret_wake_ns = b->warm_end_ns;
        break;
    case BENCH_MEASURE:
        if (now_ns >= b->end_ns)
            window_end(l, b, now_ns);
        *ret_wake_ns = b->end_ns;
        break;
    case BENCH_DRAIN:
        return l->in_flight == 0;
    }
    if (b->set->rate > 0 && l->in_flight < (uint64_t)l->n_conns * l->depth &&
        due_ns(b) < *ret_wake_ns)
        *ret_wake_ns = due_ns(b);
    return 0;
}

static const struct load_workload bench_workload = {
    .next = bench_next,
    .done = bench_done,
    .round = bench_round,
};

static void bench_print(const struct load *l, const struct bench *b)
{
    const struct settings *set = b->set;
    const struct histogram *h = &b->latency;
    double seconds = (double)b->window_ns / 1e9;
    double ios = (double)h->count;
    double per_io_us = ios > 0 ? 1.0 / ios / 1e3 : 0; /* from ns in all to us each */

    printf(
        "{\"op\": \"%s\", \"bs\": %u, \"depth\": %u, \"connections\": %u, \"structured\": %s, \"rate\": %" PRIu64
        ", \"seconds\": %.6f, \"ios\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"writes\": %" PRIu64
        ", \"errors\": %" PRIu64 ", \"behind\": %" PRIu64 ", \"iops\": %.1f, \"mb_per_s\": %.2f, ",
        operation_names[set->op], set->block_bytes, l->depth, l->n_conns,
        l->target.structured ? "true" : "false", set->rate, seconds, h->count, b->reads, b->writes,
        b->errors, b->behind, ios / seconds, ios * set->block_bytes / seconds / 1e6);
    printf(
        "\"latency_us\": {\"mean\": %.3f, \"p50\": %.3f, \"p99\": %.3f, \"p99.9\": %.3f, \"max\": %.3f}, ",
        (double)h->sum_ns * per_io_us, histogram_percentile(h, 0.5) / 1e3,
        histogram_percentile(h, 0.99) / 1e3, histogram_percentile(h, 0.999) / 1e3,
        (double)h->max_ns / 1e3);
    if (set->server_pid > 0)
        printf("\"server_cpu_us_per_io\": %.4f, \"server_cpu_seconds\": %.6f, ",
               (double)b->server_cpu_ns * per_io_us, (double)b->server_cpu_ns / 1e9);
    printf("\"client_cpu_us_per_io\": %.4f, \"client_cpu_seconds\": %.6f, \"sends\": %" PRIu64
           ", \"recvs\": %" PRIu64 "}\n",
           (double)b->own_cpu_ns * per_io_us, (double)b->own_cpu_ns / 1e9, b->n_sends, b->n_recvs);
}

/* Spreads the connections over the region: sequential streams must not run behind each other. */
static void place_connections(struct load *l, const struct bench *b)
{
    for (unsigned i = 0; i < l->n_conns; i++)
        l->conns[i].position = b->blocks * i / l->n_conns * b->set->stride_bytes;
}

static int run_bench(struct load *l, const struct settings *set)
{
    static struct bench b;
    int r;

    b.set = set;
    b.blocks = set->size_bytes / set->stride_bytes;
    b.random = set->seed | 1;
    b.data = malloc(set->block_bytes);
    if (b.data == NULL)
        return EXIT_FAILED;
    for (uint32_t i = 0; i < set->block_bytes; i++)
        b.data[i] = (uint8_t)random_next(&b.random);
    if (set->server_pid > 0 && clock_getcpuclockid(set->server_pid, &b.server_clock) != 0) {
        fprintf(stderr, "nbd-load: there is no process %d\n", (int)set->server_pid);
        free(b.data);
        return EXIT_FAILED;
    }
    b.rate_start_ns = clock_now_ns();
    b.warm_end_ns = b.rate_start_ns + set->warm_ns;
    place_connections(l, &b);
    l->workload = &bench_workload;
    l->state = &b;
    r = load_run(l);
    free(b.data);
    if (r < 0)
        return EXIT_FAILED;
    bench_print(l, &b);
    return b.errors > 0 ? EXIT_IO_ERRORS : 0;
}

static int run_verify(struct load *l, const struct settings *set)
{
    struct verify_options opt = {
        .size_bytes = set->size_bytes,
        .unit_bytes = set->block_bytes < 4096 ? set->block_bytes : 4096,
        .max_bytes = set->block_bytes,
        .duration_ns = set->time_ns,
        .read_percent = set->read_percent,
        .seed = set->seed,
    };
    struct verify_result result;

    if (verify_run(l, &opt, &result) < 0)
        return EXIT_FAILED;
    printf("{\"verify\": true, \"seed\": %" PRIu64 ", \"unit\": %u, \"units_written\": %" PRIu64
           ", \"units_checked\": %" PRIu64 ", \"mismatches\": %" PRIu64 ", \"errors\": %" PRIu64
           "}\n",
           set->seed, opt.unit_bytes, result.units_written, result.units_checked, result.mismatches,
           result.errors);
    if (result.mismatches > 0)
        return EXIT_MISMATCH;
    return result.errors > 0 ? EXIT_IO_ERRORS : 0;
}

/* Command line */

static const char usage[] =
    "usage: nbd-load (--unix PATH | --tcp HOST:PORT) [options]\n"
    "  --export NAME        export to use (default: the empty name)\n"
    "  --op OP              randread, randwrite, randrw, read, write, rw (default randread)\n"
    "  --read-percent N     reads among 100 requests of randrw, rw, --verify (default 50)\n"
    "  --bs BYTES           size of a request; with --verify the largest (default 4096)\n"
    "  --stride BYTES       from one place of requests to the next, at least --bs (default --bs)\n"
    "  --size BYTES         use only the first BYTES of the export\n"
    "  --depth N            requests in flight per connection (default 1)\n"
    "  --connections N      connections (default 1)\n"
    "  --warm SECONDS       run this long before measuring (default 0.2)\n"
    "  --time SECONDS       measure this long (default 1)\n"
    "  --rate N             N requests per second in all; latency counts from when each was due\n"
    "  --structured         negotiate structured replies\n"
    "  --verify             write stamped blocks, read them back, compare\n"
    "  --seed N             for offsets and stamps (default 1)\n"
    "  --timeout SECONDS    give up on a request or a handshake after this long (default 10)\n"
    "  --server-pid PID     measure the processor time of this process\n"
    "exit status: 0 good, 1 the server answered errors, 2 failed, 3 read back what was not written\n";

static int bad_usage(const char *what, const char *value)
{
    fprintf(stderr, "nbd-load: %s '%s'\n%s", what, value, usage);
    return -EINVAL;
}

static int parse_number(const char *text, uint64_t min, uint64_t max, uint64_t *ret_value)
{
    char *end;
    unsigned long long v;

    errno = 0;
    v = strtoull(text, &end, 0);
    if (errno != 0 || end == text || *end != '\0' || text[0] == '-' || v < min || v > max)
        return bad_usage("not a number in the allowed range:", text);
    *ret_value = v;
    return 0;
}

static int parse_seconds(const char *text, uint64_t *ret_ns)
{
    char *end;
    double v = strtod(text, &end);

    if (end == text || *end != '\0' || !(v >= 0 && v <= 1e6))
        return bad_usage("not a number of seconds:", text);
    *ret_ns = (uint64_t)(v * 1e9);
    return 0;
}

static int parse_operation(const char *text, enum operation *ret_op)
{
    for (unsigned i = 0; i < sizeof(operation_names) / sizeof(operation_names[0]); i++) {
        if (strcmp(text, operation_names[i]) == 0) {
            *ret_op = (enum operation)i;
            return 0;
        }
    }
    return bad_usage("unknown operation", text);
}

/* Cuts text at its last colon. */
static int parse_tcp(char *text, struct nbd_target *target)
{
    char *colon = strrchr(text, ':');

    if (colon == NULL)
        return bad_usage("not HOST:PORT:", text);
    *colon = '\0';
    target->tcp_host = text;
    target->tcp_port = colon + 1;
    return 0;
}

enum option_key {
    KEY_UNIX = 1,
    KEY_TCP,
    KEY_EXPORT,
    KEY_OP,
    KEY_READ_PERCENT,
    KEY_BS,
    KEY_STRIDE,
    KEY_SIZE,
    KEY_DEPTH,
    KEY_CONNECTIONS,
    KEY_WARM,
    KEY_TIME,
    KEY_RATE,
    KEY_STRUCTURED,
    KEY_VERIFY,
    KEY_SEED,
    KEY_TIMEOUT,
    KEY_SERVER_PID
};

static const struct option options[] = {
    {"unix", required_argument, NULL, KEY_UNIX},
    {"tcp", required_argument, NULL, KEY_TCP},
    {"export", required_argument, NULL, KEY_EXPORT},
    {"op", required_argument, NULL, KEY_OP},
    {"read-percent", required_argument, NULL, KEY_READ_PERCENT},
    {"bs", required_argument, NULL, KEY_BS},
    {"stride", required_argument, NULL, KEY_STRIDE},
    {"size", required_argument, NULL, KEY_SIZE},
    {"depth", required_argument, NULL, KEY_DEPTH},
    {"connections", required_argument, NULL, KEY_CONNECTIONS},
    {"warm", required_argument, NULL, KEY_WARM},
    {"time", required_argument, NULL, KEY_TIME},
    {"rate", required_argument, NULL, KEY_RATE},
    {"structured", no_argument, NULL, KEY_STRUCTURED},
    {"verify", no_argument, NULL, KEY_VERIFY},
    {"seed", required_argument, NULL, KEY_SEED},
    {"timeout", required_argument, NULL, KEY_TIMEOUT},
    {"server-pid", required_argument, NULL, KEY_SERVER_PID},
    {0},
};

static int apply_option(int key, char *arg, struct load *l, struct settings *set)
{
    uint64_t v = 0;
    int r = 0;

    switch (key) {
    case KEY_UNIX:
        l->target.unix_path = arg;
        break;
    case KEY_TCP:
        return parse_tcp(arg, &l->target);
    case KEY_EXPORT:
        l->target.export_name = arg;
        break;
    case KEY_OP:
        return parse_operation(arg, &set->op);
    case KEY_READ_PERCENT:
        r = parse_number(arg, 0, 100, &v);
        set->read_percent = (unsigned)v;
        break;
    case KEY_BS:
        r = parse_number(arg, 512, MAX_REQUEST, &v);
        set->block_bytes = (uint32_t)v;
        break;
    case KEY_STRIDE:
        return parse_number(arg, 512, UINT64_MAX / 2, &set->stride_bytes);
    case KEY_SIZE:
        return parse_number(arg, 512, UINT64_MAX / 2, &set->size_bytes);
    case KEY_DEPTH:
        r = parse_number(arg, 1, MAX_DEPTH, &v);
        l->depth = (unsigned)v;
        break;
    case KEY_CONNECTIONS:
        r = parse_number(arg, 1, MAX_CONNS, &v);
        l->n_conns = (unsigned)v;
        break;
    case KEY_WARM:
        return parse_seconds(arg, &set->warm_ns);
    case KEY_TIME:
        return parse_seconds(arg, &set->time_ns);
    case KEY_RATE:
        return parse_number(arg, 1, 100000000, &set->rate);
    case KEY_STRUCTURED:
        l->target.structured = true;
        break;
    case KEY_VERIFY:
        set->verify = true;
        break;
    case KEY_SEED:
        return parse_number(arg, 0, UINT64_MAX, &set->seed);
    case KEY_TIMEOUT:
        return parse_seconds(arg, &l->timeout_ns);
    case KEY_SERVER_PID:
        r = parse_number(arg, 1, INT32_MAX, &v);
        set->server_pid = (pid_t)v;
        break;
    default:
        fputs(usage, stderr);
        return -EINVAL;
    }
    return r;
}

/* What cannot be said of one option alone. */
static int check_settings(const struct load *l, const struct settings *set)
{
    if ((l->target.unix_path != NULL) == (l->target.tcp_host != NULL))
        return bad_usage("name one server:", "--unix or --tcp");
    if (set->block_bytes % 512 != 0)
        return bad_usage("--bs is no multiple of 512:", "--bs");
    if (set->verify && set->block_bytes > 4096 && set->block_bytes % 4096 != 0)
        return bad_usage("--verify above 4096 bytes wants a multiple of 4096:", "--bs");
    if (set->stride_bytes != 0 && set->stride_bytes < set->block_bytes)
        return bad_usage("--stride is less than --bs:", "--stride");
    if (set->verify && set->stride_bytes != 0)
        return bad_usage("--verify has no stride:", "--stride");
    if (set->verify && set->rate > 0)
        return bad_usage("--verify has no rate:", "--rate");
    return 0;
}

/* Fits the region to the export and to whole requests. */
static int fit_region(const struct load *l, struct settings *set)
{
    bool writes = set->verify || (set->op != OP_RANDREAD && set->op != OP_READ);

    if (set->size_bytes == 0 || set->size_bytes > l->export.size_bytes)
        set->size_bytes = l->export.size_bytes;
    if (set->stride_bytes == 0)
        set->stride_bytes = set->block_bytes;
    set->size_bytes -= set->size_bytes % set->stride_bytes;
    if (set->size_bytes == 0) {
        fprintf(stderr, "nbd-load: the export is %" PRIu64 " bytes long, less than one request\n",
                l->export.size_bytes);
        return -EINVAL;
    }
    if (writes && l->export.flags & NBD_EXPORT_READ_ONLY) {
        fprintf(stderr, "nbd-load: the export is read-only\n");
        return -EROFS;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct settings set = {
        .op = OP_RANDREAD,
        .read_percent = 50,
        .block_bytes = 4096,
        .warm_ns = 200000000,
        .time_ns = 1000000000,
        .seed = 1,
    };
    struct load l = {
        .target = {.export_name = ""},
        .n_conns = 1,
        .depth = 1,
        .timeout_ns = 10000000000,
        .epoll_fd = -1,
    };
    int status = EXIT_FAILED;
    int key;

    while ((key = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (apply_option(key, optarg, &l, &set) < 0)
            return EXIT_FAILED;
    if (optind != argc) {
        (void)bad_usage("unexpected argument", argv[optind]);
        return EXIT_FAILED;
    }
    if (check_settings(&l, &set) < 0)
        return EXIT_FAILED;
    if (load_open(&l) == 0 && fit_region(&l, &set) == 0)
        status = set.verify ? run_verify(&l, &set) : run_bench(&l, &set);
    load_close(&l);
    return status;
}
