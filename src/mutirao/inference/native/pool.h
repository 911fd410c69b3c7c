/* Threads that run one function together and meet at barriers. */
#ifndef MUTIRAO_POOL_H
#define MUTIRAO_POOL_H

typedef struct pool pool;

/* `num_threads` counts the caller, which takes part; null when threads cannot be made. */
pool *pool_create(int num_threads);
void pool_destroy(pool *p);
/* How many of the threads run the functions to come: 1 to all; not while one is running. */
void pool_use(pool *p, int num_threads);
int pool_active(const pool *p);
/* Run function(argument, thread) on every thread in use and return when all have ended. */
void pool_run(pool *p, void (*function)(void *argument, int thread), void *argument);
/* Wait until every thread of the running function is here. */
void pool_barrier(pool *p);
/* Share 0..count among the threads in portions; call again until it returns 0. Every thread must
 * begin each shared loop with pool_share(p, thread) and end it with a barrier. */
int pool_share(pool *p, int thread);
int pool_take(pool *p, int loop, int count, int portion, int *begin, int *end);

#endif
