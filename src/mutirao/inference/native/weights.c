#include "weights.h"

#include <math.h>
#include <string.h>

int num_panels(const tensor *t) { return (t->is.num_rows + PANEL_ROWS - 1) / PANEL_ROWS; }

int64_t panel_bytes(const tensor *t, int which) {
    if (which == 0) return panel_scale_bytes(t->is.scales_kind, t->is.num_columns);
    return panel_plane_bytes(t->is.kind, t->is.widths[which - 1], t->is.num_columns);
}

const extent *extent_of(const tensor *t, int which) { return which ? &t->is.planes[which - 1] : &t->is.scales; }

int is_joined(const tensor_description *is) {
    return is->whole_kind && is->joined && is->resident_planes == is->num_planes;
}

int merge_plan(const tensor_description *is, int widths[MAX_PLANES]) {
    const int resident = is->resident_planes;
    int num = 0, i = 0;
    if (resident <= 0) return 0;
    if (is_joined(is)) {
        widths[0] = 16;
        return 1;
    }
    if (is->kind == KIND_CODES && is->bits == 8 && resident == 5) {
        widths[0] = 8;
        return 1;
    }
    if (is->kind == KIND_CODES && resident >= 3) widths[num++] = 4, i = 3; /* 2 + 1 + 1 */
    for (; i < resident; i++) widths[num++] = is->widths[i];
    return num;
}

int64_t resident_bytes(const tensor *t) {
    if (t->is.resident_planes < 0) return 0;
    if (is_joined(&t->is)) return panel_plane_bytes(t->is.whole_kind, 16, t->is.num_columns) * num_panels(t);
    int64_t sum = panel_bytes(t, 0);
    for (int i = 0; i < t->is.resident_planes; i++) sum += panel_bytes(t, 1 + i);
    return sum * num_panels(t);
}

uint64_t checksum(const uint8_t *bytes, int64_t num_bytes) {
    uint64_t sum = 0;
    int64_t i = 0;
    for (; i < num_bytes / 8; i++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * i, 8);
        sum += word * (uint64_t)(2 * i + 1);
    }
    if (num_bytes % 8) {
        uint64_t word = 0;
        memcpy(&word, bytes + 8 * i, (size_t)(num_bytes % 8));
        sum += word * (uint64_t)(2 * i + 1);
    }
    return sum;
}

static inline uint64_t word_at(const uint8_t *p) {
    uint64_t w;
    memcpy(&w, p, 8);
    return w;
}

/* Eight vectors of 64 codes from one plane; `at` is the place of its lowest bit. */
static inline void spread(const uint8_t *lines, int width, int at, uint64_t codes[8][8]) {
    const int per_line = 8 / width;
    const uint64_t mask = 0x0101010101010101u * ((1u << width) - 1);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 8; i++)
            codes[j][i] |= (word_at(lines + j / per_line * LINE_BYTES + 8 * i) >> (j % per_line * width) & mask) << at;
}

void merge_planes(const uint8_t *const *planes, const int *widths, int num, uint8_t *out, int64_t count) {
    int bits = 0;
    for (int p = 0; p < num; p++) bits += widths[p];
    for (int64_t b = 0; b < count; b++) {
        uint64_t codes[8][8] = {{0}};
        int at = bits;
        for (int p = 0; p < num; p++) {
            const uint8_t *lines = planes[p] + b * widths[p] * LINE_BYTES;
            at -= widths[p];
            if (widths[p] == 1) spread(lines, 1, at, codes);
            else spread(lines, 2, at, codes);
        }
        uint8_t *to = out + b * bits * LINE_BYTES;
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 8; i++) {
                uint64_t w = codes[j][i];
                if (bits == 8) memcpy(to + j * LINE_BYTES + 8 * i, &w, 8);
                else if (j % 2 == 0) {
                    w |= codes[j + 1][i] << 4;
                    memcpy(to + j / 2 * LINE_BYTES + 8 * i, &w, 8);
                }
            }
    }
}

static float half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023, sign = (uint32_t)(h & 0x8000) << 16;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
    uint32_t bits = exponent == 31 ? sign | 0x7f800000u | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static int code_at(const tensor_description *is, const uint8_t *const *planes, const int *widths, int num,
                   int lane, int column) {
    const int block = column / BLOCK_COLUMNS, j = column % BLOCK_COLUMNS / 4, byte = 4 * lane + column % 4;
    int code = 0, at = is->bits;
    for (int p = 0; p < num; p++) {
        const int w = widths[p], per_line = 8 / w;
        const uint8_t *line = planes[p] + ((int64_t)block * w + j / per_line) * LINE_BYTES;
        at -= w;
        code |= (line[byte] >> (j % per_line * w) & ((1 << w) - 1)) << at;
    }
    return code;
}

static float code_value(const tensor_description *is, const uint8_t *scales, int lane, int column, int code) {
    const float q = (float)code + is->centre;
    const uint8_t *group;
    switch (is->scales_kind) {
    case SCALES_H: return half(scales + column / 32 * 32 + 2 * lane) * q;
    case SCALES_HM:
        group = scales + column / 32 * 64 + 2 * lane;
        return half(group) * q + half(group + 32);
    case SCALES_K6: {
        group = scales + (int64_t)(column / 256) * 256;
        const int sub = column % 256 / 32, e = sub * 16 + lane;
        const uint8_t low = group[64 + e], high = group[192 + e % 64];
        const int scale = (low & 15) | (high >> (e / 64 * 2) & 3) << 4;
        const int minimum = low >> 4 | (high >> (4 + e / 64 * 2) & 3) << 4;
        return half(group + 2 * lane) * (float)scale * q - half(group + 32 + 2 * lane) * (float)minimum;
    }
    default:
        group = scales + (int64_t)(column / 256) * 288;
        return half(group + 2 * lane) * (float)(int8_t)group[32 + column % 256 / 16 * 16 + lane] * q;
    }
}

static float float_of(int kind, uint16_t number) {
    if (kind == KIND_F16) return half((const uint8_t *)&number);
    const uint32_t bits = (uint32_t)number << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

void decode_row(const tensor_description *is, const uint8_t *scales, const uint8_t *const *planes,
                const int *widths, int num, int lane, float *out) {
    for (int c = 0; c < is->num_columns; c++) {
        const int64_t at = (int64_t)c * PANEL_ROWS + lane;
        if (is->kind == KIND_F32) {
            memcpy(out + c, planes[0] + 4 * at, 4);
        } else if (is->kind != KIND_CODES) {
            uint16_t number;
            memcpy(&number, planes[0] + 2 * at, 2);
            out[c] = float_of(is->kind, number);
        } else {
            out[c] = code_value(is, scales, lane, c, code_at(is, planes, widths, num, lane, c));
        }
    }
}
