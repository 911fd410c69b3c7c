/* Sixteen 32-bit lanes as an array, for any processor. The same roundings in the same order as
 * the vector variants, so that all variants agree bit for bit (fmaf rounds once everywhere). */
#include <math.h>
#include <string.h>

typedef struct { uint32_t v[16]; } vi;
typedef struct { float v[16]; } vf;

#define EACH for (int i = 0; i < 16; i++)

static inline vi vi_load(const void *p) { vi r; memcpy(&r, p, 64); return r; }
static inline vi vi_zero(void) { vi r; memset(&r, 0, 64); return r; }
static inline vi vi_add(vi a, vi b) { EACH a.v[i] += b.v[i]; return a; }
static inline vi vi_srl(vi a, int n) { EACH a.v[i] >>= n; return a; }
static inline vi vi_sll(vi a, int n) { EACH a.v[i] <<= n; return a; }
static inline vi vi_pick(vi a, uint32_t mask, vi acc) { EACH acc.v[i] |= a.v[i] & mask; return acc; }
static inline vi vi_dot_small(vi acc, vi codes, int32_t x4) {
    uint32_t x = (uint32_t)x4;
    EACH for (int k = 0; k < 32; k += 8)
        acc.v[i] += (uint32_t)((int32_t)((codes.v[i] >> k) & 255) * (int8_t)(uint8_t)(x >> k));
    return acc;
}
static inline vi vi_dot_large(vi acc, vi codes, int32_t x4) { return vi_dot_small(acc, codes, x4); }
static inline vf vi_to_vf(vi a) { vf r; EACH r.v[i] = (float)(int32_t)a.v[i]; return r; }
static inline vi vf_round_to_vi(vf a) { vi r; EACH r.v[i] = (uint32_t)(int32_t)rintf(a.v[i]); return r; }
static inline vf vf_zero(void) { vf r; memset(&r, 0, 64); return r; }
static inline vf vf_set(float f) { vf r; EACH r.v[i] = f; return r; }
static inline vf vf_load(const float *p) { vf r; memcpy(&r, p, 64); return r; }
static inline void vf_store(float *p, vf a) { memcpy(p, &a, 64); }
static inline vf vf_add(vf a, vf b) { EACH a.v[i] += b.v[i]; return a; }
static inline vf vf_sub(vf a, vf b) { EACH a.v[i] -= b.v[i]; return a; }
static inline vf vf_mul(vf a, vf b) { EACH a.v[i] *= b.v[i]; return a; }
static inline vf vf_div(vf a, vf b) { EACH a.v[i] /= b.v[i]; return a; }
static inline vf vf_fma(vf a, vf b, vf c) { EACH a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]); return a; }
static inline vf vf_max(vf a, vf b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline vf vf_min(vf a, vf b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline vf vf_round(vf a) { EACH a.v[i] = rintf(a.v[i]); return a; }
static inline vf vf_times_power_of_two(vf a, vf n) {
    EACH {
        uint32_t bits = (uint32_t)((int32_t)n.v[i] + 127) << 23;
        float power;
        memcpy(&power, &bits, 4);
        a.v[i] *= power;
    }
    return a;
}
static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 0) {
        float f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = exponent == 31 ? sign | 0x7f800000u | mantissa << 13
                          : sign | (exponent + 112) << 23 | mantissa << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint16_t float_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* subnormal: whole multiples of 2^-24, nearest even */
        float a;
        memcpy(&a, &bits, 4);
        return (uint16_t)(sign | (uint16_t)(int)rintf(a * 0x1p24f));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | (uint16_t)((bits >> 13) - (112 << 10)));
}
static inline vf vf_from_f16(const uint16_t *p) { vf r; EACH r.v[i] = f16_to_float(p[i]); return r; }
static inline vf vf_from_bf16(const uint16_t *p) {
    vf r;
    EACH {
        uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
static inline vf vf_from_u8(const uint8_t *p) { vf r; EACH r.v[i] = (float)p[i]; return r; }
static inline vf vf_from_i8(const int8_t *p) { vf r; EACH r.v[i] = (float)p[i]; return r; }
static inline void vf_store_f16(uint16_t *p, vf a) { EACH p[i] = float_to_f16(a.v[i]); }
#undef EACH
