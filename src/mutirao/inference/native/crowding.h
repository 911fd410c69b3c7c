/* How many threads to compute with on a machine that others use too.
 *
 * All threads meet some hundred times per token. Where another program takes a core's time, the
 * one thread without a core is waited for each time, and fewer threads are faster: with one busy
 * program on two cores, one thread is faster than two. So fewer threads are tried once, early on, and
 * again when passes become clearly slower than they were; later more again. What is kept is what was
 * faster. The result of a pass does not depend on threads. */
#ifndef MUTIRAO_CROWDING_H
#define MUTIRAO_CROWDING_H

enum { CROWDING_MODES = 2, TRIAL_PASSES = 3, FIRST_REST = 16, LONGEST_REST = 128 };

typedef struct {
    int most, threads, fixed;  /* threads: to use in the next pass; fixed: not 0, never changed */
    int settled;               /* threads outside of a trial */
    int num_passes, rest;      /* in the trial at hand, or until the next; how long to rest */
    double trial_s;            /* passes of a trial, each relative to the usual of its mode */
    int num_trials;
    struct {
        double usual_s, least_s; /* of a pass with `settled` threads; the least ever, slowly forgotten */
    } modes[CROWDING_MODES];
} crowding;

static inline void crowding_begin(crowding *c, int num_threads) {
    *c = (crowding){.most = num_threads, .threads = num_threads, .settled = num_threads, .rest = FIRST_REST};
}

/* Take the time of a pass, without its waiting for the disk, and choose the threads of the next. */
static inline void crowding_learn(crowding *c, int mode, double seconds) {
    const double slower = 1.25, faster = 0.95, forget = 1.0005;
    if (c->fixed || c->most == 1) return;
    double *usual_s = &c->modes[mode].usual_s, *least_s = &c->modes[mode].least_s;
    if (c->threads != c->settled) { /* a trial */
        c->trial_s += *usual_s > 0 ? seconds / *usual_s : 1;
        if (++c->num_passes < TRIAL_PASSES) return;
        if (c->trial_s < faster * TRIAL_PASSES) {
            c->settled = c->threads;
            for (int m = 0; m < CROWDING_MODES; m++) c->modes[m].usual_s *= c->trial_s / TRIAL_PASSES;
            c->rest = FIRST_REST;
        } else if (c->rest < LONGEST_REST) {
            c->rest *= 2;
        }
        c->threads = c->settled;
        c->num_passes = 0;
        return;
    }
    *usual_s = *usual_s > 0 ? 0.8 * *usual_s + 0.2 * seconds : seconds;
    *least_s = *least_s > 0 && *least_s * forget < seconds ? *least_s * forget : seconds;
    if (++c->num_passes < c->rest) return;
    const int step = (c->settled + 7) / 8;
    /* The first time nobody knows yet how fast passes are where nothing disturbs them. */
    const int crowded = (*usual_s > slower * *least_s || c->num_trials == 0) && c->settled > 1;
    const int can_grow = c->settled < c->most;
    c->num_passes = 0;
    c->trial_s = 0;
    if (!crowded && !can_grow) return;
    /* Down when it is slow; up again from time to time. */
    c->threads = can_grow && (!crowded || c->num_trials % 2) ? c->settled + step : c->settled - step;
    if (c->threads > c->most) c->threads = c->most;
    c->num_trials++;
}

#endif
