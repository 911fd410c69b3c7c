/* Streamed pieces of weights, read ahead of their use in the order of use, over and over. */
#ifndef MUTIRAO_STREAM_H
#define MUTIRAO_STREAM_H

#include <stdint.h>

#include "weights.h"

/* Panels [begin, end) of those extents of a tensor that are not resident. */
typedef struct {
    int tensor, begin, end, num_reads;
    struct {
        int which;               /* 0 scales, 1 + i plane i */
        int64_t offset, length;  /* in the file */
        int64_t at;              /* from the piece's place in the ring, to the first wanted byte */
    } reads[MAX_EXTENTS];
    int64_t num_bytes;           /* room in the ring */
    int verified;
} piece;

typedef struct stream stream;

/* Read `pieces` of `tensors` from the file, into a ring of `ring_bytes`, with so many reads under
 * way: by as many threads, or, queued, by io_uring where it is allowed.
 * Null, and a sentence in `error` (200 bytes), when that cannot be. */
stream *stream_create(const char *path, int direct, int queued, int num_readers, int64_t ring_bytes, piece *pieces,
                      int num_pieces, const tensor *tensors, const uint64_t *checksums, char *error);
void stream_destroy(stream *s);
/* Wait for a piece and return its place in the ring; null after an error, told in stream_error. */
const uint8_t *stream_acquire(stream *s, int piece_index);
/* Give back the piece that was acquired. */
void stream_release(stream *s);
const char *stream_error(const stream *s);
int64_t stream_bytes_read(const stream *s);
double stream_wait_s(const stream *s);
int stream_is_queued(const stream *s);

/* Read exactly [offset, offset + length), with or without direct I/O; 0, or -1 with errno. */
int read_range(int file, uint8_t *to, int64_t length, int64_t offset);
/* Open for reading; direct: past the page cache where the file system can. */
int open_weights(const char *path, int direct);
/* Compare the slabs of panels [begin, end) of one extent with their checksums. */
int slabs_match(const tensor *t, int which, int begin, int end, const uint8_t *bytes, const uint64_t *checksums);

#endif
