/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Statistics. Those of a node are the sum of its backends', whether export or job: what came in from outside, not what other
 * nodes asked of it.
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/control.h"
#include "graph/backend.h"
#include "graph/stats.h"
#include "loop/loop.h"
#include "schema-dispatch.h"

#include <errno.h>
#include <stdlib.h>

/* Histograms show powers of two from 2^HISTOGRAM_FIRST to 2^HISTOGRAM_LAST ns: 256 ns to 17 s. */
#define HISTOGRAM_FIRST      8
#define HISTOGRAM_LAST       34
#define HISTOGRAM_BOUNDARIES (HISTOGRAM_LAST - HISTOGRAM_FIRST + 1)

/*
 * How far down `parent` goes. Every node has an entry of its own, so that nothing is lost; without a bound a chain of n nodes would
 * be described n^2/2 times, deeper nested than the stack of a coroutine holds.
 */
#define PARENTS_MAX 8

struct node_sum {
    const struct node *node;
    struct stats sum;
    struct stats one;
};

static void add_backend(const struct backend *b, void *arg)
{
    struct node_sum *s = arg;

    if (backend_node(b) != s->node)
        return;
    backend_stats(b, &s->one);
    stats_sum(&s->sum, &s->one);
}

/* NULL if nothing was counted. */
static struct latency_histogram_info *histogram(const struct stats_of_kind *k)
{
    struct latency_histogram_info *h;

    if (k->operations == 0)
        return NULL;
    h = xnew(struct latency_histogram_info);
    h->boundaries.count = HISTOGRAM_BOUNDARIES;
    h->boundaries.items = xnew_n(uint64_t, HISTOGRAM_BOUNDARIES);
    h->bins.count = HISTOGRAM_BOUNDARIES + 1;
    h->bins.items = xnew_n(uint64_t, HISTOGRAM_BOUNDARIES + 1);
    for (unsigned i = 0; i < HISTOGRAM_BOUNDARIES; i++)
        h->boundaries.items[i] = (uint64_t)1 << (HISTOGRAM_FIRST + i);
    for (unsigned bucket = 0, bin = 0; bucket < STATS_BUCKETS; bucket++) {
        while (bin < HISTOGRAM_BOUNDARIES && stats_bucket_ns(bucket) >= h->boundaries.items[bin])
            bin++; /* each boundary is the lowest value of a bucket */
        h->bins.items[bin] += k->histogram[bucket];
    }
    return h;
}

static void device_stats_of(const struct stats *s, struct device_stats *ret)
{
    const struct stats_of_kind *rd = &s->kind[STATS_READ];
    const struct stats_of_kind *wr = &s->kind[STATS_WRITE];
    const struct stats_of_kind *flush = &s->kind[STATS_FLUSH];
    const struct stats_of_kind *unmap = &s->kind[STATS_UNMAP];
    uint64_t now = loop_clock();

    *ret = (struct device_stats){
        .rd_bytes = rd->bytes,
        .wr_bytes = wr->bytes,
        .unmap_bytes = unmap->bytes,
        .rd_operations = rd->operations,
        .wr_operations = wr->operations,
        .flush_operations = flush->operations,
        .unmap_operations = unmap->operations,
        .rd_total_time_ns = rd->total_ns,
        .wr_total_time_ns = wr->total_ns,
        .flush_total_time_ns = flush->total_ns,
        .unmap_total_time_ns = unmap->total_ns,
        .wr_highest_offset = s->highest_written,
        .has_idle_time_ns = s->last_ns > 0,
        .idle_time_ns = s->last_ns < now ? now - s->last_ns : 0,
        .failed_rd_operations = rd->failed,
        .failed_wr_operations = wr->failed,
        .failed_flush_operations = flush->failed,
        .failed_unmap_operations = unmap->failed,
        .invalid_rd_operations = rd->invalid,
        .invalid_wr_operations = wr->invalid,
        .invalid_flush_operations = flush->invalid,
        .invalid_unmap_operations = unmap->invalid,
        .account_invalid = true,
        .account_failed = true,
        .rd_latency_histogram = histogram(rd),
        .wr_latency_histogram = histogram(wr),
        .flush_latency_histogram = histogram(flush),
    };
}

/* Fills *ret for the node and, behind `parent`, for the next nodes that hold its data. */
static int node_stats(struct graph *graph, const struct node *node, struct block_stats *ret,
                      struct error **err)
{
    for (unsigned depth = 0;; depth++) {
        AUTO(free_ptr) struct node_sum *s = try_new(struct node_sum);
        const struct edge *file = node_file(node);

        if (!s)
            return error_set(err, ENOMEM, "no memory for statistics");
        s->node = node;
        graph_for_each_backend(graph, add_backend, s);
        ret->node_name = xstrdup(node_name(node));
        device_stats_of(&s->sum, &ret->stats);
        if (!file || depth == PARENTS_MAX)
            return 0;
        ret->parent = try_new(struct block_stats);
        if (!ret->parent)
            return error_set(err, ENOMEM, "no memory for statistics");
        ret = ret->parent;
        node = edge_node(file);
    }
}

struct stats_walk {
    struct graph *graph;
    struct block_stats_array *list;
    size_t count;
    struct error **err;
    int result;
};

static void count_node(struct node *node, void *arg)
{
    struct stats_walk *walk = arg;

    (void)node;
    walk->count++;
}

static void add_node(struct node *node, void *arg)
{
    struct stats_walk *walk = arg;

    if (walk->result == 0)
        walk->result =
            node_stats(walk->graph, node, &walk->list->items[walk->list->count++], walk->err);
}

int qmp_query_blockstats(struct qmp_session *session, const struct query_blockstats_args *args,
                         struct block_stats_array *ret, struct error **err)
{
    struct stats_walk walk = {.graph = control_of(session)->graph, .list = ret, .err = err};

    if (!args->query_nodes)
        return 0; /* of devices, which do not exist */
    graph_for_each_node(walk.graph, count_node, &walk);
    ret->items = try_new_n(struct block_stats, MAX(walk.count, (size_t)1));
    if (!ret->items)
        return error_set(err, ENOMEM, "no memory for a list of %zu nodes", walk.count);
    graph_for_each_node(walk.graph, add_node, &walk);
    return walk.result;
}
