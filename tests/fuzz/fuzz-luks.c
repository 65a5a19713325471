/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile LUKS volumes (P6), to the driver under sim: open, reads, writes, changes of key slots, resize, close. Nothing may crash, hang or
 * take memory without bound; errors are welcome.
 *
 * Byte 0 of an input: 1: read-only; 2: another slot comes into use; 4: slot 0 goes out of use; 8: the disk is resized. Byte 1: how much of the
 * file is cut off. Then come patches of 8 bytes: where (2 bytes), how, what (5 bytes; 0: a number of 4, 1: one byte, 2: text).
 */
#include "fuzz-luks.h"
#include "formats/list.h"
#include "formats/luks/luks-driver.h"
#include "graph/backend.h"
#include "protocols/list.h"

#define HEAD        2
#define PATCH       8
#define PATCHES_MAX 32
#define DISK        ((uint64_t)64 << 10)
#define IMAGE       "/disk/image"

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct input {
    uint8_t what;
    struct graph *graph;
    struct backend *backend;
    uint8_t data[16384];
};

static void co_fn send_some(struct input *in, enum request_kind kind, uint64_t offset)
{
    uint64_t size = backend_size(in->backend);
    struct iovec iov = {in->data, 0};
    struct request req = {.kind = kind, .offset = offset, .iov = &iov, .iov_count = 1};

    if (offset >= size)
        return;
    req.len = iov.iov_len = MIN(sizeof(in->data), size - offset);
    (void)backend_co_request(in->backend, &req);
}

static void co_fn use(struct input *in)
{
    uint64_t size = backend_size(in->backend);

    send_some(in, REQUEST_READ, 0);
    send_some(in, REQUEST_READ, size - MIN(size, (uint64_t)700));
    if (in->what & 1)
        return;
    send_some(in, REQUEST_WRITE, 1000);
    send_some(in, REQUEST_WRITE, size - MIN(size, (uint64_t)700));
}

/* A slot more, and then the first one less. */
static void co_fn control_fn change_slots(struct input *in)
{
    struct secret fresh = secret_of("fresh");
    struct luks_amend more = {
        .activate = true, .new_secret = &fresh, .has_iter_ms = true, .iter_ms = 1};
    struct luks_amend less = {.has_slot = true, .force = true};
    AUTO(error_free) struct error *err = NULL;
    AUTO(error_free) struct error *err2 = NULL;

    if (in->what & 2)
        (void)luks_node_co_amend(in->backend, &more, &err);
    if (in->what & 4)
        (void)luks_node_co_amend(in->backend, &less, &err2);
}

static void co_fn control_fn resize(struct input *in)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(error_free) struct error *err2 = NULL;

    (void)graph_co_resize(in->graph, "top", DISK / 2 + 100, &err);
    (void)graph_co_resize(in->graph, "top", DISK * 2, &err2);
}

static int co_fn control_fn add_disk(struct input *in, struct error **err)
{
    struct node_options file = {.driver = NODE_DRIVER_FILE};
    struct node_options disk = {
        .driver = NODE_DRIVER_LUKS,
        .node_name = (char *)(uintptr_t) "top",
        .has_read_only = true,
        .read_only = in->what & 1,
    };

    file.u.file.filename = (char *)(uintptr_t)IMAGE;
    disk.u.luks.file = (struct node_ref){.kind = NODE_REF_DEFINITION, .definition = &file};
    disk.u.luks.key_secret = (char *)(uintptr_t)FUZZ_SECRET;
    return graph_co_add(in->graph, &disk, err);
}

static void co_fn control_fn run_input(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct input *in = arg;
    struct access access = {ACCESS_READ | (in->what & 1 ? 0 : ACCESS_WRITE), ACCESS_ALL};

    in->graph = graph_new(drivers);
    fuzz_luks_add_secret(in->graph);
    if (add_disk(in, &err) == 0) {
        check(backend_co_new(&in->backend, in->graph, "top", access, "fuzzer", &err) == 0);
        check(backend_attach(in->backend) == 0);
        use(in);
        if (!(in->what & 1)) {
            change_slots(in);
            if (in->what & 8)
                resize(in);
            use(in);
        }
        in->backend = backend_co_free(in->backend);
    }
    in->graph = graph_co_free(in->graph);
}

static void patch(uint8_t *header, const uint8_t *p)
{
    size_t at = load_be16(p) % (LUKS_HEADER_BYTES - 8);

    switch (p[2] % 3) {
    case 0:
        store_be32(header + at, load_be32(p + 3));
        break;
    case 1:
        header[at] = p[3];
        break;
    case 2:
        memcpy(header + at, p + 3, 5);
        break;
    }
}

static void put_volume(struct sim_disk *disk, const uint8_t *data, size_t size)
{
    const struct fuzz_luks *sound = fuzz_luks_sound();
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = sound->len + DISK};
    uint8_t header[LUKS_HEADER_BYTES];

    setup.size -= setup.size * data[1] / 256;
    memcpy(header, sound->bytes, sizeof(header));
    for (size_t n = 0; n < PATCHES_MAX && HEAD + (n + 1) * PATCH <= size; n++)
        patch(header, data + HEAD + n * PATCH);
    fuzz_luks_tame(header);
    sim_disk_make(disk, IMAGE, &setup);
    sim_disk_write(disk, IMAGE, 0, header, MIN(setup.size, sizeof(header)));
    if (setup.size > sizeof(header))
        sim_disk_write(disk, IMAGE, sizeof(header), sound->bytes + sizeof(header),
                       MIN(setup.size, FUZZ_LUKS_BYTES) - sizeof(header));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct input in;
    struct sim_disk *disk;

    if (size < HEAD)
        return 0;
    disk = sim_disk_new();
    put_volume(disk, data, size);
    in = (struct input){.what = data[0]};
    fuzz_run(disk, run_input, &in);
    return 0;
}
