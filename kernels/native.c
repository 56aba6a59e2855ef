// One layer's attention over sinks, latents and window, for CPUs: `native.py` compiles and calls it.
//
// Latents are never dequantized. Scores are integer dot products of the codes with absorbed queries that are cut into
// 8-bit digits; values are integer sums of the codes, weighted with digits of the softmax weights. A tile of tokens is
// read once for both, while it lies in a core's caches. Mathematics: docs/method.md, "Integer attention on CPUs".
//
// All vectors are 64 bytes: one AVX-512 register, two of AVX2, or an array that the compiler vectorizes.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define TILE 256        // tokens whose softmax weights share a scale
#define QUERY_LIMIT 2047  // 12-bit queries times 13-bit matrices: 256 products stay below 2^31
#define MATRIX_LIMIT 4095
#define MAX_DIM 256

enum { FLOAT32, FLOAT16, BFLOAT16 };

typedef struct {  // mirrored in native.py, as all structs are
  const uint8_t *codes;
  const _Float16 *steps;
  int64_t batch, token, step_batch, step_token;  // strides
  int32_t bits, channels, row;                   // row: bytes of a token
} Tier;

typedef struct {
  Tier tiers[3];
  int64_t count;        // of tiers
  const void *up_proj;  // [rank, kv_heads, dim]
  int64_t up_type;
  const float *constant;  // [kv_heads, dim]
} Side;

typedef struct {  // tokens that are stored exactly; the last axis is contiguous
  const void *keys, *values;
  int64_t key_batch, key_head, key_token, value_batch, value_head, value_token;
  int64_t tokens;
  const uint8_t *mask;  // NULL: all are seen
  int64_t mask_batch, mask_query;
} Exact;

typedef struct {
  int64_t batch, q_heads, q_tokens, kv_heads, key_dim, value_dim, type;
  const void *query;
  int64_t query_batch, query_head, query_token;
  float scaling, softcap;    // softcap 0: none
  const float *sink_logits;  // [q_heads]
  Exact exact[2];            // sinks and tail
  int64_t tokens;            // latents
  Side key, value;
  const uint8_t *mask;  // of the latents
  int64_t mask_batch, mask_query;
  const float *cos, *sin;  // [1 or batch, frames, half]; NULL: not rotated
  int64_t table_batch, half, frame, interleaved;
  void *output;  // [batch, q_tokens, q_heads, value_dim]
  char *scratch;
  int64_t scratch_bytes, threads;
} Step;

// ---- 64-byte vectors ------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define INSTRUCTIONS "AVX-512 VNNI"
#define MAX_ROWS 9
typedef __m512i Bytes;
typedef __m512i Ints;
typedef __m512 Floats;

INLINE Ints zero(void) { return _mm512_setzero_si512(); }

INLINE Bytes four_rows(const uint8_t *p, int64_t a, int64_t b, int64_t c) {
  __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)),
                                        _mm_loadu_si128((const __m128i *)(p + a)), 1);
  __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(p + b))),
                                         _mm_loadu_si128((const __m128i *)(p + c)), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE Bytes transposed(Bytes rows) {
  const Bytes words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Bytes bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, rows), bytes);
}

INLINE Bytes plane(Bytes codes, int shift, int mask) {
  return _mm512_and_si512(_mm512_srl_epi16(codes, _mm_cvtsi32_si128(shift)), _mm512_set1_epi8((char)mask));
}

INLINE Bytes minus(Bytes codes, int centre) { return _mm512_sub_epi8(codes, _mm512_set1_epi8((char)centre)); }
INLINE Bytes every_lane(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }

INLINE Bytes every_word(const void *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

INLINE Bytes load(const void *p) { return _mm512_loadu_si512(p); }
INLINE Ints dot(Ints sum, Bytes u, Bytes s, int small) { return _mm512_dpbusd_epi32(sum, u, s); }
INLINE Ints dot16(Ints sum, Bytes a, Bytes b) { return _mm512_dpwssd_epi32(sum, a, b); }

INLINE void store_scaled(Ints sum, const float *factors, float factor, float *out) {
  __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(_mm512_loadu_ps(factors), _mm512_set1_ps(factor)));
  _mm512_storeu_ps(out, value);
}

INLINE void add_scaled(Ints sum, float factor, float *out) {
  _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factor), _mm512_loadu_ps(out)));
}

INLINE Floats no_floats(void) { return _mm512_setzero_ps(); }
INLINE Floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float *p, Floats x) { _mm512_storeu_ps(p, x); }
INLINE Floats load_halves(const _Float16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINE Floats times(Floats x, float factor) { return _mm512_mul_ps(x, _mm512_set1_ps(factor)); }
INLINE Floats minus_all(Floats x, float y) { return _mm512_sub_ps(x, _mm512_set1_ps(y)); }
INLINE Floats plus(Floats x, float factor, Floats y) { return _mm512_fmadd_ps(x, _mm512_set1_ps(factor), y); }
INLINE Floats plus_product(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }

INLINE Floats four_lanes(const float *p) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

INLINE void lane_sums(Floats x, float *out) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
}

#elif defined(__AVX2__) && defined(__F16C__)
#define INSTRUCTIONS "AVX2"
#define MAX_ROWS 3
typedef struct { __m256i a, b; } Bytes;
typedef Bytes Ints;
typedef struct { __m256 a, b; } Floats;

INLINE Ints zero(void) { return (Ints){_mm256_setzero_si256(), _mm256_setzero_si256()}; }

INLINE __m256i two_rows(const uint8_t *p, const uint8_t *q) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)),
                                 _mm_loadu_si128((const __m128i *)q), 1);
}

INLINE Bytes four_rows(const uint8_t *p, int64_t a, int64_t b, int64_t c) {
  return (Bytes){two_rows(p, p + a), two_rows(p + b, p + c)};
}

INLINE Bytes transposed(Bytes rows) {
  // Within each register words of its two rows alternate, then registers exchange halves, then bytes are sorted.
  const __m256i words = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i a = _mm256_permutevar8x32_epi32(rows.a, words), b = _mm256_permutevar8x32_epi32(rows.b, words);
  // a: words (0,0') (1,1') (2,2') (3,3') of tokens 0 and 1; b likewise of tokens 2 and 3.
  __m256i low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
  // low: word 0 of all, word 2 of all; high: word 1, word 3.
  return (Bytes){_mm256_shuffle_epi8(_mm256_permute2x128_si256(low, high, 0x20), bytes),
                 _mm256_shuffle_epi8(_mm256_permute2x128_si256(low, high, 0x31), bytes)};
}

INLINE Bytes plane(Bytes codes, int shift, int mask) {
  __m128i by = _mm_cvtsi32_si128(shift);
  __m256i keep = _mm256_set1_epi8((char)mask);
  return (Bytes){_mm256_and_si256(_mm256_srl_epi16(codes.a, by), keep),
                 _mm256_and_si256(_mm256_srl_epi16(codes.b, by), keep)};
}

INLINE Bytes minus(Bytes codes, int centre) {
  __m256i by = _mm256_set1_epi8((char)centre);
  return (Bytes){_mm256_sub_epi8(codes.a, by), _mm256_sub_epi8(codes.b, by)};
}

INLINE Bytes every_lane(const void *p) {
  __m256i lane = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
  return (Bytes){lane, lane};
}

INLINE Bytes every_word(const void *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return (Bytes){_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}

INLINE Bytes load(const void *p) {
  return (Bytes){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}

INLINE __m256i dot_half(__m256i sum, __m256i u, __m256i s, int small) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, u, s);
#else
  const __m256i ones = _mm256_set1_epi16(1);
  if (small) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones));
  // Two products of eight bits would overflow 16: the highest bit goes apart.
  __m256i low = _mm256_and_si256(u, _mm256_set1_epi8(127));
  __m256i top = _mm256_and_si256(_mm256_srli_epi16(u, 7), _mm256_set1_epi8(1));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, s), ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(top, s), _mm256_set1_epi16(128)));
#endif
}

INLINE Ints dot(Ints sum, Bytes u, Bytes s, int small) {
  return (Ints){dot_half(sum.a, u.a, s.a, small), dot_half(sum.b, u.b, s.b, small)};
}

INLINE Ints dot16(Ints sum, Bytes a, Bytes b) {
  return (Ints){_mm256_add_epi32(sum.a, _mm256_madd_epi16(a.a, b.a)),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(a.b, b.b))};
}

INLINE void store_scaled(Ints sum, const float *factors, float factor, float *out) {
  __m256 f = _mm256_set1_ps(factor);
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(sum.a), _mm256_mul_ps(_mm256_loadu_ps(factors), f)));
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(sum.b), _mm256_mul_ps(_mm256_loadu_ps(factors + 8), f)));
}

INLINE void add_scaled(Ints sum, float factor, float *out) {
  __m256 f = _mm256_set1_ps(factor);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum.a), f), _mm256_loadu_ps(out)));
  _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum.b), f), _mm256_loadu_ps(out + 8)));
}

INLINE Floats no_floats(void) { return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats load_floats(const float *p) { return (Floats){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

INLINE void store_floats(float *p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}

INLINE Floats load_halves(const _Float16 *p) {
  const __m128i *halves = (const __m128i *)p;
  return (Floats){_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
INLINE Floats to_floats(Ints x) { return (Floats){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

INLINE Floats times(Floats x, float factor) {
  __m256 by = _mm256_set1_ps(factor);
  return (Floats){_mm256_mul_ps(x.a, by), _mm256_mul_ps(x.b, by)};
}

INLINE Floats minus_all(Floats x, float y) {
  __m256 all = _mm256_set1_ps(y);
  return (Floats){_mm256_sub_ps(x.a, all), _mm256_sub_ps(x.b, all)};
}

INLINE Floats plus_product(Floats x, Floats y, Floats z) {
  return (Floats){_mm256_add_ps(_mm256_mul_ps(x.a, y.a), z.a), _mm256_add_ps(_mm256_mul_ps(x.b, y.b), z.b)};
}

INLINE Floats plus(Floats x, float factor, Floats y) {
  __m256 by = _mm256_set1_ps(factor);
  return plus_product(x, (Floats){by, by}, y);
}

INLINE Floats four_lanes(const float *p) {
  return (Floats){_mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0])),
                  _mm256_set_m128(_mm_set1_ps(p[3]), _mm_set1_ps(p[2]))};
}

INLINE void lane_sums(Floats x, float *out) {
  __m256 pairs = _mm256_hadd_ps(x.a, x.b);  // of lanes 0 and 2 in the low half, of 1 and 3 in the high one
  pairs = _mm256_hadd_ps(pairs, pairs);
  pairs = _mm256_permutevar8x32_ps(pairs, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_ps(out, _mm256_castps256_ps128(pairs));
}

#else
#define INSTRUCTIONS "portable C"
#define MAX_ROWS 2
typedef struct { uint8_t x[64]; } Bytes;
typedef struct { int32_t x[16]; } Ints;
typedef struct { float x[16]; } Floats;

INLINE Ints zero(void) { return (Ints){{0}}; }

INLINE Bytes four_rows(const uint8_t *p, int64_t a, int64_t b, int64_t c) {
  Bytes rows;
  memcpy(rows.x, p, 16);
  memcpy(rows.x + 16, p + a, 16);
  memcpy(rows.x + 32, p + b, 16);
  memcpy(rows.x + 48, p + c, 16);
  return rows;
}

INLINE Bytes transposed(Bytes rows) {
  Bytes columns;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) columns.x[4 * i + j] = rows.x[16 * j + i];
  return columns;
}

INLINE Bytes plane(Bytes codes, int shift, int mask) {
  for (int i = 0; i < 64; i++) codes.x[i] = (codes.x[i] >> shift) & mask;
  return codes;
}

INLINE Bytes minus(Bytes codes, int centre) {
  for (int i = 0; i < 64; i++) codes.x[i] = (uint8_t)(codes.x[i] - centre);
  return codes;
}

INLINE Bytes every_lane(const void *p) {
  Bytes lanes;
  for (int i = 0; i < 4; i++) memcpy(lanes.x + 16 * i, p, 16);
  return lanes;
}

INLINE Bytes every_word(const void *p) {
  Bytes words;
  for (int i = 0; i < 16; i++) memcpy(words.x + 4 * i, p, 4);
  return words;
}

INLINE Bytes load(const void *p) {
  Bytes bytes;
  memcpy(bytes.x, p, 64);
  return bytes;
}

INLINE Ints dot(Ints sum, Bytes u, Bytes s, int small) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) sum.x[i] += (int32_t)u.x[4 * i + j] * (int8_t)s.x[4 * i + j];
  return sum;
}

INLINE Ints dot16(Ints sum, Bytes a, Bytes b) {
  int16_t x[32], y[32];
  memcpy(x, a.x, 64);
  memcpy(y, b.x, 64);
  for (int i = 0; i < 16; i++) sum.x[i] += (int32_t)x[2 * i] * y[2 * i] + (int32_t)x[2 * i + 1] * y[2 * i + 1];
  return sum;
}

INLINE void store_scaled(Ints sum, const float *factors, float factor, float *out) {
  for (int i = 0; i < 16; i++) out[i] = (float)sum.x[i] * (factors[i] * factor);
}

INLINE void add_scaled(Ints sum, float factor, float *out) {
  for (int i = 0; i < 16; i++) out[i] += (float)sum.x[i] * factor;
}

INLINE Floats no_floats(void) { return (Floats){{0}}; }
INLINE void store_floats(float *p, Floats x) { memcpy(p, x.x, 64); }

INLINE Floats load_halves(const _Float16 *p) {
  Floats y;
  for (int i = 0; i < 16; i++) y.x[i] = (float)p[i];
  return y;
}

INLINE Floats load_floats(const float *p) {
  Floats x;
  memcpy(x.x, p, 64);
  return x;
}

INLINE Floats to_floats(Ints x) {
  Floats y;
  for (int i = 0; i < 16; i++) y.x[i] = (float)x.x[i];
  return y;
}

INLINE Floats times(Floats x, float factor) {
  for (int i = 0; i < 16; i++) x.x[i] *= factor;
  return x;
}

INLINE Floats minus_all(Floats x, float y) {
  for (int i = 0; i < 16; i++) x.x[i] -= y;
  return x;
}

INLINE Floats plus(Floats x, float factor, Floats y) {
  for (int i = 0; i < 16; i++) y.x[i] += x.x[i] * factor;
  return y;
}

INLINE Floats plus_product(Floats x, Floats y, Floats z) {
  for (int i = 0; i < 16; i++) z.x[i] += x.x[i] * y.x[i];
  return z;
}

INLINE Floats four_lanes(const float *p) {
  Floats lanes;
  for (int i = 0; i < 16; i++) lanes.x[i] = p[i / 4];
  return lanes;
}

INLINE void lane_sums(Floats x, float *out) {
  for (int i = 0; i < 4; i++) out[i] = x.x[4 * i] + x.x[4 * i + 1] + x.x[4 * i + 2] + x.x[4 * i + 3];
}
#endif

// ---- numbers --------------------------------------------------------------------------------------------------------

INLINE void to_float(const void *from, int64_t type, int64_t start, int64_t n, float *to) {
  if (type == FLOAT32) {
    memcpy(to, (const float *)from + start, (size_t)n * 4);
  } else if (type == FLOAT16) {
    const _Float16 *x = (const _Float16 *)from + start;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store_floats(to + i, load_halves(x + i));
    for (; i < n; i++) to[i] = (float)x[i];
  } else {
    const uint16_t *x = (const uint16_t *)from + start;
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = (uint32_t)x[i] << 16;
      memcpy(to + i, &bits, 4);
    }
  }
}

static void from_float(const float *from, int64_t type, int64_t start, int64_t n, void *to) {
  if (type == FLOAT32) {
    memcpy((float *)to + start, from, (size_t)n * 4);
  } else if (type == FLOAT16) {
    _Float16 *x = (_Float16 *)to + start;
    for (int64_t i = 0; i < n; i++) x[i] = (_Float16)from[i];
  } else {
    uint16_t *x = (uint16_t *)to + start;
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits;
      memcpy(&bits, from + i, 4);
      uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
      x[i] = (uint16_t)(from[i] == from[i] ? rounded : 0x7fc0);
    }
  }
}

// exp(x) for x <= 0, within 2 units in the last place; NaN stays, -inf gives 0.
INLINE float exponential(float x) {
  float kept = x < -87.0f ? -87.0f : x;
  float n = kept * 1.44269504f;
  n = (n + 12582912.0f) - 12582912.0f;  // to the nearest integer
  float r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  int32_t bits = (int32_t)((uint32_t)((int32_t)(n == n ? n : 0.0f) + 127) << 23);
  float power;
  memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// The nearest integer to a number below 2^22 in size: the sum's last bits are its digits.
INLINE int32_t nearest(float x) {
  float shifted = x + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

INLINE float highest_size(const float *x, int64_t n) {
  float most = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    float size = fabsf(x[i]);
    most = size > most ? size : most;
  }
  return most;
}

INLINE float product(const float *x, const float *y, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

// ---- what a side's channels are to the kernels: padded rows, planes apart -------------------------------------------

INLINE int64_t padded(const Tier *tier) { return (int64_t)tier->row * (8 / tier->bits); }

static int64_t width(const Side *side) {
  int64_t sum = 0;
  for (int64_t k = 0; k < side->count; k++) sum += padded(side->tiers + k);
  return (sum + 31) / 32 * 32;
}

INLINE int digits_of(const Tier *tier) { return tier->bits == 8 ? 2 : 1; }

// ---- kernels by a block of rows, each row a query; `rows` and `digits` are constants where these are inlined --------

INLINE void absorb_block(const int rows, int64_t pairs, const int16_t *matrix, const int16_t *const *query,
                         const float *scales, const float *factors, float *const *out) {
  Ints sums[MAX_ROWS][2];
  for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = zero();
  for (int64_t i = 0; i < pairs; i++) {
    Bytes left = load(matrix + 64 * i), right = load(matrix + 64 * i + 32);
    for (int r = 0; r < rows; r++) {
      Bytes pair = every_word(query[r] + 2 * i);
      sums[r][0] = dot16(sums[r][0], pair, left);
      sums[r][1] = dot16(sums[r][1], pair, right);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) store_scaled(sums[r][half], factors + 16 * half, scales[r], out[r] + 16 * half);
}

// Adds one tier's part of the scores of four tokens, four lanes a token: steps[t] * (digits · codes - centre * total[r]).
INLINE void score_tier(const int rows, const int bits, const Tier *tier, const uint8_t *codes, const int64_t *at,
                       const Floats steps, const int8_t *query, int64_t query_row, const float *scale,
                       const float *total, Floats *scores) {
  const int planes = 8 / bits, mask = (1 << bits) - 1, digits = bits == 8 ? 2 : 1;
  const int64_t row = tier->row, length = padded(tier);
  const float centre = (float)(1 << (bits - 1)) - 0.5f;
  Ints sums[MAX_ROWS], low_sums[MAX_ROWS];
  for (int r = 0; r < rows; r++) sums[r] = low_sums[r] = zero();
  for (int64_t j = 0; j < row; j += 16) {
    Bytes four = four_rows(codes + at[0] + j, at[1] - at[0], at[2] - at[0], at[3] - at[0]);
#pragma GCC unroll 4
    for (int p = 0; p < planes; p++) {
      Bytes u = plane(four, p * bits, mask);
      const int8_t *part = query + p * row + j;
#pragma GCC unroll 9
      for (int r = 0; r < rows; r++) {
        sums[r] = dot(sums[r], u, every_lane(part + r * query_row), bits < 8);
        if (digits == 2) low_sums[r] = dot(low_sums[r], u, every_lane(part + r * query_row + length), bits < 8);
      }
    }
  }
#pragma GCC unroll 9
  for (int r = 0; r < rows; r++) {
    Floats found = digits == 2 ? plus(to_floats(sums[r]), 128.0f, to_floats(low_sums[r])) : to_floats(sums[r]);
    scores[r] = plus_product(times(steps, scale[r]), minus_all(found, 0.25f * centre * total[r]), scores[r]);
  }
}

// scores[r][t] += every tier's part; `scale` and `total` stand `apart` from tier to tier.
INLINE void score_block(const int rows, const Step *s, const uint8_t *const *codes, const float *const *steps,
                        int64_t tokens, const int8_t *query, int64_t query_row, const float *scale, const float *total,
                        int64_t apart, float *scores) {
  for (int64_t t = 0; t < tokens; t += 4) {
    const int64_t left = tokens - t;  // tokens that are not there are read as the last one
    Floats sums[MAX_ROWS];
    for (int r = 0; r < rows; r++) sums[r] = no_floats();
    const int8_t *digits = query;
    for (int64_t k = 0; k < s->key.count; k++) {
      const Tier *tier = s->key.tiers + k;
      int64_t at[4];
      for (int i = 0; i < 4; i++) at[i] = (i < left ? t + i : tokens - 1) * tier->token;
      const Floats by = four_lanes(steps[k] + t);
      const float *scales = scale + k * apart, *totals = total + k * apart;
      if (tier->bits == 8)
        score_tier(rows, 8, tier, codes[k], at, by, digits, query_row, scales, totals, sums);
      else if (tier->bits == 4)
        score_tier(rows, 4, tier, codes[k], at, by, digits, query_row, scales, totals, sums);
      else
        score_tier(rows, 2, tier, codes[k], at, by, digits, query_row, scales, totals, sums);
      digits += 2 * padded(tier);
    }
    for (int r = 0; r < rows; r++) {
      float found[4];
      lane_sums(sums[r], found);
      float *to = scores + r * TILE + t;
      if (left >= 4)
        for (int i = 0; i < 4; i++) to[i] += found[i];
      else
        for (int64_t i = 0; i < left; i++) to[i] += found[i];
    }
  }
}

// sums[r][channel] += scale[r] * weights · (codes - 2^(bits-1))
INLINE void value_block(const int rows, const int digits, const int bits, const Tier *tier, const uint8_t *codes,
                        int64_t tokens, const uint8_t *weights, const float *scale, float *out, int64_t out_row) {
  const int planes = 8 / bits, mask = (1 << bits) - 1, centre = 1 << (bits - 1);
  const int64_t row = tier->row, stride = tier->token;
  for (int64_t j = 0; j < row; j += 16) {
    for (int p = 0; p < planes; p += 2) {
      Ints sums[MAX_ROWS][2];
      for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = zero();
      for (int64_t t = 0; t < tokens; t += 4) {
        int64_t last = tokens - 1 - t;  // weights of tokens that are not there are 0
        const uint8_t *from = codes + t * stride + j;
        Bytes columns = transposed(four_rows(from, (last < 1 ? last : 1) * stride, (last < 2 ? last : 2) * stride,
                                             (last < 3 ? last : 3) * stride));
        Bytes u = minus(plane(columns, p * bits, mask), centre), v = u;
        if (planes > 1) v = minus(plane(columns, (p + 1) * bits, mask), centre);
#pragma GCC unroll 9
        for (int r = 0; r < rows; r++) {
          Bytes high = every_word(weights + r * 2 * TILE + t);
          Bytes low = digits == 2 ? every_word(weights + r * 2 * TILE + TILE + t) : high;
          sums[r][0] = dot(sums[r][0], high, u, bits < 8);
          sums[r][1] = dot(sums[r][1], low, v, bits < 8);
        }
      }
      for (int r = 0; r < rows; r++) {
        float *to = out + r * out_row + p * row + j;
        add_scaled(sums[r][0], scale[r] * (digits == 2 ? 256.0f : 1.0f), to);
        add_scaled(sums[r][1], scale[r], digits == 2 ? to : to + row);
      }
    }
  }
}

#define BY_ROWS(rows, CALL) \
  switch (rows) {           \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    BY_MORE_ROWS(CALL)      \
  }
#if MAX_ROWS == 9
#define BY_MORE_ROWS(CALL)  \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL(5); break; \
    case 6: CALL(6); break; \
    case 7: CALL(7); break; \
    case 8: CALL(8); break; \
    case 9: CALL(9); break;
#elif MAX_ROWS == 3
#define BY_MORE_ROWS(CALL) case 3: CALL(3); break;
#else
#define BY_MORE_ROWS(CALL)
#endif

INLINE int64_t block_rows(int64_t rows) {  // rows in blocks of nearly equal size
  int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  return (rows + blocks - 1) / blocks;
}

static void absorb_rows(int64_t rows, int64_t pairs, const int16_t *matrix, const int16_t *const *query,
                        const float *scales, const float *factors, float *const *out) {
#define CALL(n) absorb_block(n, pairs, matrix, query, scales, factors, out)
  BY_ROWS(rows, CALL)
#undef CALL
}

static void score_rows(int64_t rows, const Step *s, const uint8_t *const *codes, const float *const *steps,
                       int64_t tokens, const int8_t *query, int64_t query_row, const float *scale, const float *total,
                       int64_t apart, float *scores) {
#define CALL(n) score_block(n, s, codes, steps, tokens, query, query_row, scale, total, apart, scores)
  BY_ROWS(rows, CALL)
#undef CALL
}

#define VALUES(name)                                                                                            \
  static void name(int64_t rows, const Tier *tier, const uint8_t *codes, int64_t tokens, const uint8_t *weights, \
                   const float *scale, float *out, int64_t out_row) {                                           \
    BY_ROWS(rows, CALL)                                                                                         \
  }
#define CALL(n) value_block(n, 2, 8, tier, codes, tokens, weights, scale, out, out_row)
VALUES(values_8)
#undef CALL
#define CALL(n) value_block(n, 1, 4, tier, codes, tokens, weights, scale, out, out_row)
VALUES(values_4)
#undef CALL
#define CALL(n) value_block(n, 1, 2, tier, codes, tokens, weights, scale, out, out_row)
VALUES(values_2)
#undef CALL

// ---- one layer ------------------------------------------------------------------------------------------------------

typedef struct {  // all that several threads share, or one item owns, in `Step.scratch`
  int64_t rows, queries;       // queries of a sequence, and those that share a KV head
  int64_t keys, values;        // channels, padded
  int64_t tile_frames, splits; // frames that one tile may touch; parts of the latents, each an item of work
  int16_t *matrix;             // [kv_heads, keys / 32, key_dim / 2, 32, 2]: the keys' up-projection
  float *factors;              // [kv_heads, keys]: of its channels
  float *partial;              // [batch, splits]: [rows, values], [rows] sums, [rows] highest scores
  float *exact;                // [batch]: [rows, value_dim], [rows], [rows]
  char *own;                   // [threads, own_bytes]
  int64_t partial_size, exact_size, own_bytes;
} Plan;

typedef struct {  // of one thread
  int16_t *query;  // [frames, rows, key_dim]
  float *query_scale, *constant, *absorbed, *digit_scale, *digit_total, *scores, *steps, *weight_scale, *dense;
  int8_t *digits;    // [frames, rows, 2 * keys]: a tier's digits stand at twice its place
  uint8_t *weights;  // [rows, 2, TILE]
  int64_t first, last;  // frames that are absorbed now
} Own;

static void *take(char **at, int64_t bytes) {
  void *found = *at;
  if (*at) *at += (bytes + 63) / 64 * 64;
  return found;
}

static int64_t take_own(const Step *s, const Plan *plan, char *memory, Own *own) {
  char *at = memory ? memory : (char *)64;
  char *start = at;
  int64_t lines = plan->tile_frames * plan->rows;
  own->query = take(&at, lines * s->key_dim * 2);
  own->query_scale = take(&at, lines * 4);
  own->constant = take(&at, lines * 4);
  own->absorbed = take(&at, (lines * plan->keys > plan->queries * plan->values ? lines * plan->keys : plan->queries * plan->values) * 4);
  own->digit_scale = take(&at, 3 * lines * 4);
  own->digit_total = take(&at, 3 * lines * 4);
  own->digits = take(&at, lines * 2 * plan->keys);
  own->scores = take(&at, plan->rows * TILE * 4);
  own->steps = take(&at, 3 * (TILE + 4) * 4);
  own->weights = take(&at, plan->rows * 2 * TILE);
  own->weight_scale = take(&at, 2 * plan->rows * 4);
  own->dense = take(&at, (2 * MAX_DIM + plan->rows * MAX_DIM) * 4);
  own->first = own->last = -1;
  return at - start;
}

static int64_t make_plan(const Step *s, char *memory, Plan *plan) {
  plan->queries = s->q_heads / s->kv_heads * s->q_tokens;
  plan->rows = s->q_heads * s->q_tokens;
  plan->keys = s->tokens ? width(&s->key) : 0;
  plan->values = s->tokens ? width(&s->value) : 0;
  plan->tile_frames = s->frame >= TILE ? 1 : TILE / s->frame;
  plan->splits = s->batch % s->threads ? s->threads : 1;
  plan->partial_size = plan->rows * (plan->values + 2);
  plan->exact_size = plan->rows * (s->value_dim + 2);
  Own own;
  plan->own_bytes = take_own(s, plan, NULL, &own);
  char *at = memory ? memory : (char *)64;
  char *start = at;
  plan->matrix = take(&at, s->kv_heads * plan->keys * s->key_dim * 2);
  plan->factors = take(&at, s->kv_heads * plan->keys * 4);
  plan->partial = take(&at, s->batch * plan->splits * plan->partial_size * 4);
  plan->exact = take(&at, s->batch * plan->exact_size * 4);
  plan->own = take(&at, s->threads * plan->own_bytes);
  return at - start;
}

// 32 channels of one KV head's up-projection as 13-bit integers, pairs of dimensions side by side, and their scales.
static void prepare(const Step *s, const Plan *plan, int64_t head, int64_t block) {
  const int64_t dim = s->key_dim, start = 32 * block;
  int16_t rows[32 * MAX_DIM];
  float values[MAX_DIM], *factors = plan->factors + head * plan->keys + start;
  memset(rows, 0, sizeof(int16_t) * 32 * (size_t)dim);
  for (int64_t c = 0; c < 32; c++) factors[c] = 0.0f;
  int64_t begin = 0, real = 0;
  for (int64_t k = 0; k < s->key.count; k++) {
    const Tier *tier = s->key.tiers + k;
    for (int64_t c = 0; c < 32; c++) {
      int64_t channel = start + c - begin;
      if (channel < 0 || channel >= tier->channels) continue;
      to_float(s->key.up_proj, s->key.up_type, ((real + channel) * s->kv_heads + head) * dim, dim, values);
      float scale = highest_size(values, dim) / MATRIX_LIMIT, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      for (int64_t d = 0; d < dim; d++) rows[c * dim + d] = (int16_t)nearest(values[d] * inverse);
      factors[c] = scale;
    }
    begin += padded(tier);
    real += tier->channels;
  }
  int16_t *to = plan->matrix + (head * plan->keys + start) * dim;
  for (int64_t pair = 0; pair < dim / 2; pair++)
    for (int64_t c = 0; c < 32; c++) memcpy(to + (pair * 32 + c) * 2, rows + c * dim + 2 * pair, 4);
}

static void load_query(const Step *s, int64_t b, int64_t row, float *to) {
  int64_t head = row / s->q_tokens, token = row % s->q_tokens;
  to_float(s->query, s->type, b * s->query_batch + head * s->query_head + token * s->query_token, s->key_dim, to);
  for (int64_t d = 0; d < s->key_dim; d++) to[d] *= s->scaling;
}

// Rotates every query into frames `first` to `last`, absorbs it into the up-projection and cuts it into digits.
static void absorb(const Step *s, const Plan *plan, Own *own, int64_t b, int64_t first, int64_t last) {
  const int64_t dim = s->key_dim, half = s->half, rows = plan->rows;
  float plain[MAX_DIM], turned[MAX_DIM];
  for (int64_t row = 0; row < rows; row++) {
    load_query(s, b, row, plain);
    const float *constant = s->key.constant + row / plan->queries * dim;
    for (int64_t f = first; f < last; f++) {
      memcpy(turned, plain, sizeof(float) * (size_t)dim);
      if (s->cos) {
        const float *cos = s->cos + b * s->table_batch + f * half, *sin = s->sin + b * s->table_batch + f * half;
        if (s->interleaved) {
          for (int64_t i = 0; i < half; i++) {
            turned[2 * i] = plain[2 * i] * cos[i] + plain[2 * i + 1] * sin[i];
            turned[2 * i + 1] = plain[2 * i + 1] * cos[i] - plain[2 * i] * sin[i];
          }
        } else {
          for (int64_t i = 0; i < half; i++) {
            turned[i] = plain[i] * cos[i] + plain[half + i] * sin[i];
            turned[half + i] = plain[half + i] * cos[i] - plain[i] * sin[i];
          }
        }
      }
      int64_t line = (f - first) * rows + row;
      own->constant[line] = product(turned, constant, dim);
      float scale = highest_size(turned, dim) / QUERY_LIMIT, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      own->query_scale[line] = scale;
      for (int64_t d = 0; d < dim; d++) own->query[line * dim + d] = (int16_t)nearest(turned[d] * inverse);
    }
  }
  int64_t frames = last - first, count = frames * plan->queries;  // lines of one KV head
  for (int64_t head = 0; head < s->kv_heads; head++) {
    for (int64_t block = 0; block < plan->keys / 32; block++) {
      const int16_t *matrix = plan->matrix + (head * plan->keys + 32 * block) * dim;
      const float *factors = plan->factors + head * plan->keys + 32 * block;
      int64_t most = block_rows(count);
      for (int64_t i = 0; i < count; i += most) {
        int64_t n = count - i < most ? count - i : most;
        const int16_t *query[MAX_ROWS];
        float scales[MAX_ROWS], *out[MAX_ROWS];
        for (int64_t r = 0; r < n; r++) {
          int64_t line = (i + r) / plan->queries * rows + head * plan->queries + (i + r) % plan->queries;
          query[r] = own->query + line * dim;
          scales[r] = own->query_scale[line];
          out[r] = own->absorbed + line * plan->keys + 32 * block;
        }
        absorb_rows(n, dim / 2, matrix, query, scales, factors, out);
      }
    }
  }
  for (int64_t line = 0; line < frames * rows; line++) {
    const float *from = own->absorbed + line * plan->keys;
    int8_t *to = own->digits + line * 2 * plan->keys;
    for (int64_t k = 0; k < s->key.count; k++) {
      const int64_t n = padded(s->key.tiers + k);
      const int two = digits_of(s->key.tiers + k) == 2;
      float scale = highest_size(from, n) / (two ? 127 * 128 - 64 : 127), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      uint32_t total = 0;  // unsigned: what a NaN leaves may overflow
      if (two) {
        for (int64_t i = 0; i < n; i++) {
          int32_t level = nearest(from[i] * inverse), high = (level + 64) >> 7;
          to[i] = (int8_t)high;
          to[n + i] = (int8_t)(level - high * 128);
          total += (uint32_t)level;
        }
      } else {
        for (int64_t i = 0; i < n; i++) {
          int32_t level = nearest(from[i] * inverse);
          to[i] = (int8_t)level;
          total += (uint32_t)level;
        }
      }
      own->digit_scale[k * plan->tile_frames * rows + line] = scale;
      own->digit_total[k * plan->tile_frames * rows + line] = (float)(int32_t)total;
      from += n;
      to += 2 * n;
    }
  }
}

static void cap_and_mask(const Step *s, int64_t b, int64_t rows, int64_t start, int64_t tokens, const uint8_t *mask,
                         int64_t mask_batch, int64_t mask_query, float *scores, int64_t stride) {
  for (int64_t row = 0; row < rows; row++) {
    float *x = scores + row * stride;
    if (s->softcap > 0.0f)
      for (int64_t t = 0; t < tokens; t++) x[t] = s->softcap * tanhf(x[t] / s->softcap);
    if (mask) {
      const uint8_t *seen = mask + b * mask_batch + row % s->q_tokens * mask_query + start;
      for (int64_t t = 0; t < tokens; t++) x[t] = seen[t] ? x[t] : -INFINITY;
    }
  }
}

// Turns scores into weights against the highest score so far, which it returns; `factor`: what earlier sums shrink by.
INLINE float weigh(float *scores, int64_t tokens, float highest, float *sum, float *factor) {
  float most = highest;
#pragma omp simd reduction(max : most)
  for (int64_t t = 0; t < tokens; t++) most = scores[t] > most ? scores[t] : most;
  *factor = 1.0f;
  if (most == -INFINITY) {
    int unseen = 1;  // a NaN is no less than -inf: it must come out
    for (int64_t t = 0; t < tokens; t++) unseen &= scores[t] == -INFINITY;
    if (unseen) {
      for (int64_t t = 0; t < tokens; t++) scores[t] = 0.0f;
      return most;
    }
  }
  *factor = highest == -INFINITY ? 0.0f : exponential(highest - most);
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < tokens; t++) {
    scores[t] = exponential(scores[t] - most);
    total += scores[t];
  }
  *sum = *sum * *factor + total;
  return most;
}

static void attend_exact(const Step *s, const Plan *plan, Own *own, int64_t b) {
  const int64_t rows = plan->rows, group = plan->queries;
  float *out = plan->exact + b * plan->exact_size, *sums = out + rows * s->value_dim, *highest = sums + rows;
  memset(out, 0, sizeof(float) * (size_t)(rows * (s->value_dim + 1)));
  for (int64_t row = 0; row < rows; row++) highest[row] = -INFINITY;
  float *state = own->dense, *queries = own->dense + MAX_DIM;
  for (int64_t head = 0; head < s->kv_heads; head++) {
    for (int64_t row = 0; row < group; row++) load_query(s, b, head * group + row, queries + row * MAX_DIM);
    for (int part = 0; part < 2; part++) {
      const Exact *exact = s->exact + part;
      for (int64_t start = 0; start < exact->tokens; start += TILE) {
        int64_t tokens = exact->tokens - start < TILE ? exact->tokens - start : TILE;
        for (int64_t t = 0; t < tokens; t++) {
          int64_t at = b * exact->key_batch + head * exact->key_head + (start + t) * exact->key_token;
          to_float(exact->keys, s->type, at, s->key_dim, state);
          for (int64_t row = 0; row < group; row++)
            own->scores[row * TILE + t] = product(queries + row * MAX_DIM, state, s->key_dim);
        }
        cap_and_mask(s, b, group, start, tokens, exact->mask, exact->mask_batch, exact->mask_query, own->scores, TILE);
        for (int64_t row = 0; row < group; row++) {
          float factor, *x = out + (head * group + row) * s->value_dim;
          int64_t r = head * group + row;
          highest[r] = weigh(own->scores + row * TILE, tokens, highest[r], sums + r, &factor);
          for (int64_t d = 0; d < s->value_dim; d++) x[d] *= factor;
        }
        for (int64_t t = 0; t < tokens; t++) {
          int64_t at = b * exact->value_batch + head * exact->value_head + (start + t) * exact->value_token;
          to_float(exact->values, s->type, at, s->value_dim, state);
          for (int64_t row = 0; row < group; row++) {
            float weight = own->scores[row * TILE + t], *x = out + (head * group + row) * s->value_dim;
            for (int64_t d = 0; d < s->value_dim; d++) x[d] += weight * state[d];
          }
        }
      }
    }
  }
}

// Weights times steps as unsigned digits, one or two a token; returns what half a level of all of them comes to.
INLINE float weight_digits(const float *weights, const float *steps, int64_t tokens, int two, uint8_t *to, float *scale) {
  float most = 0.0f, product[TILE];
#pragma omp simd reduction(max : most)
  for (int64_t t = 0; t < tokens; t++) {
    product[t] = weights[t] * steps[t];
    most = product[t] > most ? product[t] : most;
  }
  *scale = most / (two ? 65535.0f : 255.0f);
  float inverse = most > 0.0f ? 1.0f / *scale : 0.0f;
  uint32_t total = 0;
  for (int64_t t = 0; t < tokens; t++) {
    int32_t level = nearest(product[t] * inverse);
    to[t] = (uint8_t)(two ? level >> 8 : level);
    to[TILE + t] = (uint8_t)level;
    total += (uint32_t)level;
  }
  for (int64_t t = tokens; t % 4; t++) to[t] = to[TILE + t] = 0;
  return 0.5f * *scale * (float)(int32_t)total;
}

static void load_steps(const Tier *tier, int64_t b, int64_t start, int64_t tokens, float *to) {
  const _Float16 *from = tier->steps + b * tier->step_batch + start * tier->step_token;
  if (tier->step_token == 1) {
    to_float(from, FLOAT16, 0, tokens, to);
  } else {
    for (int64_t t = 0; t < tokens; t++) to[t] = (float)from[t * tier->step_token];
  }
}

static void attend_latents(const Step *s, const Plan *plan, Own *own, int64_t b, int64_t split) {
  const int64_t rows = plan->rows, tile_frames = plan->tile_frames, tile = s->frame >= TILE ? TILE : tile_frames * s->frame;
  const int64_t tiles = (s->tokens + tile - 1) / tile, most = block_rows(rows);
  float *out = plan->partial + (b * plan->splits + split) * plan->partial_size;
  float *sums = out + rows * plan->values, *highest = sums + rows;
  memset(out, 0, sizeof(float) * (size_t)(rows * (plan->values + 1)));
  for (int64_t row = 0; row < rows; row++) highest[row] = -INFINITY;
  own->first = own->last = -1;
  for (int64_t number = tiles * split / plan->splits; number < tiles * (split + 1) / plan->splits; number++) {
    // Tiles begin with a frame, or lie in one: frames longer than a tile need not be multiples of it.
    const int64_t begin = number * tile, end = begin + tile < s->tokens ? begin + tile : s->tokens;
    for (int64_t start = begin; start < end;) {
      const int64_t first = start / s->frame;
      int64_t last = tile_frames == 1 ? first + 1 : (end - 1) / s->frame + 1;
      const int64_t stop = tile_frames == 1 && last * s->frame < end ? last * s->frame : end, tokens = stop - start;
      if (first != own->first || last != own->last) absorb(s, plan, own, b, first, last);
      own->first = first;
      own->last = last;
      for (int64_t f = first; f < last; f++) {
        int64_t from = f * s->frame > start ? f * s->frame : start, to = (f + 1) * s->frame < stop ? (f + 1) * s->frame : stop;
        int64_t line = (f - first) * rows;
        for (int64_t row = 0; row < rows; row++)
          for (int64_t t = from; t < to; t++) own->scores[row * TILE + t - start] = own->constant[line + row];
        const uint8_t *codes[3];
        const float *steps[3];
        for (int64_t k = 0; k < s->key.count; k++) {
          const Tier *tier = s->key.tiers + k;
          codes[k] = tier->codes + b * tier->batch + from * tier->token;
          float *step = own->steps + k * (TILE + 4);
          load_steps(tier, b, from, to - from, step);
          for (int64_t t = to; (t - from) % 4; t++) step[t - from] = 0.0f;
          steps[k] = step;
        }
        for (int64_t row = 0; row < rows; row += most) {
          int64_t n = rows - row < most ? rows - row : most, at = line + row;
          score_rows(n, s, codes, steps, to - from, own->digits + at * 2 * plan->keys, 2 * plan->keys,
                     own->digit_scale + at, own->digit_total + at, tile_frames * rows,
                     own->scores + row * TILE + from - start);
        }
      }
      cap_and_mask(s, b, rows, start, tokens, s->mask, s->mask_batch, s->mask_query, own->scores, TILE);
      for (int64_t row = 0; row < rows; row++) {
        float factor, *x = out + row * plan->values;
        highest[row] = weigh(own->scores + row * TILE, tokens, highest[row], sums + row, &factor);
        if (factor != 1.0f)
          for (int64_t c = 0; c < plan->values; c++) x[c] *= factor;
      }
      int64_t place = 0;
      for (int64_t k = 0; k < s->value.count; k++) {
        const Tier *tier = s->value.tiers + k;
        const int64_t n = padded(tier);
        load_steps(tier, b, start, tokens, own->steps);
        for (int64_t row = 0; row < rows; row++) {
          float *x = out + row * plan->values + place;
          float half = weight_digits(own->scores + row * TILE, own->steps, tokens, digits_of(tier) == 2,
                                     own->weights + row * 2 * TILE, own->weight_scale + row);
          for (int64_t c = 0; c < n; c++) x[c] += half;
        }
        for (int64_t row = 0; row < rows; row += most)
          (tier->bits == 8 ? values_8 : tier->bits == 4 ? values_4 : values_2)(
              rows - row < most ? rows - row : most, tier, tier->codes + b * tier->batch + start * tier->token, tokens,
              own->weights + row * 2 * TILE, own->weight_scale + row, out + row * plan->values + place, plan->values);
        place += n;
      }
      start = stop;
    }
  }
}

// x[r] += latents[r] @ up_proj, for `rows` queries of one KV head; `step`: from one channel's row to the next.
INLINE void lead_back(const int rows, const Step *s, int64_t start, int64_t step, int64_t channels, const float *latents,
                      int64_t latent_row, float *x, float *value) {
  const int64_t dim = s->value_dim;
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    Floats sums[4][2];
    for (int r = 0; r < rows; r++)
      for (int half = 0; half < 2; half++) sums[r][half] = load_floats(x + r * MAX_DIM + d + 16 * half);
    for (int64_t c = 0; c < channels; c++) {
      to_float(s->value.up_proj, s->value.up_type, start + c * step + d, 32, value);
      Floats left = load_floats(value), right = load_floats(value + 16);
      for (int r = 0; r < rows; r++) {
        sums[r][0] = plus(left, latents[r * latent_row + c], sums[r][0]);
        sums[r][1] = plus(right, latents[r * latent_row + c], sums[r][1]);
      }
    }
    for (int r = 0; r < rows; r++)
      for (int half = 0; half < 2; half++) store_floats(x + r * MAX_DIM + d + 16 * half, sums[r][half]);
  }
  for (int64_t c = 0; d < dim && c < channels; c++) {
    to_float(s->value.up_proj, s->value.up_type, start + c * step + d, dim - d, value);
    for (int r = 0; r < rows; r++)
      for (int64_t i = 0; i < dim - d; i++) x[r * MAX_DIM + d + i] += latents[r * latent_row + c] * value[i];
  }
}

// Joins what the parts of one sequence gave, and leads the latents of one KV head's queries to values.
static void join(const Step *s, const Plan *plan, Own *own, int64_t b, int64_t head) {
  const int64_t group = plan->queries, dim = s->value_dim, splits = s->tokens ? plan->splits : 0;
  float *value = own->dense, *sum = own->dense + MAX_DIM;
  for (int64_t g = 0; g < group; g++) {
    const int64_t row = head * group + g;
    const float *exact = plan->exact + b * plan->exact_size, *parts = plan->partial + b * plan->splits * plan->partial_size;
    const float *sums = exact + plan->rows * dim, *highest = sums + plan->rows;
    const float sink = s->sink_logits ? s->sink_logits[row / s->q_tokens] : -INFINITY;
    float most = highest[row] > sink ? highest[row] : sink, total;
    for (int64_t split = 0; split < splits; split++) {
      float other = parts[split * plan->partial_size + plan->rows * (plan->values + 1) + row];
      most = other > most ? other : most;
    }
    float *x = sum + g * MAX_DIM, *latents = own->absorbed + g * plan->values, share = 0.0f;
    const float shrink = highest[row] == -INFINITY ? 0.0f : exponential(highest[row] - most);
    total = sums[row] * (sums[row] == sums[row] ? shrink : 1.0f) + (sink == -INFINITY ? 0.0f : exponential(sink - most));
    for (int64_t c = 0; c < plan->values; c++) latents[c] = 0.0f;
    for (int64_t split = 0; split < splits; split++) {
      const float *part = parts + split * plan->partial_size;
      const float other = part[plan->rows * (plan->values + 1) + row], mass = part[plan->rows * plan->values + row];
      const float factor = other == -INFINITY ? 0.0f : exponential(other - most);
      share += mass == mass ? factor * mass : mass;
      for (int64_t c = 0; c < plan->values; c++) latents[c] += factor * part[row * plan->values + c];
    }
    total += share;
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // a query that sees nothing gives 0
    const float *constant = s->value.constant + head * dim;
    for (int64_t c = 0; c < plan->values; c++) latents[c] *= inverse;
    for (int64_t d = 0; d < dim; d++) {
      x[d] = exact[row * dim + d] * shrink * inverse;
      if (splits) x[d] += share * inverse * constant[d];
    }
  }
  int64_t real = 0, place = 0;
  for (int64_t k = 0; k < (splits ? s->value.count : 0); k++) {
    const Tier *tier = s->value.tiers + k;
    const int64_t step = s->kv_heads * dim, start = real * step + head * dim;
    for (int64_t g = 0; g < group; g += 4) {
      const float *latents = own->absorbed + g * plan->values + place;
      float *x = sum + g * MAX_DIM;
      if (group - g >= 4) lead_back(4, s, start, step, tier->channels, latents, plan->values, x, value);
      if (group - g == 3) lead_back(3, s, start, step, tier->channels, latents, plan->values, x, value);
      if (group - g == 2) lead_back(2, s, start, step, tier->channels, latents, plan->values, x, value);
      if (group - g == 1) lead_back(1, s, start, step, tier->channels, latents, plan->values, x, value);
    }
    real += tier->channels;
    place += padded(tier);
  }
  for (int64_t g = 0; g < group; g++) {
    int64_t row = head * group + g, token = row % s->q_tokens, q_head = row / s->q_tokens;
    from_float(sum + g * MAX_DIM, s->type, ((b * s->q_tokens + token) * s->q_heads + q_head) * dim, dim, s->output);
  }
}

// Bytes of `scratch` that a step needs.
int64_t lowrank_scratch(const Step *s) {
  Plan plan;
  return make_plan(s, NULL, &plan);
}

const char *lowrank_instructions(void) { return INSTRUCTIONS; }

// Returns 0, or 1 if `scratch` is too small.
int lowrank_attend(const Step *s) {
  Plan plan;
  if (make_plan(s, s->scratch, &plan) > s->scratch_bytes) return 1;
  const int64_t blocks = plan.keys / 32, splits = s->tokens ? plan.splits : 0;
#pragma omp parallel num_threads((int)s->threads)
  {
#ifdef _OPENMP
    const int64_t me = omp_get_thread_num();
#else
    const int64_t me = 0;
#endif
    Own own;
    take_own(s, &plan, plan.own + me * plan.own_bytes, &own);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s->kv_heads * blocks; i++) prepare(s, &plan, i / blocks, i % blocks);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < s->batch * (splits + 1); i++) {
      if (i % (splits + 1) == splits)
        attend_exact(s, &plan, &own, i / (splits + 1));
      else
        attend_latents(s, &plan, &own, i / (splits + 1), i % (splits + 1));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s->batch * s->kv_heads; i++) join(s, &plan, &own, i / s->kv_heads, i % s->kv_heads);
  }
  return 0;
}
