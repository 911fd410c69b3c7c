/* A queue of reads in the kernel (io_uring), spoken to without a library. */
#ifndef MUTIRAO_URING_H
#define MUTIRAO_URING_H

#include <stdint.h>

typedef struct uring uring;

/* Null where the kernel or a sandbox does not allow it, or `depth` is none of 1..256. */
uring *uring_create(int depth);
void uring_destroy(uring *u);
/* Queue one read; `tag` comes back with its completion. At most `depth` may be under way. */
void uring_read(uring *u, int file, void *to, uint32_t length, int64_t offset, uint64_t tag);
/* Hand queued reads to the kernel and wait for at least one completion, where any is under way:
 * its tag, and the bytes read or -errno. 1, or 0 when the wait failed. */
int uring_wait(uring *u, uint64_t *tag, int *result);

#endif
