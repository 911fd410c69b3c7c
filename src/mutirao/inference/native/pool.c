#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 4000, MAX_THREADS = 256, LOOPS = 4, ACTIVE_STEP = 512 };

struct pool {
    int num_threads;
    int active; /* of them at work in the function at hand; the first ones */
    pthread_t threads[MAX_THREADS];
    int loops[MAX_THREADS]; /* shared loops begun, by thread; written by their thread only */
    int loops_before;       /* the function at hand: alike for threads that sat out others */
    void (*function)(void *, int);
    void *argument;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int generation; /* of barriers */
    _Alignas(64) atomic_int started;    /* functions handed out, times ACTIVE_STEP, plus who is to run this one */
    _Alignas(64) atomic_int next[LOOPS];
    int stopping;
};

typedef struct { pool *p; int thread; } seat;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Spin for some microseconds, then sleep: readers need the processor too. */
static void wait_while(atomic_int *word, int value) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return;
        relax();
    }
    while (atomic_load_explicit(word, memory_order_acquire) == value)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void change(atomic_int *word, int by) {
    atomic_fetch_add_explicit(word, by, memory_order_release);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

void pool_barrier(pool *p) {
    const int active = p->active; /* once all are here, the caller may change it */
    if (active == 1) return;
    const int generation = atomic_load_explicit(&p->generation, memory_order_acquire);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == active - 1) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        change(&p->generation, 1);
    } else {
        wait_while(&p->generation, generation);
    }
}

static void *work(void *given) {
    seat s = *(seat *)given;
    free(given);
    int started = 0;
    for (;;) {
        wait_while(&s.p->started, started);
        /* A thread that sat out some functions may wake late: it takes the newest, or none. */
        started = atomic_load_explicit(&s.p->started, memory_order_acquire);
        if (s.p->stopping) return NULL;
        if (s.thread >= (started & (ACTIVE_STEP - 1))) continue;
        s.p->loops[s.thread] = s.p->loops_before;
        s.p->function(s.p->argument, s.thread);
        pool_barrier(s.p);
    }
}

pool *pool_create(int num_threads) {
    if (num_threads < 1 || num_threads > MAX_THREADS) return NULL;
    pool *p = aligned_alloc(64, (sizeof(pool) + 63) / 64 * 64);
    if (!p) return NULL;
    *p = (pool){.num_threads = 1, .active = 1, .started = 1};
    for (int i = 1; i < num_threads; i++) {
        seat *s = malloc(sizeof *s);
        if (s) *s = (seat){p, i};
        if (!s || pthread_create(&p->threads[i], NULL, work, s)) {
            free(s);
            pool_destroy(p);
            return NULL;
        }
        p->num_threads = i + 1;
    }
    pool_use(p, num_threads);
    return p;
}

void pool_destroy(pool *p) {
    if (!p) return;
    p->stopping = 1;
    change(&p->started, ACTIVE_STEP);
    for (int i = 1; i < p->num_threads; i++) pthread_join(p->threads[i], NULL);
    free(p);
}

void pool_use(pool *p, int num_threads) {
    p->active = num_threads < 1 ? 1 : num_threads > p->num_threads ? p->num_threads : num_threads;
}

int pool_active(const pool *p) { return p->active; }

void pool_run(pool *p, void (*function)(void *, int), void *argument) {
    p->function = function;
    p->argument = argument;
    p->loops_before = p->loops[0];
    if (p->active > 1) {
        const int was = atomic_load_explicit(&p->started, memory_order_relaxed) & (ACTIVE_STEP - 1);
        change(&p->started, ACTIVE_STEP + p->active - was);
    }
    function(argument, 0);
    pool_barrier(p);
}

/* Counters are used in turn; the one two loops ahead is not in use by anybody. */
int pool_share(pool *p, int thread) {
    const int loop = p->loops[thread]++ & (LOOPS - 1);
    if (thread == 0) atomic_store_explicit(&p->next[(loop + 2) & (LOOPS - 1)], 0, memory_order_relaxed);
    return loop;
}

int pool_take(pool *p, int loop, int count, int portion, int *begin, int *end) {
    *begin = atomic_fetch_add_explicit(&p->next[loop], portion, memory_order_relaxed);
    if (*begin >= count) return 0;
    *end = *begin + portion < count ? *begin + portion : count;
    return 1;
}
