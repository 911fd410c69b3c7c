/* Sixteen 32-bit lanes in two AVX2 registers (AVX2, FMA, F16C). One lane is one row. */
#include <immintrin.h>

typedef struct { __m256i a, b; } vi;
typedef struct { __m256 a, b; } vf;

#define LANEWISE_VI(A, B) ((vi){A, B})
#define LANEWISE_VF(A, B) ((vf){A, B})

static inline vi vi_load(const void *p) {
    const __m256i *q = (const __m256i *)p;
    return LANEWISE_VI(_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1));
}
static inline vi vi_zero(void) { return LANEWISE_VI(_mm256_setzero_si256(), _mm256_setzero_si256()); }
static inline vi vi_add(vi x, vi y) {
    return LANEWISE_VI(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
static inline vi vi_srl(vi v, int n) {
    return LANEWISE_VI(_mm256_srli_epi32(v.a, n), _mm256_srli_epi32(v.b, n));
}
static inline vi vi_sll(vi v, int n) {
    return LANEWISE_VI(_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n));
}
static inline vi vi_pick(vi v, uint32_t mask, vi acc) {
    __m256i m = _mm256_set1_epi32((int)mask);
    return LANEWISE_VI(_mm256_or_si256(_mm256_and_si256(v.a, m), acc.a),
                       _mm256_or_si256(_mm256_and_si256(v.b, m), acc.b));
}
static inline __m256i dot_half(__m256i acc, __m256i codes, __m256i x) {
    /* Pairs of products stay below 2^15: codes here are at most 63. */
    __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline vi vi_dot_small(vi acc, vi codes, int32_t x4) {
    __m256i x = _mm256_set1_epi32(x4);
    return LANEWISE_VI(dot_half(acc.a, codes.a, x), dot_half(acc.b, codes.b, x));
}
/* Codes of 8 bits would saturate the pairs, so their nibbles are multiplied apart. */
static inline __m256i dot_half_large(__m256i acc, __m256i codes, __m256i x) {
    __m256i mask = _mm256_set1_epi8(15);
    __m256i high = _mm256_and_si256(_mm256_srli_epi32(codes, 4), mask);
    __m256i sum = dot_half(_mm256_setzero_si256(), high, x);
    return dot_half(_mm256_add_epi32(acc, _mm256_slli_epi32(sum, 4)), _mm256_and_si256(codes, mask), x);
}
static inline vi vi_dot_large(vi acc, vi codes, int32_t x4) {
    __m256i x = _mm256_set1_epi32(x4);
    return LANEWISE_VI(dot_half_large(acc.a, codes.a, x), dot_half_large(acc.b, codes.b, x));
}

static inline vf vi_to_vf(vi v) { return LANEWISE_VF(_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)); }
static inline vi vf_round_to_vi(vf v) {
    return LANEWISE_VI(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
}
static inline vf vf_zero(void) { return LANEWISE_VF(_mm256_setzero_ps(), _mm256_setzero_ps()); }
static inline vf vf_set(float f) { return LANEWISE_VF(_mm256_set1_ps(f), _mm256_set1_ps(f)); }
static inline vf vf_load(const float *p) { return LANEWISE_VF(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
static inline vf vf_add(vf x, vf y) { return LANEWISE_VF(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static inline vf vf_sub(vf x, vf y) { return LANEWISE_VF(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
static inline vf vf_mul(vf x, vf y) { return LANEWISE_VF(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static inline vf vf_div(vf x, vf y) { return LANEWISE_VF(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
static inline vf vf_fma(vf x, vf y, vf z) {
    return LANEWISE_VF(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
static inline vf vf_max(vf x, vf y) { return LANEWISE_VF(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
static inline vf vf_min(vf x, vf y) { return LANEWISE_VF(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
static inline vf vf_round(vf x) {
    return LANEWISE_VF(_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                       _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m256 power_half(__m256 n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
/* a * 2^n, n whole and within the exponents of normal numbers. */
static inline vf vf_times_power_of_two(vf x, vf n) {
    return LANEWISE_VF(_mm256_mul_ps(x.a, power_half(n.a)), _mm256_mul_ps(x.b, power_half(n.b)));
}
static inline vf vf_from_f16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    return LANEWISE_VF(_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1)));
}
static inline __m256 bf16_half(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline vf vf_from_bf16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    return LANEWISE_VF(bf16_half(_mm_loadu_si128(q)), bf16_half(_mm_loadu_si128(q + 1)));
}
static inline vf vf_from_u8(const uint8_t *p) {
    __m128i v = _mm_loadu_si128((const __m128i *)p);
    return LANEWISE_VF(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)),
                       _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))));
}
static inline vf vf_from_i8(const int8_t *p) {
    __m128i v = _mm_loadu_si128((const __m128i *)p);
    return LANEWISE_VF(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
                       _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))));
}
static inline void vf_store_f16(uint16_t *p, vf v) {
    __m128i *q = (__m128i *)p;
    _mm_storeu_si128(q, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
