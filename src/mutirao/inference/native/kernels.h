/* What the kernels compute on, and the table of functions that each instruction set fills in.
 *
 * Weights lie in panels of 16 rows, one row to a lane, in blocks of 32 columns; see
 * inference/store/planes.py for the layout. Every function treats each token apart and adds in one
 * fixed order, so a token's result does not depend on how many others come with it, on threads,
 * or on the instruction set. */
#ifndef MUTIRAO_KERNELS_H
#define MUTIRAO_KERNELS_H

#include <stdint.h>

enum { PANEL_ROWS = 16, BLOCK_COLUMNS = 32, SUPERBLOCK_COLUMNS = 256, LINE_BYTES = 64 };
enum { MAX_PLANES = 5, KV_PAGE_TOKENS = 16 };
enum { KIND_CODES, KIND_F32, KIND_F16, KIND_BF16 };
enum { SCALES_NONE, SCALES_H, SCALES_HM, SCALES_K6, SCALES_K8, SCALES_E };
enum { ACTIVATION_SILU, ACTIVATION_GELU_TANH, ACTIVATION_GELU, ACTIVATION_RELU };

/* A matrix, or those bit planes of one that are to be multiplied. */
typedef struct {
    int kind, bits, scales_kind;
    int num_rows, num_columns;
    int num_planes;
    int whole;                          /* not 0: the last plane is the rest of floats of this kind */
    int widths[MAX_PLANES];             /* bits of each plane, most significant first: 1, 2, 4, 8 or 10 */
    const uint8_t *planes[MAX_PLANES];  /* (panels, blocks, width, 64); floats: (panels, columns, 16) */
    const uint8_t *scales;              /* (panels, blocks or superblocks, bytes by kind) */
    float offset;                       /* added to each code: a centre, or the dropped bits' midpoint */
    uint16_t *joined;                   /* scratch for a panel of whole floats: (columns, 16) */
} matrix_view;

/* Activations of several tokens, plain and quantized in blocks of 32. */
typedef struct {
    const float *x;                     /* (tokens, x_stride) */
    const int8_t *codes;                /* (tokens, code_stride) */
    const float *scales;                /* (tokens, block_stride) */
    const float *sums32;                /* (tokens, block_stride): scale * sum of 32 codes */
    const float *sums16;                /* (tokens, 2 * block_stride): scale * sum of 16 codes */
    int x_stride, code_stride, block_stride;
} activations;

typedef struct {
    const float *query;                 /* (head_dim) */
    const uint16_t *const *pages;       /* page of 16 positions -> its base */
    int64_t key_at, value_at;           /* where this head's keys (head_dim, 16) and values (16, head_dim) lie in a page */
    float *out;                         /* (head_dim) */
    float *scores;                      /* scratch: at least last + 16 floats */
    int head_dim, first, last;          /* positions attended to: first..last */
    float scale;
} attention_task;

typedef struct {
    const char *name;
    /* out (tokens, out_stride) (+)= x W^T + bias, for rows of panels [begin, end). */
    void (*matmul)(const matrix_view *w, const activations *x, int begin, int end, int num_tokens,
                   float *out, int out_stride, const float *bias, int accumulate);
    /* One token's blocks [begin, end): codes, scales and sums from x (columns). */
    void (*quantize)(const float *x, int begin, int end, int8_t *codes, float *scales, float *sums32,
                     float *sums16);
    void (*rms_norm)(const float *in, float *out, const float *weight, float eps, int num_groups, int width);
    void (*layer_norm)(const float *in, float *out, const float *weight, const float *bias, float eps, int width);
    void (*rope)(float *x, int num_heads, int head_dim, int rotary_dim, int interleaved,
                 const float *cosines, const float *sines);
    void (*store_kv)(const float *key, const float *value, uint16_t *page_keys, uint16_t *page_values,
                     int head_dim, int slot);
    void (*attend)(const attention_task *task);
    void (*activate)(const float *in, const float *gate, float *out, int function, int width);
    /* One panel of split floats made whole: out (columns, 16). */
    void (*join)(const matrix_view *w, int panel, uint16_t *out);
} kernel_table;

extern const kernel_table kernels_scalar;
extern const kernel_table kernels_avx2;
extern const kernel_table kernels_avx512;

/* Bytes of one panel's scales. */
static inline int64_t panel_scale_bytes(int scales_kind, int num_columns) {
    switch (scales_kind) {
    case SCALES_H: return (int64_t)(num_columns / BLOCK_COLUMNS) * 32;
    case SCALES_HM: return (int64_t)(num_columns / BLOCK_COLUMNS) * 64;
    case SCALES_K6: return (int64_t)(num_columns / SUPERBLOCK_COLUMNS) * 256;
    case SCALES_K8: return (int64_t)(num_columns / SUPERBLOCK_COLUMNS) * 288;
    case SCALES_E: return (int64_t)(num_columns / BLOCK_COLUMNS) * 16;
    default: return 0;
    }
}

/* Bytes of one panel of a plane; width counts bits of a code, or bytes of a float times 8. */
static inline int64_t panel_plane_bytes(int kind, int width, int num_columns) {
    if (kind == KIND_CODES) return (int64_t)(num_columns / BLOCK_COLUMNS) * width * LINE_BYTES;
    return (int64_t)num_columns * PANEL_ROWS * (kind == KIND_F32 ? 4 : 2);
}

/* Split floats, see store/split_floats.py: bits of a mantissa, of a rest, and what makes a kept
 * exponent the number's own. */
enum { SPLIT_CELLS = 32 };
static inline int split_mantissa_bits(int kind) { return kind == KIND_BF16 ? 7 : 10; }
static inline int split_rest_bits(int kind) { return kind == KIND_BF16 ? 8 : 10; }
static inline int split_exponent_shift(int kind) { return kind == KIND_BF16 ? 0 : 112; }

#endif
