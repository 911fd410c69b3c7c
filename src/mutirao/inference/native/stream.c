#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "uring.h"

enum { MAX_READERS = 64, MAX_ENTRIES = 256 };

typedef struct {
    int piece, next_read, reads_left, dropped;
    int64_t at; /* in the ring */
} entry;

struct stream {
    int file, num_readers, depth, num_pieces, stopping, seeking, failed;
    uring *queue; /* or null: threads read */
    piece *pieces;
    const tensor *tensors;
    const uint64_t *checksums;
    uint8_t *ring;
    int64_t ring_bytes, head, tail; /* first byte in use; first free byte */
    entry entries[MAX_ENTRIES];     /* a queue: pieces in the ring, oldest first */
    int first, count, next_piece;
    int64_t bytes_read;
    double wait_s;
    char error[200];
    pthread_mutex_t lock;
    pthread_cond_t room, ready;
    pthread_t readers[MAX_READERS];
};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Some file systems, tmpfs among them, know no direct reads; there the page cache is used. */
int open_weights(const char *path, int direct) {
    const int file = direct ? open(path, O_RDONLY | O_CLOEXEC | O_DIRECT) : -1;
    if (file >= 0 || (direct && errno != EINVAL)) return file;
    return open(path, O_RDONLY | O_CLOEXEC);
}

int read_range(int file, uint8_t *to, int64_t length, int64_t offset) {
    while (length > 0) {
        const ssize_t n = pread(file, to, (size_t)length, offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            if (n == 0) errno = ENODATA;
            return -1;
        }
        to += n, offset += n, length -= n;
    }
    return 0;
}

int slabs_match(const tensor *t, int which, int begin, int end, const uint8_t *bytes, const uint64_t *checksums) {
    const int64_t stride = panel_bytes(t, which);
    const extent *e = extent_of(t, which);
    for (int p = begin; p < end; p += SLAB_PANELS) {
        const int last = p + SLAB_PANELS < num_panels(t) ? p + SLAB_PANELS : num_panels(t);
        const uint64_t sum = checksum(bytes + (p - begin) * stride, (last - p) * stride);
        if (sum != checksums[e->first_checksum + p / SLAB_PANELS]) return 0;
    }
    return 1;
}

static entry *entry_at(stream *s, int i) { return &s->entries[(s->first + i) % MAX_ENTRIES]; }

/* Find room for the next piece behind the newest; pieces lie whole, so the end may stay unused. */
static int place_next(stream *s) {
    const int64_t size = s->pieces[s->next_piece].num_bytes;
    int64_t at = s->tail;
    if (s->count == MAX_ENTRIES) return 0;
    if (s->count == 0) {
        s->head = 0, at = 0;
    } else if (s->tail > s->head) {
        if (at + size > s->ring_bytes) {
            if (size > s->head) return 0;
            at = 0;
        }
    } else if (at + size > s->head) {
        return 0;
    }
    *entry_at(s, s->count) = (entry){s->next_piece, 0, s->pieces[s->next_piece].num_reads, 0, at};
    s->count++;
    s->tail = at + size;
    s->next_piece = (s->next_piece + 1) % s->num_pieces;
    return 1;
}

static entry *find_unread(stream *s) {
    for (int i = 0; i < s->count; i++) {
        entry *e = entry_at(s, i);
        if (e->next_read < s->pieces[e->piece].num_reads) return e;
    }
    return !s->seeking && place_next(s) ? entry_at(s, s->count - 1) : NULL;
}

static void fail(stream *s, const char *what, int code) {
    if (!s->failed) snprintf(s->error, sizeof s->error, "%s%s%s", what, code ? ": " : "", code ? strerror(code) : "");
    s->failed = 1;
    pthread_cond_broadcast(&s->ready);
    pthread_cond_broadcast(&s->room);
}

/* One read under way. */
typedef struct {
    entry *e;
    piece *p;
    int read, verify;
    uint8_t *to; /* where the file's page goes; the wanted bytes begin `skipped` later */
    int64_t skipped;
} job;

static job begin_read(stream *s, entry *e) {
    piece *p = &s->pieces[e->piece];
    const int read = e->next_read++;
    const int64_t skipped = p->reads[read].at % PAGE_BYTES;
    return (job){e, p, read, !p->verified, s->ring + e->at + p->reads[read].at - skipped, skipped};
}

static int is_altered(const stream *s, const job *j) {
    return j->verify && !slabs_match(&s->tensors[j->p->tensor], j->p->reads[j->read].which, j->p->begin, j->p->end,
                                     j->to + j->skipped, s->checksums);
}

/* With the lock held. */
static void end_read(stream *s, const job *j, int wrong, int altered) {
    if (wrong) fail(s, "the weight store cannot be read", wrong);
    if (altered) fail(s, "the weight store is damaged: a checksum does not match", 0);
    s->bytes_read += j->p->reads[j->read].length;
    if (--j->e->reads_left == 0) {
        if (!j->e->dropped) j->p->verified = 1;
        pthread_cond_broadcast(&s->ready);
    }
}

static int read_now(stream *s, const job *j) {
    return read_range(s->file, j->to, j->p->reads[j->read].length, j->p->reads[j->read].offset) ? errno : 0;
}

static void *read_ahead(void *given) {
    stream *s = given;
    pthread_mutex_lock(&s->lock);
    while (!s->stopping) {
        entry *e = s->failed ? NULL : find_unread(s);
        if (!e) {
            pthread_cond_wait(&s->room, &s->lock);
            continue;
        }
        const job j = begin_read(s, e);
        pthread_mutex_unlock(&s->lock);
        const int wrong = read_now(s, &j), altered = !wrong && is_altered(s, &j);
        pthread_mutex_lock(&s->lock);
        end_read(s, &j, wrong, altered);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* The same by one thread, with many reads under way in the kernel. */
static void *read_ahead_queued(void *given) {
    stream *s = given;
    job jobs[MAX_READERS];
    int is_free[MAX_READERS], under_way = 0;
    for (int i = 0; i < MAX_READERS; i++) is_free[i] = 1;
    pthread_mutex_lock(&s->lock);
    while (!s->stopping || under_way) {
        entry *e;
        while (!s->failed && !s->stopping && under_way < s->depth && (e = find_unread(s))) {
            int slot = 0;
            while (!is_free[slot]) slot++;
            const job j = jobs[slot] = begin_read(s, e);
            is_free[slot] = 0, under_way++;
            uring_read(s->queue, s->file, j.to, (uint32_t)j.p->reads[j.read].length, j.p->reads[j.read].offset, (uint64_t)slot);
        }
        if (!under_way) {
            pthread_cond_wait(&s->room, &s->lock);
            continue;
        }
        pthread_mutex_unlock(&s->lock);
        uint64_t slot = 0;
        int result = 0;
        if (!uring_wait(s->queue, &slot, &result)) { /* the buffers stay the kernel's */
            pthread_mutex_lock(&s->lock);
            fail(s, "the queue of reads broke down", errno);
            break;
        }
        const job j = jobs[slot];
        /* Short, refused or unknown to this kernel: read once more, as the threads do. */
        const int wrong = result == j.p->reads[j.read].length ? 0 : read_now(s, &j);
        const int altered = !wrong && is_altered(s, &j);
        is_free[slot] = 1, under_way--;
        pthread_mutex_lock(&s->lock);
        end_read(s, &j, wrong, altered);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* Begin anew at another piece, once what is being read has come. */
static void seek(stream *s, int piece_index) {
    s->seeking = 1;
    for (int i = 0; i < s->count; i++) { /* reads not begun are dropped */
        entry *e = entry_at(s, i);
        const int num = s->pieces[e->piece].num_reads;
        e->reads_left -= num - e->next_read;
        e->next_read = num;
        e->dropped = 1;
    }
    for (int i = 0; i < s->count; i++)
        while (entry_at(s, i)->reads_left > 0 && !s->failed) pthread_cond_wait(&s->ready, &s->lock);
    s->seeking = s->first = s->count = 0;
    s->head = s->tail = 0;
    s->next_piece = piece_index;
    pthread_cond_broadcast(&s->room);
}

const uint8_t *stream_acquire(stream *s, int piece_index) {
    const double begin = now_s();
    pthread_mutex_lock(&s->lock);
    if (s->count == 0 ? s->next_piece != piece_index : entry_at(s, 0)->piece != piece_index) seek(s, piece_index);
    while (!s->failed && (s->count == 0 || entry_at(s, 0)->reads_left > 0)) pthread_cond_wait(&s->ready, &s->lock);
    const uint8_t *place = s->failed ? NULL : s->ring + entry_at(s, 0)->at;
    s->wait_s += now_s() - begin;
    pthread_mutex_unlock(&s->lock);
    return place;
}

void stream_release(stream *s) {
    pthread_mutex_lock(&s->lock);
    if (s->count) {
        s->first = (s->first + 1) % MAX_ENTRIES;
        s->count--;
        s->head = s->count ? entry_at(s, 0)->at : 0;
    }
    pthread_cond_broadcast(&s->room);
    pthread_mutex_unlock(&s->lock);
}

const char *stream_error(const stream *s) { return s->error; }
int64_t stream_bytes_read(const stream *s) { return s->bytes_read; }
double stream_wait_s(const stream *s) { return s->wait_s; }

stream *stream_create(const char *path, int direct, int queued, int num_readers, int64_t ring_bytes, piece *pieces,
                      int num_pieces, const tensor *tensors, const uint64_t *checksums, char *error) {
    stream *s = calloc(1, sizeof *s);
    if (!s || num_readers < 1 || num_readers > MAX_READERS) {
        free(s);
        snprintf(error, 200, "readers are made for 1 to %d threads", MAX_READERS);
        return NULL;
    }
    s->pieces = pieces, s->num_pieces = num_pieces, s->tensors = tensors, s->checksums = checksums;
    s->ring_bytes = ring_bytes;
    s->ring = mmap(NULL, (size_t)ring_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    s->file = open_weights(path, direct);
    if (s->ring == MAP_FAILED || s->file < 0) {
        snprintf(error, 200, "%s: %s", s->file < 0 ? "the weight store cannot be opened" : "no memory for reading ahead",
                 strerror(errno));
        if (s->file >= 0) close(s->file);
        if (s->ring != MAP_FAILED) munmap(s->ring, (size_t)ring_bytes);
        free(s);
        return NULL;
    }
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->room, NULL);
    pthread_cond_init(&s->ready, NULL);
    s->depth = num_readers;
    s->queue = queued ? uring_create(num_readers) : NULL;
    for (int i = 0; i < (s->queue ? 1 : num_readers); i++) {
        if (pthread_create(&s->readers[i], NULL, s->queue ? read_ahead_queued : read_ahead, s)) {
            snprintf(error, 200, "no thread could be made for reading ahead");
            stream_destroy(s);
            return NULL;
        }
        s->num_readers++;
    }
    return s;
}

void stream_destroy(stream *s) {
    if (!s) return;
    pthread_mutex_lock(&s->lock);
    s->stopping = 1;
    pthread_cond_broadcast(&s->room);
    pthread_mutex_unlock(&s->lock);
    for (int i = 0; i < s->num_readers; i++) pthread_join(s->readers[i], NULL);
    uring_destroy(s->queue);
    close(s->file);
    munmap(s->ring, (size_t)s->ring_bytes);
    free(s);
}

int stream_is_queued(const stream *s) { return s->queue != NULL; }
