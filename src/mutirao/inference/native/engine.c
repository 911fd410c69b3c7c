/* The engine: runs a program (see inference/architecture/program.py) over tokens, on all threads together.
 *
 * Python describes tensors, vectors, buffers and ops, then loads and runs; nothing here knows an
 * architecture. Each op ends at a barrier. Streamed matrices are multiplied piece by piece as
 * their pieces arrive. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "crowding.h"
#include "kernels.h"
#include "pool.h"
#include "stream.h"
#include "weights.h"

#define EXPORT __attribute__((visibility("default")))

enum { OP_EMBED, OP_SCALE, OP_RMS_NORM, OP_LAYER_NORM, OP_MATMUL, OP_ROPE, OP_ATTENTION, OP_ACTIVATION, OP_ADD,
       OP_SELECT_ROWS, NUM_OPS };
enum { MODE_FULL, MODE_DRAFT };

/* Mirrors native/__init__.py. Fields that an op does not use are 0; absent references are -1. */
typedef struct {
    int32_t kind, input, out, weight, bias, other, third, accumulate;
    int32_t layer, num_heads, num_kv_heads, head_dim, width, window, flag, amount;
    float factor, eps;
} op;

typedef struct {
    float *at;
    int width, stride, num_rows;
} buffer;

typedef struct {
    float *at, *cosines, *sines; /* frequencies also have tables for the positions at hand */
    float factor;
    int width;
} vector;

typedef struct {
    int32_t num_threads, num_readers, direct, queued, max_tokens, num_layers, num_kv_heads, head_dim, max_positions;
    int64_t ring_bytes, piece_bytes;
} settings;

typedef struct {
    const int32_t *tokens, *selected;
    int num_tokens, position, begin, end, mode, num_selected;
} run_request;

typedef struct {
    settings set;
    const kernel_table *kernels;
    pool *threads;
    stream *reader;
    char path[4096], error[256];
    atomic_int failed;
    tensor *tensors;
    vector *vectors;
    buffer *buffers;
    op *ops;
    int num_tensors, num_vectors, num_buffers, num_ops, num_pieces;
    piece *pieces;
    uint64_t *checksums;
    uint8_t *resident;
    int64_t resident_bytes, num_loaded;
    int row_file;
    int8_t *codes; /* quantized activations of the op at hand */
    float *scales, *sums32, *sums16;
    int code_stride, block_stride;
    uint16_t **pages;
    int64_t page_halves, head_halves;
    float **scores;      /* by thread */
    uint8_t **row_bytes; /* by thread */
    uint16_t **joined;   /* by thread: a panel of split floats made whole */
    int64_t row_bytes_read;
    run_request now;
    const uint8_t *piece_at;
    double op_s[NUM_OPS];
    crowding crowd; /* how many threads are worth their while */
} engine;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *fail(engine *e, const char *message) {
    if (!atomic_exchange(&e->failed, 1)) snprintf(e->error, sizeof e->error, "%s", message);
    return NULL;
}

/* ---- Building --------------------------------------------------------------------------------- */

static const kernel_table *kernels_named(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vnni");
    if (avx512 && (!*name || !strcmp(name, "avx512"))) return &kernels_avx512;
    if (avx2 && (!*name || !strcmp(name, "avx2"))) return &kernels_avx2;
#endif
    return !*name || !strcmp(name, "scalar") ? &kernels_scalar : NULL;
}

EXPORT const char *engine_best_kernels(void) { return kernels_named("")->name; }

/* Null when there is no memory, or no such kernels on this machine. */
EXPORT engine *engine_create(const char *path, const char *kernels, const settings *set) {
    engine *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    e->set = *set;
    e->row_file = -1;
    e->kernels = kernels_named(kernels);
    e->threads = e->kernels ? pool_create(set->num_threads) : NULL;
    snprintf(e->path, sizeof e->path, "%s", path);
    crowding_begin(&e->crowd, set->num_threads);
    if (e->threads) return e;
    free(e);
    return NULL;
}

EXPORT const char *engine_error(const engine *e) { return e->error; }
EXPORT const char *engine_kernels(const engine *e) { return e->kernels->name; }

static float *new_floats(int64_t num) {
    void *p = NULL;
    const size_t bytes = (size_t)(num > 0 ? num : 1) * sizeof(float);
    if (posix_memalign(&p, 64, (bytes + 63) / 64 * 64)) return NULL;
    return memset(p, 0, bytes);
}

/* Copies everything; returns 0, or -1 with engine_error. */
EXPORT int engine_describe(engine *e, const tensor_description *tensors, int num_tensors, const float *const *vectors,
                           const int32_t *vector_widths, int num_vectors, const int32_t *buffer_widths,
                           const int32_t *buffer_rows, int num_buffers, const op *ops, int num_ops,
                           const uint64_t *checksums, int64_t num_checksums) {
    e->tensors = calloc((size_t)num_tensors + 1, sizeof *e->tensors);
    e->vectors = calloc((size_t)num_vectors + 1, sizeof *e->vectors);
    e->buffers = calloc((size_t)num_buffers + 1, sizeof *e->buffers);
    e->ops = malloc(((size_t)num_ops + 1) * sizeof *e->ops);
    e->checksums = malloc(((size_t)num_checksums + 1) * sizeof *e->checksums);
    if (!e->tensors || !e->vectors || !e->buffers || !e->ops || !e->checksums) return fail(e, "out of memory"), -1;
    memcpy(e->ops, ops, (size_t)num_ops * sizeof *ops);
    memcpy(e->checksums, checksums, (size_t)num_checksums * sizeof *checksums);
    e->num_tensors = num_tensors, e->num_vectors = num_vectors, e->num_buffers = num_buffers, e->num_ops = num_ops;
    int max_columns = 32, max_split = 0;
    for (int i = 0; i < num_tensors; i++) {
        e->tensors[i].is = tensors[i];
        if (tensors[i].num_columns > max_columns) max_columns = tensors[i].num_columns;
        if (tensors[i].whole_kind && tensors[i].num_columns > max_split) max_split = tensors[i].num_columns;
    }
    for (int i = 0; i < num_vectors; i++) {
        vector *v = &e->vectors[i];
        v->width = vector_widths[i];
        v->at = new_floats(v->width + 16);
        if (!v->at) return fail(e, "out of memory"), -1;
        memcpy(v->at, vectors[i], (size_t)v->width * sizeof(float));
    }
    for (int i = 0; i < num_buffers; i++) {
        buffer *b = &e->buffers[i];
        *b = (buffer){NULL, buffer_widths[i], (buffer_widths[i] + 31) / 32 * 32, buffer_rows[i]};
        b->at = new_floats((int64_t)b->stride * b->num_rows);
        if (!b->at) return fail(e, "out of memory for the activations"), -1;
    }
    for (int i = 0; i < num_ops; i++)
        if (ops[i].kind == OP_ROPE && !e->vectors[ops[i].weight].cosines) {
            vector *v = &e->vectors[ops[i].weight];
            v->factor = ops[i].factor;
            v->cosines = new_floats((int64_t)v->width * e->set.max_tokens);
            v->sines = new_floats((int64_t)v->width * e->set.max_tokens);
            if (!v->cosines || !v->sines) return fail(e, "out of memory"), -1;
        }
    e->code_stride = (max_columns + 63) / 64 * 64;
    e->block_stride = e->code_stride / BLOCK_COLUMNS;
    const int64_t blocks = (int64_t)e->block_stride * e->set.max_tokens;
    e->codes = (int8_t *)new_floats(blocks * 8);
    e->scales = new_floats(blocks), e->sums32 = new_floats(blocks), e->sums16 = new_floats(2 * blocks);
    const int dim16 = (e->set.head_dim + 15) / 16 * 16;
    e->head_halves = (int64_t)KV_PAGE_TOKENS * (e->set.head_dim + dim16);
    e->page_halves = e->head_halves * e->set.num_kv_heads * e->set.num_layers;
    e->pages = calloc((size_t)e->set.max_positions / KV_PAGE_TOKENS + 2, sizeof *e->pages);
    e->scores = calloc((size_t)e->set.num_threads, sizeof *e->scores);
    e->row_bytes = calloc((size_t)e->set.num_threads, sizeof *e->row_bytes);
    e->joined = calloc((size_t)e->set.num_threads, sizeof *e->joined);
    if (!e->codes || !e->scales || !e->sums32 || !e->sums16 || !e->pages || !e->scores || !e->row_bytes || !e->joined)
        return fail(e, "out of memory"), -1;
    for (int t = 0; t < e->set.num_threads; t++) {
        e->scores[t] = new_floats(e->set.max_positions + 2 * KV_PAGE_TOKENS);
        e->joined[t] = (uint16_t *)new_floats((int64_t)max_split * PANEL_ROWS / 2);
        if (!e->scores[t] || !e->joined[t]) return fail(e, "out of memory"), -1;
    }
    return 0;
}

/* Cut the streamed rest of a tensor into pieces of about piece_bytes, whole slabs each. */
static void cut(engine *e, int index) {
    tensor *t = &e->tensors[index];
    const int first = t->is.resident_planes + 1, num_extents = 1 + t->is.num_planes;
    int64_t per_panel = 0;
    for (int which = first; which < num_extents; which++) per_panel += panel_bytes(t, which);
    t->first_piece = e->num_pieces;
    if (per_panel == 0) return;
    int step = (int)(e->set.piece_bytes / (per_panel * SLAB_PANELS)) * SLAB_PANELS;
    if (step < SLAB_PANELS) step = SLAB_PANELS;
    for (int begin = 0; begin < num_panels(t); begin += step) {
        piece *p = &e->pieces[e->num_pieces++];
        *p = (piece){.tensor = index, .begin = begin, .end = begin + step < num_panels(t) ? begin + step : num_panels(t)};
        for (int which = first; which < num_extents; which++) {
            const int64_t stride = panel_bytes(t, which), from = extent_of(t, which)->offset + begin * stride;
            const int64_t to = from + (p->end - begin) * stride, offset = from / PAGE_BYTES * PAGE_BYTES;
            const int64_t length = (to + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES - offset;
            if (stride == 0) continue;
            p->reads[p->num_reads].which = which;
            p->reads[p->num_reads].offset = offset;
            p->reads[p->num_reads].length = length;
            p->reads[p->num_reads].at = p->num_bytes + from - offset;
            p->num_bytes += length;
            p->num_reads++;
        }
        t->num_pieces++;
    }
}

static int64_t count_pieces(const engine *e) {
    int64_t num = 0;
    for (int i = 0; i < e->num_tensors; i++) num += num_panels(&e->tensors[i]) / SLAB_PANELS + 1;
    return num;
}

/* Bytes of one panel of a group of resident planes. */
static int64_t group_bytes(const tensor *t, int g) {
    const int kind = is_joined(&t->is) ? t->is.whole_kind : t->is.kind;
    return panel_plane_bytes(kind, t->group_widths[g], t->is.num_columns);
}

typedef struct {
    engine *e;
    atomic_int next;
} load_job;

/* Read one slab's resident extents and put them, merged, in their places. */
static int load_slab(engine *e, int file, tensor *t, int begin, int end, uint8_t *staging) {
    const uint8_t *planes[MAX_PLANES] = {0}, *scales = NULL;
    uint8_t *to = staging;
    const int count = end - begin;
    for (int which = 0; which <= t->is.resident_planes; which++) {
        const int64_t stride = panel_bytes(t, which), from = extent_of(t, which)->offset + begin * stride;
        if (stride == 0) continue;
        const int64_t offset = from / PAGE_BYTES * PAGE_BYTES;
        const int64_t length = (from + count * stride - offset + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
        if (read_range(file, to, length, offset)) return fail(e, "the weight store cannot be read, or is truncated"), -1;
        uint8_t *bytes = to + (from - offset);
        if (!slabs_match(t, which, begin, end, bytes, e->checksums))
            return fail(e, "the weight store is damaged: a checksum does not match"), -1;
        if (which == 0 && is_joined(&t->is)) scales = bytes;
        else if (which == 0) memcpy(t->scales + begin * stride, bytes, (size_t)(count * stride));
        else planes[which - 1] = bytes;
        to += length;
    }
    if (is_joined(&t->is)) {
        matrix_view v = {.bits = t->is.bits, .scales_kind = t->is.scales_kind, .num_columns = t->is.num_columns,
                         .num_planes = t->is.num_planes, .whole = t->is.whole_kind, .scales = scales};
        memcpy(v.planes, planes, sizeof planes);
        memcpy(v.widths, t->is.widths, sizeof v.widths);
        const int64_t stride = panel_plane_bytes(t->is.whole_kind, 16, t->is.num_columns);
        for (int panel = 0; panel < count; panel++)
            e->kernels->join(&v, panel, (uint16_t *)(t->groups[0] + (begin + panel) * stride));
        return 0;
    }
    for (int g = 0, plane = 0; g < t->num_groups; g++) {
        const int width = t->group_widths[g];
        const int64_t stride = panel_plane_bytes(t->is.kind, width, t->is.num_columns);
        int num = 0;
        for (int bits = 0; t->is.kind == KIND_CODES && bits < width; num++) bits += t->is.widths[plane + num];
        if (num <= 1) memcpy(t->groups[g] + begin * stride, planes[plane], (size_t)(count * stride)), num = 1;
        else merge_planes(planes + plane, t->is.widths + plane, num, t->groups[g] + begin * stride,
                          (int64_t)count * (t->is.num_columns / BLOCK_COLUMNS));
        plane += num;
    }
    return 0;
}

static int64_t largest_slab(const engine *e) {
    int64_t most = 0;
    for (int i = 0; i < e->num_tensors; i++) {
        int64_t sum = 0;
        for (int which = 0; which <= e->tensors[i].is.num_planes; which++)
            sum += panel_bytes(&e->tensors[i], which) * SLAB_PANELS + 2 * PAGE_BYTES;
        if (sum > most) most = sum;
    }
    return most;
}

static void *load_some_slabs(void *given) {
    load_job *job = given;
    engine *e = job->e;
    const int file = open_weights(e->path, e->set.direct);
    /* Not from malloc, which may keep what is freed; it would count in the process's peak. */
    const size_t room = (size_t)largest_slab(e) + 1;
    void *staging = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (file < 0 || staging == MAP_FAILED) {
        if (staging != MAP_FAILED) munmap(staging, room);
        fail(e, file < 0 ? "the weight store cannot be opened" : "out of memory while loading");
        if (file >= 0) close(file);
        return NULL;
    }
    int index = 0, before = 0; /* slabs of the tensors before `index` */
    for (int slab; !e->failed && (slab = atomic_fetch_add(&job->next, 1)) >= 0;) {
        int num = 0;
        for (; index < e->num_tensors; index++, before += num) {
            tensor *t = &e->tensors[index];
            num = t->is.resident_planes < 0 ? 0 : (num_panels(t) + SLAB_PANELS - 1) / SLAB_PANELS;
            if (slab < before + num) break;
        }
        if (index == e->num_tensors) break;
        tensor *t = &e->tensors[index];
        const int begin = (slab - before) * SLAB_PANELS;
        const int end = begin + SLAB_PANELS < num_panels(t) ? begin + SLAB_PANELS : num_panels(t);
        if (load_slab(e, file, t, begin, end, staging)) break;
        __atomic_fetch_add(&e->num_loaded, resident_bytes(t) / num_panels(t) * (end - begin), __ATOMIC_RELAXED);
    }
    munmap(staging, room);
    close(file);
    return NULL;
}

/* Load what is resident; another thread may watch engine_bytes_loaded. 0, or -1 with engine_error. */
EXPORT int engine_load(engine *e) {
    int64_t sum = 0;
    e->pieces = calloc((size_t)count_pieces(e) + 1, sizeof *e->pieces);
    if (!e->pieces) return fail(e, "out of memory"), -1;
    for (int i = 0; i < e->num_tensors; i++) sum += (resident_bytes(&e->tensors[i]) + 4095) / 4096 * 4096 + 8 * 4096;
    e->resident_bytes = sum;
    e->resident = mmap(NULL, (size_t)sum + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (e->resident == MAP_FAILED) return e->resident = NULL, fail(e, "no memory for the resident weights"), -1;
    madvise(e->resident, (size_t)sum, MADV_HUGEPAGE);
    uint8_t *place = e->resident;
    for (int i = 0; i < e->num_tensors; i++) {
        tensor *t = &e->tensors[i];
        t->num_groups = merge_plan(&t->is, t->group_widths);
        if (t->is.resident_planes < 0) continue;
        if (!is_joined(&t->is)) {
            t->scales = place;
            place += (panel_bytes(t, 0) * num_panels(t) + 63) / 64 * 64;
        }
        for (int g = 0; g < t->num_groups; g++) {
            t->groups[g] = place;
            place += group_bytes(t, g) * num_panels(t);
        }
    }
    load_job job = {e, 0};
    pthread_t others[16];
    int num = 0;
    while (num < 15 && num < e->set.num_readers - 1 && !pthread_create(&others[num], NULL, load_some_slabs, &job)) num++;
    load_some_slabs(&job);
    while (num) pthread_join(others[--num], NULL);
    if (e->failed) return -1;
    char *used = calloc((size_t)e->num_tensors + 1, 1);
    for (int i = 0; used && i < e->num_ops; i++)
        if (e->ops[i].kind == OP_MATMUL && !used[e->ops[i].weight]) cut(e, e->ops[i].weight), used[e->ops[i].weight] = 1;
    free(used);
    if (e->num_pieces) {
        for (int i = 0; i < e->num_pieces; i++)
            if (e->pieces[i].num_bytes > e->set.ring_bytes) return fail(e, "the read-ahead is smaller than one piece"), -1;
        e->reader = stream_create(e->path, e->set.direct, e->set.queued, e->set.num_readers, e->set.ring_bytes, e->pieces,
                                  e->num_pieces, e->tensors, e->checksums, e->error);
        if (!e->reader) return -1;
    }
    e->row_file = open_weights(e->path, 0);
    if (e->row_file < 0) return fail(e, "the weight store cannot be opened"), -1;
    posix_fadvise(e->row_file, 0, 0, POSIX_FADV_RANDOM);
    return 0;
}

/* Let a load that another thread runs end soon, with an error. */
EXPORT void engine_cancel(engine *e) { fail(e, "it was cancelled"); }
EXPORT int64_t engine_bytes_loaded(const engine *e) { return __atomic_load_n(&e->num_loaded, __ATOMIC_RELAXED); }
EXPORT int64_t engine_bytes_read(const engine *e) { return (e->reader ? stream_bytes_read(e->reader) : 0) + e->row_bytes_read; }
EXPORT double engine_wait_s(const engine *e) { return e->reader ? stream_wait_s(e->reader) : 0; }
EXPORT int engine_is_queued(const engine *e) { return e->reader ? stream_is_queued(e->reader) : 0; }
EXPORT double engine_op_s(const engine *e, int kind) { return e->op_s[kind]; }
/* How many threads compute at this moment. */
EXPORT int engine_threads(const engine *e) { return pool_active(e->threads); }
/* Compute with so many threads from now on, of those there are; 0: as many as are worth their while. */
EXPORT void engine_use_threads(engine *e, int num_threads) {
    crowding_begin(&e->crowd, e->set.num_threads);
    e->crowd.fixed = num_threads;
    if (num_threads) e->crowd.threads = num_threads;
    pool_use(e->threads, e->crowd.threads);
}
EXPORT int engine_num_pieces(const engine *e) { return e->num_pieces; }
/* Let drafts read only the first planes of a tensor that is streamed whole; 0 undoes it. */
EXPORT void engine_set_draft_planes(engine *e, int index, int planes) { e->tensors[index].draft_planes = planes; }

EXPORT void engine_destroy(engine *e) {
    if (!e) return;
    stream_destroy(e->reader);
    pool_destroy(e->threads);
    if (e->resident) munmap(e->resident, (size_t)e->resident_bytes + 1);
    if (e->row_file >= 0) close(e->row_file);
    for (int i = 0; i < e->num_vectors; i++) free(e->vectors[i].at), free(e->vectors[i].cosines), free(e->vectors[i].sines);
    for (int i = 0; i < e->num_buffers; i++) free(e->buffers[i].at);
    for (int t = 0; t < e->set.num_threads; t++) {
        if (e->scores) free(e->scores[t]);
        if (e->row_bytes) free(e->row_bytes[t]);
        if (e->joined) free(e->joined[t]);
    }
    for (int i = 0; e->pages && i < e->set.max_positions / KV_PAGE_TOKENS + 2; i++) free(e->pages[i]);
    free(e->tensors), free(e->vectors), free(e->buffers), free(e->ops), free(e->checksums), free(e->pieces);
    free(e->codes), free(e->scales), free(e->sums32), free(e->sums16), free(e->pages), free(e->scores), free(e->row_bytes), free(e->joined);
    free(e);
}

/* ---- Running ---------------------------------------------------------------------------------- */

/* The planes to multiply for panels of one piece, or of the resident tensor where there is none. */
static matrix_view view_of(const tensor *t, int draft, const piece *p, const uint8_t *place, uint16_t *joined) {
    const tensor_description *is = &t->is;
    matrix_view v = {.kind = is_joined(is) ? is->whole_kind : is->kind, .bits = is->bits, .scales_kind = is->scales_kind,
                     .num_rows = is->num_rows, .num_columns = is->num_columns, .scales = t->scales, .offset = is->centre,
                     .joined = joined};
    int bits = 0;
    for (int g = 0; g < t->num_groups; g++) {
        if (draft && is->whole_kind && !is_joined(is) && bits == is->bits) break; /* codes alone are faster */
        v.planes[v.num_planes] = t->groups[g];
        bits += v.widths[v.num_planes++] = t->group_widths[g];
    }
    for (int i = 0; p && i < p->num_reads; i++) {
        const int which = p->reads[i].which;
        const uint8_t *base = place + p->reads[i].at - p->begin * panel_bytes(t, which);
        if (which == 0) v.scales = base;
        else if (!draft || !t->draft_planes || which <= t->draft_planes) {
            v.planes[v.num_planes] = base;
            bits += v.widths[v.num_planes++] = is->widths[which - 1];
        }
    }
    if (is->whole_kind && bits > is->bits) v.whole = is_joined(is) ? 0 : is->whole_kind;
    else if (is->kind == KIND_CODES) v.offset += 0.5f * (float)((1 << (is->bits - bits)) - 1);
    return v;
}

static void multiply(engine *e, const op *o, const matrix_view *v, int begin, int end, int thread, int num_rows) {
    const buffer *in = &e->buffers[o->input], *out = &e->buffers[o->out];
    const activations x = {in->at, e->codes, e->scales, e->sums32, e->sums16, in->stride, e->code_stride, e->block_stride};
    const int loop = pool_share(e->threads, thread), count = end - begin;
    const int portion = count / (pool_active(e->threads) * 8) + 1;
    for (int a, b; pool_take(e->threads, loop, count, portion, &a, &b);)
        e->kernels->matmul(v, &x, begin + a, begin + b, num_rows, out->at, out->stride,
                           o->bias < 0 ? NULL : e->vectors[o->bias].at, o->accumulate);
    pool_barrier(e->threads);
}

static void run_matmul(engine *e, const op *o, int thread, int num_rows) {
    const tensor *t = &e->tensors[o->weight];
    const buffer *in = &e->buffers[o->input];
    const int draft = e->now.mode == MODE_DRAFT;
    if (o->flag) { /* quantize the input first */
        const int blocks = t->is.num_columns / BLOCK_COLUMNS, loop = pool_share(e->threads, thread);
        for (int a, b; pool_take(e->threads, loop, num_rows * blocks, blocks / 4 + 1, &a, &b);)
            while (a < b) {
                const int row = a / blocks, first = a % blocks, last = b - row * blocks < blocks ? b - row * blocks : blocks;
                const int64_t at = (int64_t)row * e->block_stride;
                e->kernels->quantize(in->at + (int64_t)row * in->stride, first, last, e->codes + (int64_t)row * e->code_stride,
                                     e->scales + at, e->sums32 + at, e->sums16 + 2 * at);
                a = row * blocks + last;
            }
        pool_barrier(e->threads);
    }
    if (t->num_pieces == 0 || (draft && !t->draft_planes && t->is.resident_planes > 0)) {
        const matrix_view v = view_of(t, draft, NULL, NULL, e->joined[thread]);
        multiply(e, o, &v, 0, num_panels(t), thread, num_rows);
        return;
    }
    for (int i = 0; i < t->num_pieces; i++) {
        const piece *p = &e->pieces[t->first_piece + i];
        if (thread == 0) {
            e->piece_at = stream_acquire(e->reader, t->first_piece + i);
            if (!e->piece_at) fail(e, stream_error(e->reader));
        }
        pool_barrier(e->threads);
        const uint8_t *place = e->piece_at;
        if (!place) return;
        const matrix_view v = view_of(t, draft, p, place, e->joined[thread]);
        multiply(e, o, &v, p->begin, p->end, thread, num_rows);
        if (thread == 0) stream_release(e->reader);
    }
}

/* A row of a matrix whose planes may lie in memory or in the file. */
static int read_row(engine *e, const tensor *t, int row, int thread, float *out) {
    const int panel = row / PANEL_ROWS;
    const uint8_t *planes[MAX_PLANES] = {0}, *scales = NULL;
    int widths[MAX_PLANES] = {0}, num = 0;
    if (!e->row_bytes[thread]) e->row_bytes[thread] = malloc((size_t)largest_slab(e));
    if (!e->row_bytes[thread]) return fail(e, "out of memory"), -1;
    uint8_t *to = e->row_bytes[thread];
    if (t->scales) scales = t->scales + panel * panel_bytes(t, 0);
    for (int g = 0; g < t->num_groups; g++) {
        widths[num] = t->group_widths[g];
        planes[num++] = t->groups[g] + panel * group_bytes(t, g);
    }
    for (int which = t->is.resident_planes + 1; which <= t->is.num_planes; which++) {
        const int64_t length = panel_bytes(t, which);
        if (length && read_range(e->row_file, to, length, extent_of(t, which)->offset + panel * length))
            return fail(e, "the weight store cannot be read, or is truncated"), -1;
        if (which == 0) scales = to;
        else widths[num] = t->is.widths[which - 1], planes[num++] = to;
        __atomic_fetch_add(&e->row_bytes_read, length, __ATOMIC_RELAXED);
        to += length;
    }
    tensor_description is = t->is;
    if (is.whole_kind) {
        if (!is_joined(&is)) {
            matrix_view v = {.bits = is.bits, .scales_kind = is.scales_kind, .num_columns = is.num_columns,
                             .num_planes = num, .whole = is.whole_kind, .scales = scales};
            memcpy(v.planes, planes, sizeof planes);
            memcpy(v.widths, widths, sizeof widths);
            e->kernels->join(&v, 0, e->joined[thread]);
            planes[0] = (const uint8_t *)e->joined[thread];
        }
        is.kind = is.whole_kind;
    }
    decode_row(&is, scales, planes, widths, num, row % PANEL_ROWS, out);
    return 0;
}

static void run_embed(engine *e, const op *o, int thread) {
    const tensor *t = &e->tensors[o->weight];
    const buffer *out = &e->buffers[o->out];
    const int loop = pool_share(e->threads, thread);
    for (int a, b; pool_take(e->threads, loop, e->now.num_tokens, 1, &a, &b);) {
        const int row = o->flag ? e->now.position + a + o->amount : e->now.tokens[a];
        float *y = out->at + (int64_t)a * out->stride;
        if (row < 0 || row >= t->is.num_rows) { fail(e, "a token or position outside the embedding"); continue; }
        if (!o->accumulate) { read_row(e, t, row, thread, y); continue; }
        float *added = new_floats(t->is.num_columns);
        if (!added) { fail(e, "out of memory"); continue; }
        read_row(e, t, row, thread, added);
        for (int i = 0; i < t->is.num_columns; i++) y[i] += added[i];
        free(added);
    }
    pool_barrier(e->threads);
}

static uint16_t *page_of(engine *e, int position) { return e->pages[position / KV_PAGE_TOKENS]; }

static void run_attention(engine *e, const op *o, int thread) {
    const buffer *q = &e->buffers[o->input], *k = &e->buffers[o->other], *v = &e->buffers[o->third], *out = &e->buffers[o->out];
    const int n = e->now.num_tokens, dim = o->head_dim;
    int loop = pool_share(e->threads, thread);
    for (int a, b; pool_take(e->threads, loop, n * o->num_kv_heads, 2, &a, &b);)
        for (; a < b; a++) {
            const int row = a / o->num_kv_heads, head = a % o->num_kv_heads, position = e->now.position + row;
            uint16_t *at = page_of(e, position) + (o->layer * o->num_kv_heads + head) * e->head_halves;
            e->kernels->store_kv(k->at + (int64_t)row * k->stride + head * dim, v->at + (int64_t)row * v->stride + head * dim,
                                 at, at + KV_PAGE_TOKENS * dim, dim, position % KV_PAGE_TOKENS);
        }
    pool_barrier(e->threads);
    loop = pool_share(e->threads, thread);
    for (int a, b; pool_take(e->threads, loop, n * o->num_heads, 1, &a, &b);) {
        const int row = a / o->num_heads, head = a % o->num_heads, position = e->now.position + row;
        const int64_t at = (o->layer * o->num_kv_heads + head / (o->num_heads / o->num_kv_heads)) * e->head_halves;
        const attention_task task = {
            .query = q->at + (int64_t)row * q->stride + head * dim,
            .pages = (const uint16_t *const *)e->pages,
            .key_at = at,
            .value_at = at + KV_PAGE_TOKENS * dim,
            .out = out->at + (int64_t)row * out->stride + head * dim,
            .scores = e->scores[thread],
            .head_dim = dim,
            .first = o->window > 0 && position >= o->window ? position - o->window + 1 : 0,
            .last = position,
            .scale = o->factor,
        };
        e->kernels->attend(&task);
    }
    pool_barrier(e->threads);
}

/* An op that treats each row apart. */
static void run_row(engine *e, const op *o, int row) {
    const buffer *in = &e->buffers[o->input], *out = &e->buffers[o->out];
    const float *x = in->at + (int64_t)row * in->stride;
    float *y = out->at + (int64_t)row * out->stride;
    const vector *w = o->weight < 0 ? NULL : &e->vectors[o->weight];
    switch (o->kind) {
    case OP_SCALE:
        for (int i = 0; i < out->width; i++) y[i] *= o->factor;
        break;
    case OP_RMS_NORM: e->kernels->rms_norm(x, y, w->at, o->eps, o->amount, in->width / o->amount); break;
    case OP_LAYER_NORM: e->kernels->layer_norm(x, y, w->at, e->vectors[o->bias].at, o->eps, in->width); break;
    case OP_ROPE:
        e->kernels->rope(y, o->num_heads, o->head_dim, 2 * w->width, o->flag, w->cosines + (int64_t)row * w->width,
                         w->sines + (int64_t)row * w->width);
        break;
    case OP_ACTIVATION: {
        const buffer *gate = o->other < 0 ? NULL : &e->buffers[o->other];
        e->kernels->activate(x, gate ? gate->at + (int64_t)row * gate->stride : NULL, y, o->flag, in->width);
        break;
    }
    case OP_ADD:
        for (int i = 0; i < in->width; i++) y[i] += x[i];
        break;
    default: break;
    }
}

static void run_rows(engine *e, const op *o, int thread, int num_rows) {
    const int loop = pool_share(e->threads, thread);
    for (int a, b; pool_take(e->threads, loop, num_rows, 1, &a, &b);) run_row(e, o, a);
    pool_barrier(e->threads);
}

static void prepare_positions(engine *e, int thread) {
    for (int i = 0; i < e->num_vectors; i++) {
        const vector *v = &e->vectors[i];
        if (!v->cosines) continue;
        for (int row = thread; row < e->now.num_tokens; row += pool_active(e->threads))
            for (int k = 0; k < v->width; k++) {
                const float angle = (float)(e->now.position + row) * v->at[k];
                v->cosines[(int64_t)row * v->width + k] = v->factor * cosf(angle);
                v->sines[(int64_t)row * v->width + k] = v->factor * sinf(angle);
            }
    }
    pool_barrier(e->threads);
}

static void run_ops(void *given, int thread) {
    engine *e = given;
    int num_rows = e->now.num_tokens;
    prepare_positions(e, thread);
    for (int i = 0; i < e->now.begin; i++)
        if (e->ops[i].kind == OP_SELECT_ROWS) num_rows = e->now.num_selected;
    for (int i = e->now.begin; i < e->now.end; i++) {
        const op *o = &e->ops[i];
        const double begin = thread == 0 ? now_s() : 0;
        if (o->kind == OP_MATMUL) run_matmul(e, o, thread, num_rows);
        else if (o->kind == OP_EMBED) run_embed(e, o, thread);
        else if (o->kind == OP_ATTENTION) run_attention(e, o, thread);
        else if (o->kind == OP_SELECT_ROWS) {
            const buffer *in = &e->buffers[o->input], *out = &e->buffers[o->out];
            num_rows = e->now.num_selected;
            for (int row = thread; row < num_rows; row += pool_active(e->threads))
                memcpy(out->at + (int64_t)row * out->stride, in->at + (int64_t)e->now.selected[row] * in->stride,
                       (size_t)in->width * sizeof(float));
            pool_barrier(e->threads);
        } else run_rows(e, o, thread, num_rows);
        if (thread == 0) e->op_s[o->kind] += now_s() - begin;
    }
}

/* Run ops [begin, end) over tokens at position, position + 1, ...; `selected` rows go on to the head.
 * 0, or -1 with engine_error. */
EXPORT int engine_run(engine *e, const int32_t *tokens, int num_tokens, int position, int begin, int end, int mode,
                      const int32_t *selected, int num_selected) {
    if (e->failed) return -1;
    if (num_tokens < 1 || num_tokens > e->set.max_tokens || position < 0 || position + num_tokens > e->set.max_positions ||
        begin < 0 || end > e->num_ops)
        return fail(e, "a run outside of what the engine was made for"), -1;
    for (int page = position / KV_PAGE_TOKENS; page <= (position + num_tokens - 1) / KV_PAGE_TOKENS; page++)
        if (!e->pages[page]) {
            e->pages[page] = (uint16_t *)new_floats(e->page_halves / 2 + 1);
            if (!e->pages[page]) return fail(e, "no memory for the KV cache"), -1;
        }
    e->now = (run_request){tokens, selected, num_tokens, position, begin, end, mode, num_selected};
    const double started = now_s(), waited = engine_wait_s(e);
    pool_run(e->threads, run_ops, e);
    /* Passes of one token through the whole model are alike: from them it learns. */
    if (num_tokens == 1 && begin == 0 && end == e->num_ops)
        crowding_learn(&e->crowd, mode, now_s() - started - (engine_wait_s(e) - waited));
    pool_use(e->threads, e->crowd.threads);
    return e->failed ? -1 : 0;
}

EXPORT float *engine_buffer(engine *e, int index, int32_t *stride) {
    *stride = e->buffers[index].stride;
    return e->buffers[index].at;
}

/* ---- For tests and the probe: one product, without a file --------------------------------------- */

EXPORT int kernels_matmul(const char *name, const tensor_description *is, int num_planes, const uint8_t *scales,
                          const uint8_t *const *planes, int merged, const float *x, int num_tokens, float *out,
                          int out_stride, const float *bias, int accumulate) {
    const kernel_table *k = kernels_named(name);
    if (!k) return -1;
    tensor t = {.is = *is, .scales = (uint8_t *)scales};
    uint8_t *owned[MAX_PLANES] = {0};
    const int64_t blocks = (int64_t)num_panels(&t) * (is->num_columns / BLOCK_COLUMNS);
    t.is.resident_planes = num_planes;
    t.num_groups = merged ? merge_plan(&t.is, t.group_widths) : num_planes;
    for (int g = 0, plane = 0; g < t.num_groups; g++) {
        int num = 0, bits = 0;
        if (!merged) t.group_widths[g] = is->widths[g];
        for (; is->kind == KIND_CODES && bits < t.group_widths[g]; num++) bits += is->widths[plane + num];
        if (num <= 1) t.groups[g] = (uint8_t *)planes[plane], num = 1;
        else {
            t.groups[g] = owned[g] = (uint8_t *)new_floats(blocks * bits * LINE_BYTES / 4);
            merge_planes(planes + plane, is->widths + plane, num, owned[g], blocks);
        }
        plane += num;
    }
    const int stride = (is->num_columns + 63) / 64 * 64, block_stride = stride / 32;
    int8_t *codes = (int8_t *)new_floats((int64_t)stride * num_tokens / 4 + 1);
    float *scales_x = new_floats((int64_t)block_stride * num_tokens), *sums32 = new_floats((int64_t)block_stride * num_tokens);
    float *sums16 = new_floats(2 * (int64_t)block_stride * num_tokens);
    for (int i = 0; is->kind == KIND_CODES && i < num_tokens; i++)
        k->quantize(x + (int64_t)i * is->num_columns, 0, is->num_columns / 32, codes + (int64_t)i * stride,
                    scales_x + i * block_stride, sums32 + i * block_stride, sums16 + 2 * i * block_stride);
    uint16_t *joined = (uint16_t *)new_floats((int64_t)is->num_columns * PANEL_ROWS / 2);
    const matrix_view v = view_of(&t, 0, NULL, NULL, joined);
    const activations a = {x, codes, scales_x, sums32, sums16, is->num_columns, stride, block_stride};
    k->matmul(&v, &a, 0, num_panels(&t), num_tokens, out, out_stride, bias, accumulate);
    for (int g = 0; g < MAX_PLANES; g++) free(owned[g]);
    free(codes), free(scales_x), free(sums32), free(sums16), free(joined);
    return 0;
}
