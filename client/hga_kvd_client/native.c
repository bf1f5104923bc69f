// What routing costs a CPU at every layer of every token, in C: docs/adr/0043. No Python.h: ctypes calls it (native.py), with
// addresses of tensors whose sizes are checked there. Nothing that is read here is used as an index but a byte, of a table
// of 256, so no content can make it leave its memory.
//
// It is written for registers of 8 floats, and nothing else was measured: where they are not, PyTorch is faster, and is used.

#include <math.h>
#include <stdint.h>
#include <string.h>

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 1 };

int64_t hga_kvd_version(void) { return VERSION; }

#if !defined(__x86_64__) || !defined(__GNUC__)
int64_t hga_kvd_wide(void) { return 0; }
#else
int64_t hga_kvd_wide(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#include <immintrin.h>
#pragma GCC target("avx2,fma")

#define INLINE static inline __attribute__((always_inline))
// Queries that share a look at a group's codes; the largest head.
enum { TOGETHER = 4, DIMS_MAX = 512 };

typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef float of_queries __attribute__((vector_size(4 * TOGETHER)));

// e^x for x <= 0, within 3e-7 of it; 0 below -87, and where x is NaN.
INLINE floats exp_of(floats x)
{
    ints near = x > -87.0f;
    x = (floats)((ints)x & near);
    ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    floats of = __builtin_convertvector(n, floats);
    floats r = x - of * 0.693359375f + of * 2.12194440e-4f; // ln 2 in two parts
    floats p = 0.0083333340f + r * 0.0013888889f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * p))));
    return (floats)((ints)(p * (floats)((n + 127) << 23)) & near);
}

INLINE float log_sum_exp(floats a, floats b)
{
    ints more = a > b;
    floats most = (floats)(((ints)a & more) | ((ints)b & ~more));
    float largest = most[0];
    for (int t = 1; t < 8; t++)
        largest = most[t] > largest ? most[t] : largest;
    floats e = exp_of(a - largest) + exp_of(b - largest);
    return largest + logf((e[0] + e[1]) + (e[2] + e[3]) + ((e[4] + e[5]) + (e[6] + e[7])));
}

// Eight codes, a byte each.
INLINE floats widened(uint64_t codes)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)codes)));
}

// As SketchSpec; groups have 16 tokens. float8: what its 256 codes are.
struct spec {
    int64_t head_dim, dims4, dims2, groups, blocks; // groups and blocks of a chunk
    const float *float8;
};

// What a block's tokens share: weight of each code, and what is added to all scores.
INLINE of_queries of_block(const struct spec *s, const of_queries *z, const uint8_t *mean, const uint8_t *step, of_queries *weight)
{
    of_queries shared = {0}, four = {0}, two = {0};
    for (int64_t d = 0; d < s->head_dim; d++)
        shared += z[d] * s->float8[mean[d]];
    for (int64_t d = 0; d < s->dims4; d++)
        four += weight[d] = z[d] * s->float8[step[d]];
    for (int64_t d = s->dims4; d < s->dims4 + s->dims2; d++)
        two += weight[d] = z[d] * s->float8[step[d]];
    return shared - 7.5f * four - 1.5f * two;
}

// One group's codes times their weights: scores of tokens 0 to 7 and 8 to 15, of each query.
INLINE void of_group(const struct spec *s, const of_queries *weight, const uint8_t *packed, floats *low, floats *high)
{
    for (int q = 0; q < TOGETHER; q++)
        low[q] = high[q] = (floats){0};
    for (int64_t d = 0; d < s->dims4; d++, packed += 8) {
        uint64_t all;
        memcpy(&all, packed, 8);
        floats a = widened(all & 0x0f0f0f0f0f0f0f0fu), b = widened(all >> 4 & 0x0f0f0f0f0f0f0f0fu);
        for (int q = 0; q < TOGETHER; q++) {
            low[q] += weight[d][q] * a;
            high[q] += weight[d][q] * b;
        }
    }
    for (int64_t d = s->dims4; d < s->dims4 + s->dims2; d++, packed += 4) {
        uint32_t all;
        memcpy(&all, packed, 4);
        floats a = widened((all | (uint64_t)(all >> 2) << 32) & 0x0303030303030303u);
        floats b = widened((all >> 4 | (uint64_t)(all >> 6) << 32) & 0x0303030303030303u);
        for (int q = 0; q < TOGETHER; q++) {
            low[q] += weight[d][q] * a;
            high[q] += weight[d][q] * b;
        }
    }
}

// sketch.log_mass of one KV head. z: [queries][head_dim]; offset: [queries]; records: `chunks` of chunk_bytes each; out: [queries]
// [chunks * groups]. Returns 0, or -1 for sizes that are not served.
int64_t hga_kvd_log_mass(const struct spec *s, const float *z, const float *offset, int64_t queries, const uint8_t *records,
                         int64_t chunks, int64_t chunk_bytes, float *out)
{
    const int64_t kept = s->dims4 + s->dims2, group_bytes = 8 * s->dims4 + 4 * s->dims2, codes = s->groups * group_bytes;
    if (s->dims4 < 0 || s->dims2 < 0 || kept > s->head_dim || s->head_dim > DIMS_MAX || s->groups < 1 || s->blocks < 1 ||
        s->groups % s->blocks || queries < 0 || chunks < 0 || chunk_bytes < codes + s->blocks * (s->head_dim + kept))
        return -1;
    for (int64_t first = 0; first < queries; first += TOGETHER) {
        of_queries asked[DIMS_MAX], weight[DIMS_MAX], shared = {0};
        int64_t count = queries - first < TOGETHER ? queries - first : TOGETHER;
        for (int64_t d = 0; d < s->head_dim; d++)
            for (int q = 0; q < TOGETHER; q++)
                asked[d][q] = q < count ? z[(first + q) * s->head_dim + d] : 0;
        const uint8_t *record = records;
        float *to = out + first * chunks * s->groups;
        for (int64_t chunk = 0; chunk < chunks; chunk++, record += chunk_bytes)
            for (int64_t group = 0; group < s->groups; group++, to++) {
                if (group % (s->groups / s->blocks) == 0) {
                    int64_t block = group / (s->groups / s->blocks);
                    const uint8_t *mean = record + codes + block * s->head_dim;
                    shared = of_block(s, asked, mean, record + codes + s->blocks * s->head_dim + block * kept, weight);
                }
                floats low[TOGETHER], high[TOGETHER];
                of_group(s, weight, record + group * group_bytes, low, high);
                for (int q = 0; q < count; q++)
                    to[q * chunks * s->groups] = log_sum_exp(low[q], high[q]) + shared[q] + offset[first + q];
            }
    }
    return 0;
}

#endif
