/* Matrices of the weight store: what of them is resident, what is streamed, and views for the
 * kernels. See inference/store/planes.py for the layout and inference/store/weight_store.py for the file. */
#ifndef MUTIRAO_WEIGHTS_H
#define MUTIRAO_WEIGHTS_H

#include <stdint.h>

#include "kernels.h"

enum { SLAB_PANELS = 16, PAGE_BYTES = 4096, MAX_EXTENTS = MAX_PLANES + 1 };

/* A range of the file; checksums counts slabs of 16 panels from `first_checksum` on. */
typedef struct {
    int64_t offset, num_bytes, first_checksum;
} extent;

/* Mirrors native/__init__.py; extents: scales first, then planes, most significant first. */
typedef struct {
    int32_t kind, bits, scales_kind, num_rows, num_columns, num_planes;
    int32_t widths[MAX_PLANES];
    int32_t resident_planes; /* -1: nothing; else the scales and this many planes */
    int32_t whole_kind;      /* not 0: split floats; the last plane is the rest of numbers of this kind */
    int32_t joined;          /* split floats that are wholly resident lie there as plain floats */
    float centre;            /* added to each code */
    extent scales, planes[MAX_PLANES];
} tensor_description;

typedef struct {
    tensor_description is;
    int draft_planes;              /* planes a draft reads; 0: those resident */
    uint8_t *scales;               /* resident, or null */
    int num_groups;                /* resident planes, adjacent ones merged */
    int group_widths[MAX_PLANES];
    uint8_t *groups[MAX_PLANES];
    int first_piece, num_pieces;   /* of the streamed rest; 0 pieces: wholly resident */
} tensor;

int num_panels(const tensor *t);
int64_t panel_bytes(const tensor *t, int which); /* which: 0 scales, 1 + i plane i; resident groups not */
const extent *extent_of(const tensor *t, int which);
/* Whether a tensor's split floats are kept as plain ones. */
int is_joined(const tensor_description *is);
/* Width by which resident planes are merged; returns the number of groups. */
int merge_plan(const tensor_description *is, int widths[MAX_PLANES]);
int64_t resident_bytes(const tensor *t);
uint64_t checksum(const uint8_t *bytes, int64_t num_bytes);
/* Merge planes of `count` blocks from the store's arrangement into one of width 4 or 8. */
void merge_planes(const uint8_t *const *planes, const int *widths, int num, uint8_t *out, int64_t count);
/* One row as floats; planes and scales point at the row's panel, widths as they lie there. */
void decode_row(const tensor_description *is, const uint8_t *scales, const uint8_t *const *planes,
                const int *widths, int num, int lane, float *out);

#endif
