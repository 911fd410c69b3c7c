/* What the kernels cost on this machine: products over matrices larger than the caches, attention,
 * and meeting at a barrier. For inference/planning/probe.py; nothing here is used while a model runs. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels.h"
#include "pool.h"

#define EXPORT __attribute__((visibility("default")))

/* Mirrors inference/planning/probe.py. */
typedef struct {
    int32_t kind, bits, scales_kind, num_rows, num_columns, num_planes, whole_kind;
    int32_t widths[MAX_PLANES];
} probe_matrix;

typedef struct {
    pool *threads;
    const kernel_table *kernels;
    matrix_view view;
    activations x;
    int num_threads, num_tokens;
    float *out;
    int out_stride;
    attention_task *tasks;
    int num_tasks, num_rounds;
    int row_op;
    float *rows;
    uint16_t *joined; /* a panel for each thread, where floats are split */
} probe_job;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const kernel_table *table_named(const char *name) {
    const kernel_table *const tables[] = {
#if defined(__x86_64__)
        &kernels_avx512, &kernels_avx2,
#endif
        &kernels_scalar};
    for (unsigned i = 0; i < sizeof tables / sizeof *tables; i++)
        if (!strcmp(tables[i]->name, name)) return tables[i];
    return NULL;
}

static void multiply(void *given, int thread) {
    probe_job *job = given;
    const int count = (job->view.num_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    const int portion = count / (job->num_threads * 8) + 1, loop = pool_share(job->threads, thread);
    matrix_view view = job->view;
    view.joined = job->joined + (int64_t)thread * view.num_columns * PANEL_ROWS;
    for (int a, b; pool_take(job->threads, loop, count, portion, &a, &b);)
        job->kernels->matmul(&view, &job->x, a, b, job->num_tokens, job->out, job->out_stride, NULL, 0);
    pool_barrier(job->threads);
}

static void attend(void *given, int thread) {
    probe_job *job = given;
    const int loop = pool_share(job->threads, thread);
    for (int a, b; pool_take(job->threads, loop, job->num_tasks, 1, &a, &b);) {
        attention_task task = job->tasks[a];
        job->kernels->attend(&task);
    }
    pool_barrier(job->threads);
}

static void run_rows(void *given, int thread) {
    probe_job *job = given;
    const int width = job->view.num_columns, loop = pool_share(job->threads, thread);
    for (int a, b; pool_take(job->threads, loop, job->num_rounds, 1, &a, &b);) {
        float *x = job->rows + (int64_t)thread * 4 * width;
        float *y = x + width, *sums = y + width;
        if (job->row_op == 0) job->kernels->rms_norm(x, y, x, 1e-6f, 1, width);
        else if (job->row_op == 1) job->kernels->activate(x, x, y, ACTIVATION_SILU, width);
        else job->kernels->quantize(x, 0, width / BLOCK_COLUMNS, (int8_t *)y, sums, sums + width / 8, sums + width / 4);
    }
    pool_barrier(job->threads);
}

static void meet(void *given, int thread) {
    probe_job *job = given;
    for (int i = 0; i < job->num_rounds; i++) {
        const int loop = pool_share(job->threads, thread);
        for (int a, b; pool_take(job->threads, loop, 1, 1, &a, &b);) {}
        pool_barrier(job->threads);
    }
}

static void *room(int64_t num_bytes) {
    void *p = NULL;
    const size_t size = ((size_t)num_bytes + 64) / 64 * 64;
    return posix_memalign(&p, 64, size) ? NULL : memset(p, 0, size);
}

static void repeat(probe_job *job, void (*function)(void *, int), int num, double *seconds) {
    job->num_rounds = job->num_rounds ? job->num_rounds : 1;
    pool_run(job->threads, meet, job); /* all threads are awake */
    for (int i = 0; i < num; i++) {
        const double begin = now_s();
        pool_run(job->threads, function, job);
        seconds[i] = now_s() - begin;
    }
}

/* Time `num` products of num_tokens (num_tokens, num_columns) by a matrix whose planes and scales lie in
 * bytes (num_bytes), one behind the other. 0, or -1: no memory, no such kernels, too few bytes. */
EXPORT int probe_matmul(const char *name, int num_threads, const probe_matrix *is, const uint8_t *bytes,
                        int64_t num_bytes, int num_tokens, int num, double *seconds) {
    probe_job job = {.kernels = table_named(name), .num_threads = num_threads, .num_tokens = num_tokens};
    const int64_t panels = (is->num_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    const int stride = (is->num_columns + 63) / 64 * 64, blocks = stride / BLOCK_COLUMNS;
    int64_t at = panels * panel_scale_bytes(is->scales_kind, is->num_columns);
    job.view = (matrix_view){.kind = is->kind, .bits = is->bits, .scales_kind = is->scales_kind, .num_rows = is->num_rows,
                             .num_columns = is->num_columns, .num_planes = is->num_planes, .scales = bytes};
    job.view.whole = is->whole_kind;
    for (int p = 0; p < is->num_planes; p++) {
        job.view.widths[p] = is->widths[p];
        job.view.planes[p] = bytes + at;
        at += panels * panel_plane_bytes(is->kind, is->widths[p], is->num_columns);
    }
    if (!job.kernels || at > num_bytes) return -1;
    float *x = room((int64_t)stride * num_tokens * 4), *sums = room((int64_t)blocks * num_tokens * 4 * 4);
    int8_t *codes = room((int64_t)stride * num_tokens);
    job.out_stride = (int)panels * PANEL_ROWS;
    job.out = room((int64_t)job.out_stride * num_tokens * 4);
    job.joined = room((int64_t)num_threads * is->num_columns * PANEL_ROWS * 2);
    job.threads = pool_create(num_threads);
    const int wrong = !x || !sums || !codes || !job.out || !job.joined || !job.threads;
    if (!wrong) {
        const int64_t each = (int64_t)blocks * num_tokens;
        job.x = (activations){x, codes, sums, sums + each, sums + 2 * each, stride, stride, blocks};
        repeat(&job, multiply, num, seconds);
    }
    pool_destroy(job.threads);
    free(x), free(sums), free(codes), free(job.out), free(job.joined);
    return wrong ? -1 : 0;
}

/* Time `num` rounds of attention: num_heads heads over num_positions, keys and values (float16) in bytes. */
EXPORT int probe_attention(const char *name, int num_threads, int num_heads, int head_dim, int num_positions,
                           const uint8_t *bytes, int64_t num_bytes, int num, double *seconds) {
    probe_job job = {.kernels = table_named(name), .num_threads = num_threads, .num_tasks = num_heads};
    const int num_pages = num_positions / KV_PAGE_TOKENS, dim16 = (head_dim + 15) / 16 * 16;
    const int64_t head_halves = (int64_t)KV_PAGE_TOKENS * (head_dim + dim16), page_halves = head_halves * num_heads;
    if (!job.kernels || num_pages < 1 || page_halves * 2 * num_pages > num_bytes) return -1;
    const uint16_t **pages = room((int64_t)num_pages * (int64_t)sizeof *pages);
    float *query = room((int64_t)dim16 * 4), *out = room((int64_t)dim16 * 4 * num_heads);
    float *scores = room((int64_t)(num_positions + 2 * KV_PAGE_TOKENS) * 4 * num_heads);
    job.tasks = room((int64_t)num_heads * (int64_t)sizeof *job.tasks);
    job.threads = pool_create(num_threads);
    const int wrong = !pages || !query || !out || !scores || !job.tasks || !job.threads;
    for (int i = 0; !wrong && i < num_pages; i++) pages[i] = (const uint16_t *)bytes + i * page_halves;
    for (int h = 0; !wrong && h < num_heads; h++)
        job.tasks[h] = (attention_task){.query = query, .pages = pages, .key_at = h * head_halves,
                                        .value_at = h * head_halves + KV_PAGE_TOKENS * head_dim, .out = out + h * dim16,
                                        .scores = scores + (int64_t)h * (num_positions + 2 * KV_PAGE_TOKENS),
                                        .head_dim = head_dim, .first = 0, .last = num_pages * KV_PAGE_TOKENS - 1,
                                        .scale = 1.0f};
    if (!wrong) repeat(&job, attend, num, seconds);
    pool_destroy(job.threads);
    free(pages), free(query), free(out), free(scores), free(job.tasks);
    return wrong ? -1 : 0;
}

/* Time `num` times `num_rows` rows (width) of an op that treats rows apart, shared among the threads:
 * 0 RMS norm, 1 SiLU times a gate, 2 quantizing. */
EXPORT int probe_rows(const char *name, int num_threads, int row_op, int width, int num_rows, int num, double *seconds) {
    probe_job job = {.kernels = table_named(name), .num_rounds = num_rows, .row_op = row_op};
    job.view.num_columns = width;
    job.rows = room((int64_t)num_threads * 4 * width * 4);
    job.threads = pool_create(num_threads);
    const int wrong = !job.kernels || !job.rows || !job.threads;
    for (int64_t i = 0; !wrong && i < (int64_t)num_threads * 4 * width; i++) job.rows[i] = (float)(i % 31) - 15.0f;
    if (!wrong) repeat(&job, run_rows, num, seconds);
    pool_destroy(job.threads);
    free(job.rows);
    return wrong ? -1 : 0;
}

/* Time `num` times `num_rounds` shared loops with nothing in them. */
EXPORT int probe_barriers(int num_threads, int num_rounds, int num, double *seconds) {
    probe_job job = {.num_rounds = num_rounds, .threads = pool_create(num_threads)};
    if (!job.threads) return -1;
    repeat(&job, meet, num, seconds);
    pool_destroy(job.threads);
    return 0;
}
