// What a CPU does at every layer of every token, in C: routes, and attends to what was opened; docs/adr/0043 and 0049. No
// Python.h: ctypes calls it (native.py), with addresses of tensors whose sizes are checked there. Nothing that is read here
// is used as an index but a byte, of a table of 256, and places in the bank, each checked before: no content can make it
// leave its memory.
//
// It is written for registers of 8 floats, and nothing else was measured: where they are not, PyTorch is faster, and is used.

#include <math.h>
#include <stdint.h>
#include <string.h>

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 2 };

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
typedef float anywhere __attribute__((vector_size(32), aligned(4), may_alias));

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

INLINE floats largest_of(floats a, floats b)
{
    ints more = a > b;
    return (floats)(((ints)a & more) | ((ints)b & ~more));
}

INLINE float largest_in(floats a)
{
    float largest = a[0];
    for (int t = 1; t < 8; t++)
        largest = a[t] > largest ? a[t] : largest;
    return largest;
}

INLINE float sum_in(floats a) { return (a[0] + a[1]) + (a[2] + a[3]) + ((a[4] + a[5]) + (a[6] + a[7])); }

INLINE float log_sum_exp(floats a, floats b)
{
    float largest = largest_in(largest_of(a, b));
    return largest + logf(sum_in(exp_of(a - largest) + exp_of(b - largest)));
}

// Up to eight of a row; behind its end, what weighs nothing.
INLINE floats eight_of(const float *row, int64_t left)
{
    if (left >= 8)
        return *(const anywhere *)row;
    floats some = (floats){0} - INFINITY;
    for (int64_t t = 0; t < left; t++)
        some[t] = row[t];
    return some;
}

static float largest_of_row(const float *row, int64_t count)
{
    floats most = (floats){0} - INFINITY;
    for (int64_t at = 0; at < count; at += 8)
        most = largest_of(eight_of(row + at, count - at), most);
    return largest_in(most);
}

static float log_sum_exp_of_row(const float *row, int64_t count)
{
    float largest = largest_of_row(row, count);
    floats sum = {0};
    for (int64_t at = 0; at < count; at += 8)
        sum += exp_of(eight_of(row + at, count - at) - largest);
    return largest + logf(sum_in(sum));
}

// Scores of some keys for up to TOGETHER queries; asked has that many rows, out `count` of them, `apart` floats apart.
static void scores_of(const float *asked, int64_t count, int64_t dim, const float *k, int64_t tokens, float *out, int64_t apart)
{
    const int64_t whole = dim & ~7;
    for (int64_t token = 0; token < tokens; token++, k += dim) {
        floats sum[TOGETHER] = {0};
        float rest[TOGETHER] = {0};
        for (int64_t d = 0; d < whole; d += 8)
            for (int q = 0; q < TOGETHER; q++)
                sum[q] += *(const anywhere *)(asked + q * dim + d) * *(const anywhere *)(k + d);
        for (int64_t d = whole; d < dim; d++)
            for (int q = 0; q < TOGETHER; q++)
                rest[q] += asked[q * dim + d] * k[d];
        for (int q = 0; q < count; q++)
            out[q * apart + token] = sum_in(sum[q]) + rest[q];
    }
}

// Adds dims first .. first+15 of some values to sums of them, a row of weights a query. Sixteen floats are a line of the cache.
INLINE void add_sixteen(floats (*sum)[2], const float *weights, int64_t apart, const float *v, int64_t dim, int64_t tokens)
{
    for (int64_t token = 0; token < tokens; token++, v += dim)
        for (int q = 0; q < TOGETHER; q++) {
            sum[q][0] += weights[q * apart + token] * *(const anywhere *)v;
            sum[q][1] += weights[q * apart + token] * *(const anywhere *)(v + 8);
        }
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

// What a layer's token sees: its window, all KV heads `window_apart` floats apart, and slots of the bank.
struct seen {
    int64_t kv_heads, ratio, head_dim, window_tokens, window_apart, slots, group_tokens;
    float scale;
};

// Some queries of one KV head, scaled, TOGETHER rows.
INLINE void ask(const struct seen *s, const float *q, int64_t count, float *asked)
{
    for (int64_t i = 0; i < TOGETHER * s->head_dim; i++)
        asked[i] = i < count * s->head_dim ? q[i] * s->scale : 0;
}

static int wrong(const struct seen *s)
{
    return s->kv_heads < 0 || s->ratio < 1 || s->head_dim < 1 || s->head_dim > DIMS_MAX || s->window_tokens < 1 ||
           s->window_apart < s->window_tokens * s->head_dim || s->slots < 0 || s->group_tokens < 1;
}

// Sifts down what stands at `at` of a heap whose smallest mass is first; of equal ones the later index counts as smaller.
static void sift(const float *mass, int64_t *heap, int64_t count, int64_t at)
{
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
#define BELOW(a, b) (mass[a] < mass[b] || (mass[a] == mass[b] && (a) > (b)))
        if (child + 1 < count && BELOW(heap[child + 1], heap[child]))
            child++;
        if (!BELOW(heap[child], heap[at]))
            return;
        int64_t swapped = heap[at];
        heap[at] = heap[child], heap[child] = swapped;
    }
}

// window_scores and RoutingState.route of sketches, of one token. q: [kv_heads][ratio][head_dim]; to_z, centre: a layer's basis; records:
// KV heads records_apart bytes apart; near: [kv_heads][ratio][window_tokens], out; opened: [kv_heads][chunks * groups], zeros, out;
// scratch: (kv_heads + ratio) * chunks * groups + ratio * (head_dim + 1) floats; heap: budget numbers, or as many as there are groups.
int64_t hga_kvd_route(const struct spec *s, const struct seen *seen, const float *q, const float *window_k, const float *to_z,
                      const float *centre, const uint8_t *records, int64_t records_apart, int64_t chunks, int64_t chunk_bytes,
                      float *near, float *scratch, int64_t *heap, int64_t budget, uint8_t *opened)
{
    if (wrong(seen) || seen->head_dim != s->head_dim || chunks < 0 || s->groups < 1 || budget < 0)
        return -1;
    const int64_t dim = s->head_dim, ratio = seen->ratio, groups = chunks * s->groups, all = seen->kv_heads * groups;
    float *mass = scratch, *masses = mass + all, *z = masses + ratio * groups, *offset = z + ratio * dim;
    memset(mass, 0, (size_t)all * sizeof *mass);
    for (int64_t head = 0; head < seen->kv_heads; head++, mass += groups) {
        for (int64_t first = 0; first < ratio; first += TOGETHER) {
            float asked[TOGETHER * DIMS_MAX];
            int64_t count = ratio - first < TOGETHER ? ratio - first : TOGETHER, row = head * ratio + first;
            ask(seen, q + row * dim, count, asked);
            scores_of(asked, count, dim, window_k + head * seen->window_apart, seen->window_tokens,
                      near + row * seen->window_tokens, seen->window_tokens);
            for (int64_t d = 0; d < dim; d++) // a row of to_z at a time, as if it were a key
                scores_of(asked, count, dim, to_z + (head * dim + d) * dim, 1, z + first * dim + d, dim);
        }
        for (int64_t r = 0; r < ratio; r++) {
            offset[r] = 0;
            for (int64_t d = 0; d < dim; d++)
                offset[r] += z[r * dim + d] * centre[head * dim + d];
        }
        if (hga_kvd_log_mass(s, z, offset, ratio, records + head * records_apart, chunks, chunk_bytes, masses))
            return -1;
        for (int64_t r = 0; r < ratio; r++) {
            const float *of = masses + r * groups;
            float window = log_sum_exp_of_row(near + (head * ratio + r) * seen->window_tokens, seen->window_tokens);
            float far = groups ? log_sum_exp_of_row(of, groups) : -INFINITY, most = window > far ? window : far;
            float everything = most + logf(expf(window - most) + expf(far - most));
            for (int64_t g = 0; g < groups; g += 8) {
                floats share = exp_of(eight_of(of + g, groups - g) - everything);
                for (int64_t t = 0; t < 8 && g + t < groups; t++)
                    mass[g + t] += share[t];
            }
        }
    }
    mass = scratch;
    int64_t taken = budget < all ? budget : all;
    for (int64_t i = 0; i < taken; i++)
        heap[i] = i;
    for (int64_t i = taken / 2 - 1; i >= 0; i--)
        sift(mass, heap, taken, i);
    for (int64_t i = taken; taken && i < all; i++)
        if (mass[i] > mass[heap[0]]) {
            heap[0] = i;
            sift(mass, heap, taken, 0);
        }
    for (int64_t i = 0; i < taken; i++)
        opened[heap[i]] = 1;
    return 0;
}

// decode_attention over window and bank. window_k, window_v: KV heads as in `seen`; near: [kv_heads][ratio][window_tokens], or none;
// bank_k, bank_v: [kv_heads][slots][group_tokens][head_dim]; places: slots, of all heads in order, counts[head] each; scratch: TOGETHER
// rows of row floats, row the window's and the most opened tokens, rounded up to 8; out: as q.
int64_t hga_kvd_attend(const struct seen *s, const float *q, const float *window_k, const float *window_v, const float *near,
                       const float *bank_k, const float *bank_v, const int64_t *places, const int64_t *counts, int64_t row,
                       float *scratch, float *out)
{
    if (wrong(s) || row % 8)
        return -1;
    const int64_t dim = s->head_dim, group = s->group_tokens, window = s->window_tokens;
    for (int64_t head = 0, at = 0; head < s->kv_heads; head++) {
        if (counts[head] < 0 || counts[head] > s->slots || row < window + counts[head] * group)
            return -1;
        for (int64_t end = at + counts[head]; at < end; at++)
            if (places[at] < 0 || places[at] >= s->slots)
                return -1;
    }
    for (int64_t head = 0; head < s->kv_heads; places += counts[head++]) {
        const int64_t tokens = window + counts[head] * group, bank = head * s->slots * group * dim;
        const float *own_k = window_k + head * s->window_apart, *own_v = window_v + head * s->window_apart;
        for (int64_t first = 0; first < s->ratio; first += TOGETHER) {
            float asked[TOGETHER * DIMS_MAX], total[TOGETHER] = {0};
            int64_t count = s->ratio - first < TOGETHER ? s->ratio - first : TOGETHER, number = head * s->ratio + first;
            ask(s, q + number * dim, count, asked);
            if (near)
                for (int64_t i = 0; i < count; i++)
                    memcpy(scratch + i * row, near + (number + i) * window, (size_t)window * sizeof *near);
            else
                scores_of(asked, count, dim, own_k, window, scratch, row);
            for (int64_t i = 0; i < counts[head]; i++)
                scores_of(asked, count, dim, bank_k + bank + places[i] * group * dim, group, scratch + window + i * group, row);
            for (int64_t i = 0; i < TOGETHER; i++) {
                float *of = scratch + i * row, largest = i < count ? largest_of_row(of, tokens) : 0;
                floats sum = {0};
                for (int64_t t = 0; t < row; t += 8) {
                    floats e = i < count && t < tokens ? exp_of(eight_of(of + t, tokens - t) - largest) : (floats){0};
                    *(anywhere *)(of + t) = e;
                    sum += e;
                }
                total[i] = sum_in(sum);
            }
            int64_t d = 0;
            for (; d + 16 <= dim; d += 16) {
                floats sum[TOGETHER][2] = {0};
                add_sixteen(sum, scratch, row, own_v + d, dim, window);
                for (int64_t i = 0; i < counts[head]; i++)
                    add_sixteen(sum, scratch + window + i * group, row, bank_v + bank + places[i] * group * dim + d, dim, group);
                for (int64_t i = 0; i < count; i++) {
                    *(anywhere *)(out + (number + i) * dim + d) = sum[i][0] / total[i];
                    *(anywhere *)(out + (number + i) * dim + d + 8) = sum[i][1] / total[i];
                }
            }
            for (; d < dim; d++)
                for (int64_t i = 0; i < count; i++) {
                    float sum = 0;
                    for (int64_t t = 0; t < window; t++)
                        sum += scratch[i * row + t] * own_v[t * dim + d];
                    for (int64_t t = window; t < tokens; t++) {
                        int64_t place = places[(t - window) / group] * group + (t - window) % group;
                        sum += scratch[i * row + t] * bank_v[bank + place * dim + d];
                    }
                    out[(number + i) * dim + d] = sum / total[i];
                }
        }
    }
    return 0;
}

#endif
