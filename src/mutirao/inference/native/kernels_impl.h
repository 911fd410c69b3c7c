/* The kernels, written once over sixteen lanes; a file for each instruction set includes its
 * simd_*.h, then this, with KERNELS naming the table to fill in. Everything here is static. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#ifdef ONE_TILE_FOR_ALL /* slow lanes: small code instead of a function for each arrangement */
#define INLINE static inline
#define TILE static __attribute__((noinline))
#define UNROLL_16
#define UNROLL_8
#define UNROLL_4
#else
#define INLINE static inline __attribute__((always_inline))
#define TILE INLINE
#define UNROLL_16 _Pragma("GCC unroll 16")
#define UNROLL_8 _Pragma("GCC unroll 8")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

typedef int32_t __attribute__((may_alias)) quad; /* four 8-bit activations */

/* ---- Matrix products over integer codes ---------------------------------------------------- */

/* Merge one plane of a block into the eight vectors of codes; `at` is its lowest bit's place. */
INLINE void unpack_plane(vi codes[8], const uint8_t *lines, const int width, const int at) {
    const int per_line = 8 / width;
    const uint32_t mask = 0x01010101u * (((1u << width) - 1u) << at);
    UNROLL_8
    for (int j = 0; j < 8; j++) {
        vi line = vi_load(lines + j / per_line * LINE_BYTES);
        const int move = j % per_line * width - at;
        if (width == 8)
            codes[j] = line;
        else if (move > 0)
            codes[j] = vi_pick(vi_srl(line, move), mask, codes[j]);
        else if (move < 0)
            codes[j] = vi_pick(vi_sll(line, -move), mask, codes[j]);
        else
            codes[j] = vi_pick(line, mask, codes[j]);
    }
}

typedef struct {
    float scale[16][16];  /* by sub-block, by row */
    float offset[16][16]; /* what each unit of the activations' sum adds */
} block_scales;

/* Six-bit scales and minima of eight sub-blocks (Q4_K, Q5_K). */
INLINE void read_scales_k6(const uint8_t *group, float code_offset, block_scales *out) {
    uint8_t packed[256];
    vf d = vf_from_f16((const uint16_t *)group), d_min = vf_from_f16((const uint16_t *)(group + 32));
    vi low0 = vi_load(group + 64), low1 = vi_load(group + 128), high = vi_load(group + 192);
    const uint32_t four = 0x0f0f0f0fu, two = 0x30303030u;
    vi part[4] = {
        vi_pick(vi_sll(high, 4), two, vi_pick(low0, four, vi_zero())),
        vi_pick(vi_sll(high, 2), two, vi_pick(low1, four, vi_zero())),
        vi_pick(high, two, vi_pick(vi_srl(low0, 4), four, vi_zero())),
        vi_pick(vi_srl(high, 2), two, vi_pick(vi_srl(low1, 4), four, vi_zero())),
    };
    memcpy(packed, part, sizeof packed);
    for (int i = 0; i < 8; i++) {
        vf scale = vf_mul(d, vf_from_u8(packed + 16 * i));
        vf minimum = vf_mul(d_min, vf_from_u8(packed + 128 + 16 * i));
        vf_store(out->scale[i], scale);
        vf_store(out->offset[i], vf_sub(vf_mul(scale, vf_set(code_offset)), minimum));
    }
}

/* Eight-bit scales of sixteen sub-blocks (Q6_K). */
INLINE void read_scales_k8(const uint8_t *group, float code_offset, block_scales *out) {
    vf d = vf_from_f16((const uint16_t *)group);
    for (int i = 0; i < 16; i++) {
        vf scale = vf_mul(d, vf_from_i8((const int8_t *)group + 32 + 16 * i));
        vf_store(out->scale[i], scale);
        vf_store(out->offset[i], vf_mul(scale, vf_set(code_offset)));
    }
}

/* A power of two for each block (split floats): twice, as codes of six bits have two halves. */
INLINE void read_scales_e(const uint8_t *group, float code_offset, block_scales *out) {
    uint32_t bits[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) bits[r] = (uint32_t)group[r] << 23;
    memcpy(out->scale[0], bits, sizeof bits);
    memcpy(out->scale[1], bits, sizeof bits);
    const vf offset = vf_mul(vf_load(out->scale[0]), vf_set(code_offset));
    vf_store(out->offset[0], offset);
    vf_store(out->offset[1], offset);
}

/* One half-precision scale, with or without a minimum, for each block. */
INLINE void read_scales_h(const uint8_t *group, int with_minimum, float code_offset, block_scales *out) {
    vf scale = vf_from_f16((const uint16_t *)group);
    vf offset = vf_mul(scale, vf_set(code_offset));
    if (with_minimum) offset = vf_add(offset, vf_from_f16((const uint16_t *)(group + 32)));
    vf_store(out->scale[0], scale);
    vf_store(out->offset[0], offset);
}

/* Sixteen rows times T tokens. All but the pointers is known when this is compiled. */
TILE void codes_tile(const matrix_view *w, const activations *x, int panel, int token, vf *acc,
                       const int T, const int bits, const int w0, const int w1, const int w2,
                       const int w3, const int w4) {
    const int num_blocks = w->num_columns / BLOCK_COLUMNS;
    const int64_t panel_lines = (int64_t)panel * num_blocks;
    const uint8_t *scales = w->scales + panel * panel_scale_bytes(w->scales_kind, w->num_columns);
    const int8_t *codes_x = x->codes + (int64_t)token * x->code_stride;
    const int64_t block_x = (int64_t)token * x->block_stride;
    const float *scales_x = x->scales, *sums32 = x->sums32, *sums16 = x->sums16;
    const int code_stride = x->code_stride, block_stride = x->block_stride;
    const int scales_kind = w->scales_kind;
    const float code_offset = w->offset;
    const uint8_t *planes[MAX_PLANES];
    block_scales group;
    vf sum[16]; /* not `acc`: what a pointer leads to would be stored at every step */
    for (int p = 0; p < MAX_PLANES; p++) planes[p] = w->planes[p];
    UNROLL_16 for (int t = 0; t < T; t++) sum[t] = vf_zero();
    for (int b = 0; b < num_blocks; b++) {
        vi codes[8];
        UNROLL_8 for (int j = 0; j < 8; j++) codes[j] = vi_zero();
        const int64_t line = (panel_lines + b) * LINE_BYTES;
        unpack_plane(codes, planes[0] + line * w0, w0, bits - w0);
        if (w1) unpack_plane(codes, planes[1] + line * w1, w1, bits - w0 - w1);
        if (w2) unpack_plane(codes, planes[2] + line * w2, w2, bits - w0 - w1 - w2);
        if (w3) unpack_plane(codes, planes[3] + line * w3, w3, bits - w0 - w1 - w2 - w3);
        if (w4) unpack_plane(codes, planes[4] + line * w4, w4, 0);
        int sub = 0;
        if (scales_kind == SCALES_K6) {
            sub = b & 7;
            if (sub == 0) read_scales_k6(scales + (b >> 3) * 256, code_offset, &group);
        } else if (bits == 6 && scales_kind == SCALES_E) {
            read_scales_e(scales + b * PANEL_ROWS, code_offset, &group);
        } else if (bits == 6) {
            sub = 2 * (b & 7);
            if (sub == 0) read_scales_k8(scales + (b >> 3) * 288, code_offset, &group);
        } else if (scales_kind == SCALES_HM) {
            read_scales_h(scales + b * 64, 1, code_offset, &group);
        } else {
            read_scales_h(scales + b * 32, 0, code_offset, &group);
        }
        const vf scale = vf_load(group.scale[sub]), offset = vf_load(group.offset[sub]);
        vf scale2 = scale, offset2 = offset;
        if (bits == 6) scale2 = vf_load(group.scale[sub + 1]), offset2 = vf_load(group.offset[sub + 1]);
UNROLL_8
        for (int t = 0; t < T; t++) {
            const quad *xq = (const quad *)(codes_x + (int64_t)t * code_stride + b * BLOCK_COLUMNS);
            vi low = vi_zero(), high = vi_zero();
UNROLL_4
            for (int j = 0; j < 4; j++) {
                if (bits == 8) {
                    low = vi_dot_large(low, codes[j], xq[j]);
                    high = vi_dot_large(high, codes[j + 4], xq[j + 4]);
                } else {
                    low = vi_dot_small(low, codes[j], xq[j]);
                    high = vi_dot_small(high, codes[j + 4], xq[j + 4]);
                }
            }
            const int64_t at = block_x + (int64_t)t * block_stride + b;
            const vf scale_x = vf_set(scales_x[at]);
            if (bits == 6) {
                vf both = vf_fma(scale, vi_to_vf(low), vf_mul(scale2, vi_to_vf(high)));
                sum[t] = vf_fma(both, scale_x, sum[t]);
                sum[t] = vf_fma(offset, vf_set(sums16[2 * at]), sum[t]);
                sum[t] = vf_fma(offset2, vf_set(sums16[2 * at + 1]), sum[t]);
            } else {
                sum[t] = vf_fma(vf_mul(scale, vi_to_vf(vi_add(low, high))), scale_x, sum[t]);
                sum[t] = vf_fma(offset, vf_set(sums32[at]), sum[t]);
            }
        }
    }
    UNROLL_16 for (int t = 0; t < T; t++) acc[t] = sum[t];
}

/* ---- Matrix products over floats ----------------------------------------------------------- */

INLINE vf float_column(const matrix_view *w, int64_t at, const int kind) {
    if (kind == KIND_F32) return vf_load((const float *)w->planes[0] + at);
    if (kind == KIND_F16) return vf_from_f16((const uint16_t *)w->planes[0] + at);
    return vf_from_bf16((const uint16_t *)w->planes[0] + at);
}

/* Four sums, by column modulo 4, hide the latency of the additions. */
TILE void floats_tile(const matrix_view *w, const activations *x, int panel, int token, vf *acc,
                        const int T, const int kind) {
    vf sum[4][4];
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < T; t++) sum[i][t] = vf_zero();
    const int64_t base = (int64_t)panel * w->num_columns;
    int c = 0;
    for (; c + 4 <= w->num_columns; c += 4)
UNROLL_4
        for (int i = 0; i < 4; i++) {
            const vf column = float_column(w, (base + c + i) * PANEL_ROWS, kind);
UNROLL_4
            for (int t = 0; t < T; t++)
                sum[i][t] = vf_fma(column, vf_set(x->x[(int64_t)(token + t) * x->x_stride + c + i]), sum[i][t]);
        }
    for (int i = 0; c + i < w->num_columns; i++)
        for (int t = 0; t < T; t++)
            sum[i][t] = vf_fma(float_column(w, (base + c + i) * PANEL_ROWS, kind),
                               vf_set(x->x[(int64_t)(token + t) * x->x_stride + c + i]), sum[i][t]);
    for (int t = 0; t < T; t++)
        acc[t] = vf_add(vf_add(sum[0][t], sum[1][t]), vf_add(sum[2][t], sum[3][t]));
}

/* ---- One function for each number of tokens and arrangement of planes ------------------------ */

typedef void tile_function(const matrix_view *w, const activations *x, int panel, int token, vf *acc);

#define CODES_TILE(T, bits, w0, w1, w2, w3, w4)                                                      \
    static void tile_##T##_##bits##_##w0##w1##w2##w3##w4(const matrix_view *w, const activations *x, \
                                                          int panel, int token, vf *acc) {           \
        codes_tile(w, x, panel, token, acc, T, bits, w0, w1, w2, w3, w4);                            \
    }
#ifdef HAS_WIDE_TILE /* enough registers for sixteen tokens */
#define WIDE_TILE(bits, w0, w1, w2, w3, w4) CODES_TILE(16, bits, w0, w1, w2, w3, w4)
#define WIDE_NAME(bits, w0, w1, w2, w3, w4) tile_16_##bits##_##w0##w1##w2##w3##w4
#else
#define WIDE_TILE(bits, w0, w1, w2, w3, w4)
#define WIDE_NAME(bits, w0, w1, w2, w3, w4) 0
#endif
#define CODES_TILES(bits, w0, w1, w2, w3, w4) \
    WIDE_TILE(bits, w0, w1, w2, w3, w4)       \
    CODES_TILE(1, bits, w0, w1, w2, w3, w4)   \
    CODES_TILE(2, bits, w0, w1, w2, w3, w4)   \
    CODES_TILE(4, bits, w0, w1, w2, w3, w4)   \
    CODES_TILE(8, bits, w0, w1, w2, w3, w4)
#define FLOATS_TILE(T, kind)                                                                            \
    static void tile_##T##_##kind(const matrix_view *w, const activations *x, int panel, int token, \
                                  vf *acc) {                                                            \
        floats_tile(w, x, panel, token, acc, T, kind);                                                  \
    }
#define FLOATS_TILES(kind) FLOATS_TILE(1, kind) FLOATS_TILE(2, kind) FLOATS_TILE(4, kind)

/* bits of a code, then the planes' widths: all resident, base and residual, base alone. */
#define ARRANGEMENTS(X)                                                                             \
    X(4, 4, 0, 0, 0, 0) X(4, 2, 1, 1, 0, 0) X(4, 2, 1, 0, 0, 0) X(4, 2, 0, 0, 0, 0)                 \
    X(5, 4, 1, 0, 0, 0) X(5, 2, 1, 1, 1, 0) X(5, 2, 1, 1, 0, 0) X(5, 4, 0, 0, 0, 0) X(5, 2, 1, 0, 0, 0) X(5, 2, 0, 0, 0, 0) \
    X(6, 4, 2, 0, 0, 0) X(6, 2, 1, 1, 2, 0) X(6, 2, 1, 1, 0, 0) X(6, 4, 0, 0, 0, 0) X(6, 2, 1, 0, 0, 0) X(6, 2, 0, 0, 0, 0) \
    X(8, 8, 0, 0, 0, 0) X(8, 4, 2, 2, 0, 0) X(8, 2, 1, 1, 2, 2) X(8, 4, 2, 0, 0, 0) X(8, 4, 0, 0, 0, 0) \
    X(8, 2, 1, 1, 2, 0) X(8, 2, 1, 1, 0, 0) X(8, 2, 1, 0, 0, 0) X(8, 2, 0, 0, 0, 0)

ARRANGEMENTS(CODES_TILES)
FLOATS_TILES(KIND_F32)
FLOATS_TILES(KIND_F16)
FLOATS_TILES(KIND_BF16)

typedef struct {
    int bits, widths[MAX_PLANES];
    tile_function *tiles[5]; /* for 1, 2, 4, 8 and 16 tokens; some may be missing */
} arrangement;

#define ARRANGEMENT(bits, w0, w1, w2, w3, w4)                                                       \
    {bits, {w0, w1, w2, w3, w4},                                                                    \
     {tile_1_##bits##_##w0##w1##w2##w3##w4, tile_2_##bits##_##w0##w1##w2##w3##w4,                   \
      tile_4_##bits##_##w0##w1##w2##w3##w4, tile_8_##bits##_##w0##w1##w2##w3##w4,                   \
      WIDE_NAME(bits, w0, w1, w2, w3, w4)}},

static const arrangement ARRANGED[] = {ARRANGEMENTS(ARRANGEMENT)};

#define FLOAT_TILES_OF(kind) {tile_1_##kind, tile_2_##kind, tile_4_##kind, 0, 0}
static tile_function *const FLOAT_TILES[3][5] = {
    FLOAT_TILES_OF(KIND_F32), FLOAT_TILES_OF(KIND_F16), FLOAT_TILES_OF(KIND_BF16)};

static tile_function *const *tiles_of(const matrix_view *w) {
    if (w->kind != KIND_CODES) return FLOAT_TILES[w->kind - KIND_F32];
    for (unsigned i = 0; i < sizeof ARRANGED / sizeof *ARRANGED; i++) {
        const arrangement *a = &ARRANGED[i];
        int same = a->bits == w->bits;
        for (int p = 0; p < MAX_PLANES; p++)
            same &= a->widths[p] == (p < w->num_planes ? w->widths[p] : 0);
        if (same) return a->tiles;
    }
    return 0;
}

/* ---- Split floats --------------------------------------------------------------------------- */

typedef uint16_t halves __attribute__((vector_size(64))); /* of sixteen rows, two columns each */

INLINE halves look_up(const uint16_t table[SPLIT_CELLS], halves at) {
    halves found;
#ifdef VI_LOOK_UP_HALVES
    vi result = VI_LOOK_UP_HALVES(table, at);
    memcpy(&found, &result, sizeof found);
#else
    for (int i = 0; i < 32; i++) found[i] = table[at[i]];
#endif
    return found;
}

/* What join needs for a kind of numbers: how many of them lie from s to k s, and to (k + 1) s. */
typedef struct {
    uint16_t first[SPLIT_CELLS], after[SPLIT_CELLS];
} cell_table;

static void count_numbers(const int kind, cell_table *out) {
    int below = 0;
    for (int k = 0; k < SPLIT_CELLS; k++) {
        int octave = 0;
        while (k >> (octave + 1)) octave++;
        out->first[k] = (uint16_t)below;
        if (k) below += (1 << split_mantissa_bits(kind)) >> octave; /* those of cell 0 are endless */
        out->after[k] = (uint16_t)below;
    }
}

INLINE halves either(halves mask, halves a, halves b) { return (a & mask) | (b & ~mask); }

/* The bits of 32 numbers from codes, rests, and the bits of their blocks' s. */
INLINE halves join_numbers(halves code, halves rest, halves start, const cell_table *table, const int kind) {
    const uint16_t zero = (uint16_t)((1 << split_rest_bits(kind)) - 1);
    const halves negative = (code >> 5) - 1, cell = (code ^ negative) & (SPLIT_CELLS - 1);
    const halves first = look_up(table->first, cell), after = look_up(table->after, cell);
    const halves small = (cell << split_rest_bits(kind)) + rest - after; /* which of those below s */
    halves bits = start - 1 - small - (halves)(small > zero); /* a comparison is 0 or all ones */
    bits &= (halves)(small != zero);
    bits = either((halves)(rest < after - first), start + first + rest, bits);
    return bits | (negative & 0x8000);
}

/* Two columns of sixteen rows: lanes 2 r hold the first, lanes 2 r + 1 the second, of row r. */
INLINE void store_columns(halves numbers, uint16_t *first, uint16_t *second) {
    uint32_t pairs[PANEL_ROWS];
    uint16_t columns[2][PANEL_ROWS];
    memcpy(pairs, &numbers, sizeof pairs);
    for (int r = 0; r < PANEL_ROWS; r++) columns[0][r] = (uint16_t)pairs[r];
    for (int r = 0; r < PANEL_ROWS; r++) columns[1][r] = (uint16_t)(pairs[r] >> 16);
    memcpy(first, columns[0], sizeof columns[0]);
    memcpy(second, columns[1], sizeof columns[1]);
}

INLINE halves as_halves(vi v) {
    halves h;
    memcpy(&h, &v, sizeof h);
    return h;
}

INLINE void join_panel(const matrix_view *w, int panel, uint16_t *out, const int kind) {
    const int num_blocks = w->num_columns / BLOCK_COLUMNS, last = w->num_planes - 1;
    const uint8_t *exponents = w->scales + panel * panel_scale_bytes(w->scales_kind, w->num_columns);
    cell_table table;
    count_numbers(kind, &table);
    for (int b = 0; b < num_blocks; b++, exponents += PANEL_ROWS) {
        const int64_t line = ((int64_t)panel * num_blocks + b) * LINE_BYTES;
        const uint8_t *rest = w->planes[last] + line * w->widths[last];
        uint32_t starts[PANEL_ROWS];
        for (int r = 0; r < PANEL_ROWS; r++)
            starts[r] = (uint32_t)(exponents[r] - split_exponent_shift(kind)) * (0x10001u << split_mantissa_bits(kind));
        halves start;
        memcpy(&start, starts, sizeof start);
        vi codes[8], low[8], upper[8];
        UNROLL_8 for (int j = 0; j < 8; j++) codes[j] = upper[j] = vi_zero();
        for (int p = 0, at = w->bits; p < last; p++) {
            at -= w->widths[p];
            if (w->widths[p] == 4) unpack_plane(codes, w->planes[p] + line * 4, 4, 2);
            else if (w->widths[p] == 2 && at == 4) unpack_plane(codes, w->planes[p] + line * 2, 2, 4);
            else if (w->widths[p] == 2) unpack_plane(codes, w->planes[p] + line * 2, 2, 0);
            else if (at == 3) unpack_plane(codes, w->planes[p] + line, 1, 3);
            else unpack_plane(codes, w->planes[p] + line, 1, 2);
        }
        unpack_plane(low, rest, 8, 0);
        if (kind == KIND_F16) unpack_plane(upper, rest + 8 * LINE_BYTES, 2, 0);
        UNROLL_8
        for (int j = 0; j < 8; j++, out += 4 * PANEL_ROWS) {
            const halves c = as_halves(codes[j]), l = as_halves(low[j]), u = as_halves(upper[j]);
            const halves even = join_numbers(c & 63, (l & 255) | (u & 3) << 8, start, &table, kind);
            const halves odd = join_numbers(c >> 8, l >> 8 | (u & 0x300), start, &table, kind);
            store_columns(even, out, out + 2 * PANEL_ROWS);
            store_columns(odd, out + PANEL_ROWS, out + 3 * PANEL_ROWS);
        }
    }
}

static void join(const matrix_view *w, int panel, uint16_t *out) {
    if (w->whole == KIND_BF16) join_panel(w, panel, out, KIND_BF16);
    else join_panel(w, panel, out, KIND_F16);
}

static void matmul(const matrix_view *w, const activations *x, int begin, int end, int num_tokens,
                   float *out, int out_stride, const float *bias, int accumulate) {
    if (w->whole) {
        matrix_view panel = {.kind = w->whole, .num_rows = PANEL_ROWS, .num_columns = w->num_columns, .num_planes = 1,
                             .planes = {(const uint8_t *)w->joined}};
        for (int p = begin; p < end; p++) {
            join(w, p, w->joined);
            matmul(&panel, x, 0, 1, num_tokens, out + (int64_t)p * PANEL_ROWS, out_stride,
                   bias ? bias + p * PANEL_ROWS : NULL, accumulate);
        }
        return;
    }
    tile_function *const *tiles = tiles_of(w);
    for (int panel = begin; panel < end; panel++)
        for (int token = 0; token < num_tokens;) {
            int size = 4;
            while (!tiles[size] || token + (1 << size) > num_tokens) size--;
            vf acc[16];
            tiles[size](w, x, panel, token, acc);
            for (int t = 0; t < 1 << size; t++) {
                float *y = out + (int64_t)(token + t) * out_stride + panel * PANEL_ROWS;
                vf sum = acc[t];
                if (bias) sum = vf_add(sum, vf_load(bias + panel * PANEL_ROWS));
                if (accumulate) sum = vf_add(vf_load(y), sum);
                vf_store(y, sum);
            }
            token += 1 << size;
        }
}

/* A block whose largest value is below this has codes of zero: 127 over it may overflow. */
static const float SMALLEST_BLOCK = 1e-36f;

static void quantize(const float *x, int begin, int end, int8_t *codes, float *scales, float *sums32,
                     float *sums16) {
    for (int b = begin; b < end; b++) {
        const float *xb = x + b * BLOCK_COLUMNS;
        /* Magnitudes are ordered as their bits are, NaN above all: what is no number stays so. */
        uint32_t bits[BLOCK_COLUMNS], largest_bits = 0;
        memcpy(bits, xb, sizeof bits);
        for (int i = 0; i < BLOCK_COLUMNS; i++) {
            const uint32_t magnitude = bits[i] & 0x7fffffffu;
            largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
        }
        float largest;
        memcpy(&largest, &largest_bits, sizeof largest);
        const float scale = largest / 127.0f, inverse = largest > SMALLEST_BLOCK ? 127.0f / largest : 0;
        int sums[2] = {0, 0};
        int32_t rounded[BLOCK_COLUMNS];
        for (int i = 0; i < BLOCK_COLUMNS; i += 16) {
            vi v = vf_round_to_vi(vf_mul(vf_load(xb + i), vf_set(inverse)));
            memcpy(rounded + i, &v, 64);
        }
        for (int i = 0; i < BLOCK_COLUMNS; i++) {
            codes[b * BLOCK_COLUMNS + i] = (int8_t)rounded[i];
            sums[i / 16] += codes[b * BLOCK_COLUMNS + i];
        }
        scales[b] = scale;
        sums16[2 * b] = scale * (float)sums[0];
        sums16[2 * b + 1] = scale * (float)sums[1];
        sums32[b] = scale * (float)(sums[0] + sums[1]);
    }
}

/* ---- Norms, activations ------------------------------------------------------------------------ */

INLINE float sum_of_lanes(vf v) {
    float a[16];
    vf_store(a, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
}

INLINE float largest_lane(vf v) {
    float a[16];
    vf_store(a, v);
    for (int i = 1; i < 16; i++) a[0] = a[i] > a[0] ? a[i] : a[0];
    return a[0];
}

/* Sixteen values, or what is left of them, then zeros. */
INLINE vf load_some(const float *p, int num) {
    if (num >= 16) return vf_load(p);
    float a[16] = {0};
    memcpy(a, p, (size_t)num * sizeof(float));
    return vf_load(a);
}

INLINE void store_some(float *p, vf v, int num) {
    if (num >= 16) { vf_store(p, v); return; }
    float a[16];
    vf_store(a, v);
    memcpy(p, a, (size_t)num * sizeof(float));
}

static void rms_norm(const float *in, float *out, const float *weight, float eps, int num_groups, int width) {
    for (int g = 0; g < num_groups; g++, in += width, out += width) {
        vf squares = vf_zero();
        for (int i = 0; i < width; i += 16) {
            vf x = load_some(in + i, width - i);
            squares = vf_fma(x, x, squares);
        }
        const vf factor = vf_set(1.0f / sqrtf(sum_of_lanes(squares) / (float)width + eps));
        for (int i = 0; i < width; i += 16) {
            vf x = vf_mul(load_some(in + i, width - i), factor);
            store_some(out + i, vf_mul(x, load_some(weight + i, width - i)), width - i);
        }
    }
}

static void layer_norm(const float *in, float *out, const float *weight, const float *bias, float eps, int width) {
    vf sum = vf_zero(), squares = vf_zero();
    for (int i = 0; i < width; i += 16) sum = vf_add(sum, load_some(in + i, width - i));
    const float mean = sum_of_lanes(sum) / (float)width;
    for (int i = 0; i < width; i += 16) {
        float a[16] = {0};
        for (int k = 0; k < 16 && i + k < width; k++) a[k] = in[i + k] - mean;
        squares = vf_fma(vf_load(a), vf_load(a), squares);
    }
    const float factor = 1.0f / sqrtf(sum_of_lanes(squares) / (float)width + eps);
    for (int i = 0; i < width; i++) out[i] = (in[i] - mean) * factor * weight[i] + bias[i];
}

/* e^x: x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor polynomial of e^r to degree 7. */
INLINE vf vf_exp(vf x) {
    x = vf_max(vf_min(x, vf_set(88.0f)), vf_set(-87.0f));
    const vf n = vf_round(vf_mul(x, vf_set(1.44269504f)));
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf e = vf_set(1.0f / 5040);
    e = vf_fma(e, r, vf_set(1.0f / 720));
    e = vf_fma(e, r, vf_set(1.0f / 120));
    e = vf_fma(e, r, vf_set(1.0f / 24));
    e = vf_fma(e, r, vf_set(1.0f / 6));
    e = vf_fma(e, r, vf_set(0.5f));
    e = vf_fma(e, r, vf_set(1.0f));
    e = vf_fma(e, r, vf_set(1.0f));
    return vf_times_power_of_two(e, n);
}

INLINE vf sigmoid_times(vf x, vf z) { /* x / (1 + e^-z) */
    return vf_div(x, vf_add(vf_set(1.0f), vf_exp(vf_sub(vf_zero(), z))));
}

static void activate(const float *in, const float *gate, float *out, int function, int width) {
    for (int i = 0; i < width; i += 16) {
        const int num = width - i;
        vf x = load_some(in + i, num), y;
        if (function == ACTIVATION_SILU) {
            y = sigmoid_times(x, x);
        } else if (function == ACTIVATION_GELU_TANH) {
            /* (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
            vf inner = vf_fma(vf_mul(vf_mul(x, x), x), vf_set(0.044715f), x);
            y = sigmoid_times(x, vf_mul(inner, vf_set(1.59576912f)));
        } else if (function == ACTIVATION_GELU) {
            float a[16];
            vf_store(a, x);
            for (int k = 0; k < 16; k++) a[k] = 0.5f * a[k] * (1.0f + erff(a[k] * 0.70710678f));
            y = vf_load(a);
        } else {
            y = vf_max(vf_zero(), x); /* in this order NaN stays NaN */
        }
        if (gate) y = vf_mul(y, load_some(gate + i, num));
        store_some(out + i, y, num);
    }
}

/* ---- Positions and attention --------------------------------------------------------------------- */

static void rope(float *x, int num_heads, int head_dim, int rotary_dim, int interleaved,
                 const float *cosines, const float *sines) {
    const int half = rotary_dim / 2;
    for (int h = 0; h < num_heads; h++, x += head_dim)
        for (int i = 0; i < half; i++) {
            const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
            const float xa = x[a], xb = x[b];
            x[a] = xa * cosines[i] - xb * sines[i];
            x[b] = xb * cosines[i] + xa * sines[i];
        }
}

/* Keys lie (head_dim, 16 positions), values (16 positions, head_dim rounded up to 16). */
static void store_kv(const float *key, const float *value, uint16_t *page_keys, uint16_t *page_values,
                     int head_dim, int slot) {
    const int value_stride = (head_dim + 15) / 16 * 16;
    for (int i = 0; i < head_dim; i += 16) {
        uint16_t halves[16];
        vf_store_f16(halves, load_some(key + i, head_dim - i));
        for (int k = 0; k < 16 && i + k < head_dim; k++) page_keys[(i + k) * KV_PAGE_TOKENS + slot] = halves[k];
        vf_store_f16(page_values + (int64_t)slot * value_stride + i, load_some(value + i, head_dim - i));
    }
}

static void attend(const attention_task *task) {
    const int head_dim = task->head_dim, stride = (head_dim + 15) / 16 * 16;
    const int first_page = task->first / KV_PAGE_TOKENS, last_page = task->last / KV_PAGE_TOKENS;
    float *scores = task->scores; /* starts at first_page's first position */
    vf largest = vf_set(-INFINITY);
    for (int page = first_page; page <= last_page; page++) {
        const uint16_t *keys = task->pages[page] + task->key_at;
        vf even = vf_zero(), odd = vf_zero();
        int d = 0;
        for (; d + 2 <= head_dim; d += 2) {
            even = vf_fma(vf_from_f16(keys + d * 16), vf_set(task->query[d]), even);
            odd = vf_fma(vf_from_f16(keys + d * 16 + 16), vf_set(task->query[d + 1]), odd);
        }
        if (d < head_dim) even = vf_fma(vf_from_f16(keys + d * 16), vf_set(task->query[d]), even);
        float *s = scores + (page - first_page) * KV_PAGE_TOKENS;
        vf_store(s, vf_mul(vf_add(even, odd), vf_set(task->scale)));
        for (int i = 0; i < KV_PAGE_TOKENS; i++) {
            const int position = page * KV_PAGE_TOKENS + i;
            if (position < task->first || position > task->last) s[i] = -INFINITY;
        }
        largest = vf_max(vf_load(s), largest);
    }
    const vf top = vf_set(largest_lane(largest));
    const int num_pages = last_page - first_page + 1;
    vf total = vf_zero();
    for (int i = 0; i < num_pages * KV_PAGE_TOKENS; i += 16) {
        vf e = vf_exp(vf_sub(vf_load(scores + i), top));
        vf_store(scores + i, e);
    }
    for (int i = 0; i < task->first % KV_PAGE_TOKENS; i++) scores[i] = 0;
    for (int i = task->last - first_page * KV_PAGE_TOKENS + 1; i < num_pages * KV_PAGE_TOKENS; i++) scores[i] = 0;
    for (int i = 0; i < num_pages * KV_PAGE_TOKENS; i += 16) total = vf_add(total, vf_load(scores + i));
    const vf normalizer = vf_set(1.0f / sum_of_lanes(total));
    for (int begin = 0; begin < stride; begin += 64) {
        const int num = stride - begin < 64 ? (stride - begin) / 16 : 4;
        vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (int page = first_page; page <= last_page; page++) {
            const uint16_t *values = task->pages[page] + task->value_at + begin;
            const float *s = scores + (page - first_page) * KV_PAGE_TOKENS;
            const int end = page == last_page ? task->last % KV_PAGE_TOKENS + 1 : KV_PAGE_TOKENS;
            for (int i = page == first_page ? task->first % KV_PAGE_TOKENS : 0; i < end; i++) {
                const vf p = vf_set(s[i]);
                for (int k = 0; k < num; k++)
                    sum[k] = vf_fma(vf_from_f16(values + (int64_t)i * stride + k * 16), p, sum[k]);
            }
        }
        for (int k = 0; k < num; k++)
            store_some(task->out + begin + k * 16, vf_mul(sum[k], normalizer), head_dim - begin - k * 16);
    }
}

const kernel_table KERNELS = {KERNELS_NAME, matmul,   quantize, rms_norm, layer_norm,
                              rope,         store_kv, attend,   activate, join};
