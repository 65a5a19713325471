/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The demo's checker: decides whether an image of a disk shows the disk as it was at ONE instant.
 *
 *   checker --log LOG --list LIST --window BEGIN END [--rest ORIGINAL] IMAGE
 *
 * The disk was being written by tests/demo/writer.c, whose log is LOG and whose list of places is LIST. The
 * window is [time before the backup command was sent, time after its reply was received], as
 * CLOCK_MONOTONIC in nanoseconds.
 *
 * What is decided. A block has the versions w0, w1, ... wn in the order of their submission; w0 is
 * what it held before the first write, submitted and acknowledged before all else. As no block ever
 * has two writes under way (the log is refused otherwise), each write begins after the one before it
 * has been acknowledged. At an instant T a block may hold
 *
 *   - the last version acknowledged before T, or
 *   - the one whose write is under way at T, which may or may not have taken effect,
 *
 * and none submitted later. So finding wk in the image means
 *
 *   submit(wk) <= T    it is no version of T's future, and
 *   T <= ack(wk+1)     its successor has not been acknowledged before T;
 *
 * where wk+1 does not exist or was not acknowledged, nothing bounds T from above. The image shows one
 * instant if all these intervals, one for each block, and the window have an instant in common. A
 * block of which the image holds anything else (not whole, of another place, of a write that the log
 * does not have) shows none.
 *
 * A log that ends too early would hide writes and so let old blocks pass. The records are in the
 * order of submission; so the log holds all that counts if it has a record of after the window.
 * That lets the checker run while the writer goes on: what is missing then, and acknowledgements
 * that have not come yet, are of after the window.
 *
 * --rest: all blocks of the image that are not in the list must be those of ORIGINAL.
 *
 * Exit status: 0 there is such an instant, 1 there is none, 2 it cannot be decided.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proof.h"

#define MAX_BLOCKS (1u << 24)
#define READ_BYTES (1u << 20)
#define NONE       UINT64_MAX

enum verdict { VERDICT_PROVED, VERDICT_NONE, VERDICT_CANNOT };

/* All of it is a copy: the log may grow meanwhile. */
struct log {
    struct proof_record *records; /* [0] is the head */
    uint64_t count;
    uint64_t *next;  /* by sequence: that of the next write of the same block, 0: none */
    uint64_t *first; /* by block: the sequence of its first write, 0: none */
};

/* One bound of T, and who sets it. */
struct bound {
    uint64_t at_ns;
    uint64_t block; /* NONE: the window */
    uint64_t sequence;
};

struct check {
    const char *log_path;
    const char *list_path;
    const char *rest_path;
    const char *image_path;
    uint64_t begin_ns;
    uint64_t end_ns;

    struct log log;
    uint64_t *places; /* of the blocks in the disk */
    uint64_t blocks;

    int image;
    uint64_t image_bytes;
    struct bound low;
    struct bound high;
    uint64_t written; /* blocks that hold a write */
};

/* Prints why nothing can be decided. */
__attribute__((format(printf, 2, 3))) static enum verdict cannot(const char *path,
                                                                 const char *format, ...)
{
    va_list args;

    fprintf(stderr, "cannot decide: '%s': ", path);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return VERDICT_CANNOT;
}

static int open_sized(const char *path, uint64_t *ret_bytes)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &st) < 0) {
        (void)cannot(path, "%s", strerror(errno));
        if (fd >= 0)
            close(fd);
        return -1;
    }
    *ret_bytes = (uint64_t)st.st_size;
    return fd;
}

/* The list */

static enum verdict list_read(struct check *c)
{
    FILE *file = fopen(c->list_path, "r");
    unsigned long long place;

    if (file == NULL)
        return cannot(c->list_path, "%s", strerror(errno));
    c->places = calloc(MAX_BLOCKS, sizeof(*c->places));
    while (c->places != NULL && c->blocks < MAX_BLOCKS && fscanf(file, "%llu\n", &place) == 1)
        c->places[c->blocks++] = place;
    if (!feof(file) || c->blocks == 0) {
        (void)fclose(file); /* only read */
        return cannot(c->list_path, "line %" PRIu64 " has no number of a block", c->blocks + 1);
    }
    (void)fclose(file);
    return VERDICT_PROVED;
}

/* The log */

/* Copies the records that exist. The writer may be adding more. */
static enum verdict log_copy(struct check *c)
{
    struct log *log = &c->log;
    struct proof_log_head head;
    struct proof_record *mapped;
    uint64_t bytes;
    uint64_t room;
    int fd = open_sized(c->log_path, &bytes);

    if (fd < 0)
        return VERDICT_CANNOT;
    room = bytes / sizeof(*mapped);
    if (room == 0 || bytes % sizeof(*mapped) != 0) {
        close(fd);
        return cannot(c->log_path, "it ends within a record");
    }
    mapped = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    log->records = malloc(bytes);
    if (mapped == MAP_FAILED || log->records == NULL)
        return cannot(c->log_path, "%s", strerror(errno));
    memcpy(&head, mapped, sizeof(head));
    for (log->count = 1; log->count < room; log->count++) {
        const struct proof_record *from = &mapped[log->count];
        struct proof_record *to = &log->records[log->count];

        to->submit_ns = __atomic_load_n(&from->submit_ns, __ATOMIC_ACQUIRE);
        if (to->submit_ns == 0)
            break;
        to->ack_ns = __atomic_load_n(&from->ack_ns, __ATOMIC_ACQUIRE);
        to->sequence = from->sequence;
        to->block = from->block;
    }
    munmap(mapped, bytes);
    if (memcmp(head.magic, PROOF_LOG_MAGIC, sizeof(head.magic)) != 0 ||
        head.version != PROOF_LOG_VERSION || head.record_bytes != sizeof(struct proof_record))
        return cannot(c->log_path, "it is no log of this version of the writer");
    if (head.blocks != c->blocks)
        return cannot(c->log_path,
                      "it is of a writer of %" PRIu64 " blocks, and the list has %" PRIu64,
                      head.blocks, c->blocks);
    return VERDICT_PROVED;
}

/* Appends record n to its block's versions; last[] has the last sequence of each block. */
static enum verdict log_link(struct check *c, uint64_t n, uint64_t *last)
{
    const struct proof_record *record = &c->log.records[n];
    uint64_t before;

    if (record->sequence != n)
        return cannot(c->log_path, "record %" PRIu64 " has the sequence %" PRIu64, n,
                      record->sequence);
    if (n > 1 && record->submit_ns < c->log.records[n - 1].submit_ns)
        return cannot(c->log_path, "record %" PRIu64 " was submitted before the one before it", n);
    if (record->ack_ns != 0 && record->ack_ns < record->submit_ns)
        return cannot(c->log_path, "write %" PRIu64 " was acknowledged before it was submitted", n);
    if (record->block == PROOF_MARK)
        return VERDICT_PROVED;
    if (record->block >= c->blocks)
        return cannot(c->log_path, "write %" PRIu64 " is to block %" PRIu64 " of %" PRIu64, n,
                      record->block, c->blocks);
    before = last[record->block];
    if (before == 0)
        c->log.first[record->block] = n;
    else
        c->log.next[before] = n;
    if (before != 0 &&
        (c->log.records[before].ack_ns == 0 || c->log.records[before].ack_ns > record->submit_ns))
        return cannot(c->log_path,
                      "block %" PRIu64 " had the writes %" PRIu64 " and %" PRIu64
                      " under way at once: nobody knows their order",
                      record->block, before, n);
    last[record->block] = n;
    return VERDICT_PROVED;
}

static enum verdict log_read(struct check *c)
{
    struct log *log = &c->log;
    enum verdict verdict = log_copy(c);
    uint64_t *last;

    if (verdict != VERDICT_PROVED)
        return verdict;
    log->next = calloc(log->count, sizeof(*log->next));
    log->first = calloc(c->blocks, sizeof(*log->first));
    last = calloc(c->blocks, sizeof(*last));
    if (log->next == NULL || log->first == NULL || last == NULL)
        verdict = cannot(c->log_path, "no memory for it");
    for (uint64_t n = 1; n < log->count && verdict == VERDICT_PROVED; n++)
        verdict = log_link(c, n, last);
    free(last);
    if (verdict != VERDICT_PROVED)
        return verdict;
    if (log->count == 1 || log->records[log->count - 1].submit_ns <= c->end_ns)
        return cannot(c->log_path, "it ends before the window does");
    return VERDICT_PROVED;
}

/* The image */

__attribute__((format(printf, 3, 4))) static enum verdict
bad_block(const struct check *c, uint64_t block, const char *format, ...)
{
    va_list args;

    printf("no instant: block %" PRIu64 " (block %" PRIu64 " of the disk) ", block,
           c->places[block]);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    return VERDICT_NONE;
}

/* Narrows the bounds by what one block holds. */
static void check_narrow(struct check *c, uint64_t block, uint64_t sequence)
{
    const struct proof_record *records = c->log.records;
    uint64_t next = sequence == 0 ? c->log.first[block] : c->log.next[sequence];

    if (sequence != 0) {
        c->written++;
        if (records[sequence].submit_ns > c->low.at_ns)
            c->low = (struct bound){records[sequence].submit_ns, block, sequence};
    }
    if (next != 0 && records[next].ack_ns != 0 && records[next].ack_ns < c->high.at_ns)
        c->high = (struct bound){records[next].ack_ns, block, sequence};
}

static enum verdict check_block(struct check *c, uint64_t block)
{
    uint8_t data[PROOF_BLOCK_BYTES];
    uint64_t found;
    uint64_t sequence;
    const char *wrong;
    ssize_t n;

    if (c->places[block] >= c->image_bytes / PROOF_BLOCK_BYTES)
        return bad_block(c, block, "lies beyond the image's end");
    n = pread(c->image, data, sizeof(data), (off_t)(c->places[block] * PROOF_BLOCK_BYTES));
    if (n != (ssize_t)sizeof(data))
        return cannot(c->image_path, "block %" PRIu64 ": %s", c->places[block],
                      n < 0 ? strerror(errno) : "it got shorter");
    wrong = proof_block_parse(data, &found, &sequence);
    if (wrong != NULL)
        return bad_block(c, block, "%s", wrong);
    if (found != block)
        return bad_block(c, block, "holds block %" PRIu64, found);
    if (sequence >= c->log.count || (sequence != 0 && c->log.records[sequence].block != block))
        return bad_block(c, block, "holds write %" PRIu64 ", which the log does not have for it",
                         sequence);
    check_narrow(c, block, sequence);
    return VERDICT_PROVED;
}

/* A time as seen from the window's begin. */
static double after_begin_us(const struct check *c, uint64_t at_ns)
{
    return ((double)at_ns - (double)c->begin_ns) / 1e3;
}

static uint64_t next_of(const struct check *c, const struct bound *b)
{
    return b->sequence == 0 ? c->log.first[b->block] : c->log.next[b->sequence];
}

static enum verdict report_none(const struct check *c)
{
    printf("no instant: ");
    if (c->low.block == NONE)
        printf("the command was sent at 0 us");
    else
        printf("block %" PRIu64 " (block %" PRIu64 " of the disk) holds write %" PRIu64
               ", submitted at %+.3f us",
               c->low.block, c->places[c->low.block], c->low.sequence,
               after_begin_us(c, c->low.at_ns));
    if (c->high.block == NONE)
        printf(", after the reply to the command (%+.3f us)\n", after_begin_us(c, c->high.at_ns));
    else
        printf("; block %" PRIu64 " (block %" PRIu64 " of the disk) still holds write %" PRIu64
               ", though write %" PRIu64 " was acknowledged at %+.3f us\n",
               c->high.block, c->places[c->high.block], c->high.sequence, next_of(c, &c->high),
               after_begin_us(c, c->high.at_ns));
    return VERDICT_NONE;
}

static enum verdict report_instant(const struct check *c)
{
    uint64_t at = c->low.at_ns + (c->high.at_ns - c->low.at_ns) / 2;
    uint64_t under_way = 0;
    uint64_t acknowledged = 0;

    for (uint64_t n = 1; n < c->log.count; n++) {
        const struct proof_record *record = &c->log.records[n];

        if (record->block == PROOF_MARK || record->submit_ns > at)
            continue;
        if (record->ack_ns == 0 || record->ack_ns >= at)
            under_way++;
        else
            acknowledged++;
    }
    printf("one instant: T = %" PRIu64 " ns, %.3f us after the command was sent\n", at,
           after_begin_us(c, at));
    printf("T lies between %+.3f us and %+.3f us; the window ends at %+.3f us\n",
           after_begin_us(c, c->low.at_ns), after_begin_us(c, c->high.at_ns),
           after_begin_us(c, c->end_ns));
    printf("%" PRIu64 " blocks, %" PRIu64 " of them written; at T %" PRIu64
           " writes acknowledged, %" PRIu64 " under way\n",
           c->blocks, c->written, acknowledged, under_way);
    return VERDICT_PROVED;
}

static enum verdict check_instant(struct check *c)
{
    c->low = (struct bound){c->begin_ns, NONE, 0};
    c->high = (struct bound){c->end_ns, NONE, 0};
    for (uint64_t block = 0; block < c->blocks; block++) {
        enum verdict verdict = check_block(c, block);

        if (verdict != VERDICT_PROVED)
            return verdict;
    }
    return c->low.at_ns <= c->high.at_ns ? report_instant(c) : report_none(c);
}

/* The rest */

static bool is_listed(const uint8_t *listed, uint64_t place)
{
    return listed[place / 8] >> place % 8 & 1;
}

/* Compares the pieces of both files at one offset; returns the first block that differs, or NONE. */
static uint64_t rest_differs(const uint8_t *a, const uint8_t *b, size_t len, uint64_t offset,
                             const uint8_t *listed)
{
    if (memcmp(a, b, len) == 0)
        return NONE;
    for (size_t at = 0; at < len; at += PROOF_BLOCK_BYTES) {
        size_t n = len - at < PROOF_BLOCK_BYTES ? len - at : PROOF_BLOCK_BYTES;
        uint64_t place = (offset + at) / PROOF_BLOCK_BYTES;

        if (memcmp(a + at, b + at, n) != 0 && !is_listed(listed, place))
            return place;
    }
    return NONE;
}

/* Where the next data of a file begins, at or after `at`; `end` if there are none. */
static uint64_t next_data(int fd, uint64_t at, uint64_t end)
{
    off_t found = lseek(fd, (off_t)at, SEEK_DATA);

    if (found < 0)
        return errno == ENXIO ? end : at; /* a file system without holes: all is data */
    return (uint64_t)found / PROOF_BLOCK_BYTES * PROOF_BLOCK_BYTES;
}

/* The same of both files: what is a hole in both is equal. */
static uint64_t rest_next(const struct check *c, int rest, uint64_t at)
{
    uint64_t a = next_data(c->image, at, c->image_bytes);
    uint64_t b = next_data(rest, at, c->image_bytes);

    return a < b ? a : b;
}

static enum verdict rest_compare(const struct check *c, int rest, const uint8_t *listed)
{
    static uint8_t a[READ_BYTES];
    static uint8_t b[READ_BYTES];

    for (uint64_t at = rest_next(c, rest, 0); at < c->image_bytes;
         at = rest_next(c, rest, at + READ_BYTES)) {
        uint64_t left = c->image_bytes - at;
        size_t len = left < READ_BYTES ? (size_t)left : READ_BYTES;
        uint64_t place;

        if (pread(c->image, a, len, (off_t)at) != (ssize_t)len)
            return cannot(c->image_path, "cannot read it");
        if (pread(rest, b, len, (off_t)at) != (ssize_t)len)
            return cannot(c->rest_path, "cannot read it");
        place = rest_differs(a, b, len, at, listed);
        if (place != NONE) {
            printf("the rest differs: block %" PRIu64
                   " of the disk, where nobody has written, is not what it was\n",
                   place);
            return VERDICT_NONE;
        }
    }
    printf("the rest is what it was\n");
    return VERDICT_PROVED;
}

static enum verdict check_rest(const struct check *c)
{
    enum verdict verdict;
    uint64_t bytes;
    uint8_t *listed;
    int rest = open_sized(c->rest_path, &bytes);

    if (rest < 0)
        return VERDICT_CANNOT;
    listed = calloc(c->image_bytes / PROOF_BLOCK_BYTES / 8 + 1, 1);
    if (listed == NULL) {
        verdict = cannot(c->rest_path, "no memory");
    } else if (bytes != c->image_bytes) {
        printf("the rest differs: the image has %" PRIu64 " bytes, and the original %" PRIu64 "\n",
               c->image_bytes, bytes);
        verdict = VERDICT_NONE;
    } else {
        for (uint64_t block = 0; block < c->blocks; block++)
            listed[c->places[block] / 8] |= (uint8_t)(1u << c->places[block] % 8);
        verdict = rest_compare(c, rest, listed);
    }
    free(listed);
    close(rest);
    return verdict;
}

static enum verdict check_run(struct check *c)
{
    enum verdict verdict = list_read(c);

    if (verdict == VERDICT_PROVED)
        verdict = log_read(c);
    if (verdict != VERDICT_PROVED)
        return verdict;
    c->image = open_sized(c->image_path, &c->image_bytes);
    if (c->image < 0)
        return VERDICT_CANNOT;
    verdict = check_instant(c);
    /* Only after it is known that the list lies in the image. */
    if (verdict == VERDICT_PROVED && c->rest_path != NULL)
        verdict = check_rest(c);
    close(c->image);
    return verdict;
}

static bool parse_time(const char *text, uint64_t *ret_ns)
{
    char *end;

    errno = 0;
    *ret_ns = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == '\0' && errno == 0;
}

static bool parse_options(struct check *c, int argc, char **argv)
{
    int i = 1;

    for (; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--log") == 0) {
            c->log_path = argv[i + 1];
        } else if (strcmp(argv[i], "--list") == 0) {
            c->list_path = argv[i + 1];
        } else if (strcmp(argv[i], "--rest") == 0) {
            c->rest_path = argv[i + 1];
        } else if (strcmp(argv[i], "--window") == 0 && i + 2 < argc) {
            if (!parse_time(argv[i + 1], &c->begin_ns) || !parse_time(argv[i + 2], &c->end_ns))
                return false;
            i++;
        } else {
            return false;
        }
    }
    if (i + 1 == argc)
        c->image_path = argv[i];
    return c->image_path != NULL && c->log_path != NULL && c->list_path != NULL &&
           c->begin_ns > 0 && c->begin_ns <= c->end_ns;
}

int main(int argc, char **argv)
{
    static struct check c;
    enum verdict verdict = VERDICT_CANNOT;

    if (parse_options(&c, argc, argv))
        verdict = check_run(&c);
    else
        (void)fputs("usage: checker --log LOG --list LIST --window BEGIN END [--rest ORIGINAL] "
                    "IMAGE\n",
                    stderr); /* the exit status tells too */
    free(c.log.records);
    free(c.log.next);
    free(c.log.first);
    free(c.places);
    /* The verdict counts only if it can be read. */
    return fflush(stdout) == 0 ? (int)verdict : VERDICT_CANNOT;
}
