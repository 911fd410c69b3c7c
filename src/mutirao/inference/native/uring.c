#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { MAX_DEPTH = 256 };

struct uring {
    int file, to_submit;
    struct io_uring_params params;
    uint8_t *submissions, *completions; /* the two rings, shared with the kernel */
    size_t submissions_bytes, completions_bytes, entries_bytes;
    struct io_uring_sqe *entries;
};

static uint32_t *word(uint8_t *ring, uint32_t at) { return (uint32_t *)(ring + at); }

static uint8_t *map(int file, size_t bytes, int64_t at) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, at);
    return p == MAP_FAILED ? NULL : p;
}

uring *uring_create(int depth) {
    uring *u = calloc(1, sizeof *u);
    if (!u || depth < 1 || depth > MAX_DEPTH) {
        free(u);
        return NULL;
    }
    u->file = (int)syscall(__NR_io_uring_setup, depth, &u->params);
    if (u->file < 0) {
        free(u);
        return NULL;
    }
    const struct io_uring_params *p = &u->params;
    u->submissions_bytes = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    u->completions_bytes = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    u->entries_bytes = p->sq_entries * sizeof(struct io_uring_sqe);
    u->submissions = map(u->file, u->submissions_bytes, IORING_OFF_SQ_RING);
    u->completions = map(u->file, u->completions_bytes, IORING_OFF_CQ_RING);
    u->entries = (struct io_uring_sqe *)map(u->file, u->entries_bytes, IORING_OFF_SQES);
    if (u->submissions && u->completions && u->entries) return u;
    uring_destroy(u);
    return NULL;
}

void uring_destroy(uring *u) {
    if (!u) return;
    if (u->submissions) munmap(u->submissions, u->submissions_bytes);
    if (u->completions) munmap(u->completions, u->completions_bytes);
    if (u->entries) munmap(u->entries, u->entries_bytes);
    close(u->file);
    free(u);
}

void uring_read(uring *u, int file, void *to, uint32_t length, int64_t offset, uint64_t tag) {
    const struct io_sqring_offsets *at = &u->params.sq_off;
    uint32_t *tail = word(u->submissions, at->tail);
    const uint32_t index = *tail & *word(u->submissions, at->ring_mask);
    struct io_uring_sqe *entry = &u->entries[index];
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_READ;
    entry->fd = file;
    entry->addr = (uint64_t)(uintptr_t)to;
    entry->len = length;
    entry->off = (uint64_t)offset;
    entry->user_data = tag;
    word(u->submissions, at->array)[index] = index;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    u->to_submit++;
}

int uring_wait(uring *u, uint64_t *tag, int *result) {
    const struct io_cqring_offsets *at = &u->params.cq_off;
    uint32_t *head = word(u->completions, at->head), *tail = word(u->completions, at->tail);
    for (;;) {
        const int is_there = *head != __atomic_load_n(tail, __ATOMIC_ACQUIRE);
        if (is_there && u->to_submit == 0) break;
        const long n = syscall(__NR_io_uring_enter, u->file, u->to_submit, is_there ? 0 : 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (n >= 0) u->to_submit -= (int)n;
        else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) return 0;
    }
    const struct io_uring_cqe *entries = (const struct io_uring_cqe *)(u->completions + at->cqes);
    const struct io_uring_cqe *entry = &entries[*head & *word(u->completions, at->ring_mask)];
    *tag = entry->user_data;
    *result = entry->res;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return 1;
}
#else
struct uring { int unused; };
uring *uring_create(int depth) { (void)depth; return NULL; }
void uring_destroy(uring *u) { free(u); }
void uring_read(uring *u, int file, void *to, uint32_t length, int64_t offset, uint64_t tag) {
    (void)u, (void)file, (void)to, (void)length, (void)offset, (void)tag;
}
int uring_wait(uring *u, uint64_t *tag, int *result) { (void)u, (void)tag, (void)result; return 0; }
#endif
