/* Sixteen 32-bit lanes in one AVX-512 register (F, BW, DQ, VL, VNNI). One lane is one row. */
#include <immintrin.h>

typedef __m512i vi;
typedef __m512 vf;

static inline vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
static inline vi vi_zero(void) { return _mm512_setzero_si512(); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
#define vi_srl(v, n) _mm512_srli_epi32(v, n)
#define vi_sll(v, n) _mm512_slli_epi32(v, n)
/* (v & mask) | acc */
#define vi_pick(v, mask, acc) _mm512_ternarylogic_epi32(v, _mm512_set1_epi32((int)(mask)), acc, 0xEA)
/* acc + four products in each lane: unsigned codes times signed activations. */
static inline vi vi_dot_small(vi acc, vi codes, int32_t x4) {
    return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(x4));
}
static inline vi vi_dot_large(vi acc, vi codes, int32_t x4) { return vi_dot_small(acc, codes, x4); }

/* 32 entries of 16 bits by 32 places. */
#define VI_LOOK_UP_HALVES(table, at) _mm512_permutexvar_epi16((__m512i)(at), vi_load(table))

static inline vf vi_to_vf(vi v) { return _mm512_cvtepi32_ps(v); }
static inline vi vf_round_to_vi(vf v) { return _mm512_cvtps_epi32(v); }
static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_set(float f) { return _mm512_set1_ps(f); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_round(vf a) { return _mm512_roundscale_ps(a, 0); }
/* a * 2^n, n whole and within the exponents of normal numbers. */
static inline vf vf_times_power_of_two(vf a, vf n) {
    vi e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(a, _mm512_castsi512_ps(e));
}
static inline vf vf_from_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vf vf_from_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vf vf_from_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vf vf_from_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void vf_store_f16(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
