// XXH3, 64 bits, with a seed, of more than 240 bytes (the specification's "long" inputs).

#include "pool.h"

static const uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D, P64_1 = 0x9E3779B185EBCA87,
                      P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9, P64_4 = 0x85EBCA77C2B2AE63,
                      P64_5 = 0x27D4EB2F165667C5;
enum { SECRET = 192, STRIPE = 64, STRIPES = (SECRET - STRIPE) / 8 };
static const uint8_t SECRET_BYTES[SECRET] =
    "\xb8\xfe\x6c\x39\x23\xa4\x4b\xbe\x7c\x01\x81\x2c\xf7\x21\xad\x1c\xde\xd4\x6d\xe9\x83\x90\x97\xdb\x72\x40\xa4\xa4"
    "\xb7\xb3\x67\x1f\xcb\x79\xe6\x4e\xcc\xc0\xe5\x78\x82\x5a\xd0\x7d\xcc\xff\x72\x21\xb8\x08\x46\x74\xf7\x43\x24\x8e"
    "\xe0\x35\x90\xe6\x81\x3a\x26\x4c\x3c\x28\x52\xbb\x91\xc3\x00\xcb\x88\xd0\x65\x8b\x1b\x53\x2e\xa3\x71\x64\x48\x97\xa2"
    "\x0d\xf9\x4e\x38\x19\xef\x46\xa9\xde\xac\xd8\xa8\xfa\x76\x3f\xe3\x9c\x34\x3f\xf9\xdc\xbb\xc7\xc7\x0b\x4f\x1d\x8a"
    "\x51\xe0\x4b\xcd\xb4\x59\x31\xc8\x9f\x7e\xc9\xd9\x78\x73\x64\xea\xc5\xac\x83\x34\xd3\xeb\xc3\xc5\x81\xa0\xff\xfa"
    "\x13\x63\xeb\x17\x0d\xdd\x51\xb7\xf0\xda\x49\xd3\x16\x55\x26\x29\xd4\x68\x9e\x2b\x16\xbe\x58\x7d\x47\xa1\xfc\x8f"
    "\xf8\xb8\xd1\x7a\xd0\x31\xce\x45\xcb\x3a\x8f\x95\x16\x04\x28\xaf\xd7\xfb\xca\xbb\x4b\x40\x7e";

static uint64_t word(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

static void add_stripe(uint64_t *sums, const uint8_t *data, const uint8_t *secret)
{
    for (int lane = 0; lane < 8; lane++) {
        uint64_t value = word(data + 8 * lane), keyed = value ^ word(secret + 8 * lane);
        sums[lane ^ 1] += value;
        sums[lane] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
}

// All stripes but the last one, which may overlap the one before.
static void add_stripes(uint64_t *sums, const uint8_t *data, int64_t bytes, const uint8_t *secret)
{
    for (int64_t i = 0; i < (bytes - 1) / STRIPE; i++) {
        add_stripe(sums, data + i * STRIPE, secret + i % STRIPES * 8);
        for (int lane = 0; lane < 8 && i % STRIPES == STRIPES - 1; lane++)
            sums[lane] = (sums[lane] ^ (sums[lane] >> 47) ^ word(secret + SECRET - STRIPE + 8 * lane)) * P32_1;
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2"))) static inline
#define LOAD(at) _mm256_loadu_si256((const void *)(at))

AVX2 __m256i add_half(__m256i sums, __m256i data, __m256i secret)
{
    __m256i keyed = _mm256_xor_si256(data, secret);
    sums = _mm256_add_epi64(sums, _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32)));
    return _mm256_add_epi64(sums, _mm256_shuffle_epi32(data, 0x4E));  // neighbours change places
}

AVX2 __m256i scramble_half(__m256i sums, __m256i secret)
{
    __m256i x = _mm256_xor_si256(_mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47)), secret);
    __m256i prime = _mm256_set1_epi32((int)P32_1), high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) static void add_stripes_avx2(uint64_t *sums, const uint8_t *data, int64_t bytes,
                                                             const uint8_t *secret)
{
    __m256i low = LOAD(sums), high = LOAD(sums + 4);
    for (int64_t left = (bytes - 1) / STRIPE; left > 0; left -= STRIPES) {
        for (int i = 0; i < STRIPES && i < left; i++, data += STRIPE) {
            low = add_half(low, LOAD(data), LOAD(secret + 8 * i));
            high = add_half(high, LOAD(data + 32), LOAD(secret + 8 * i + 32));
        }
        if (left >= STRIPES) {
            low = scramble_half(low, LOAD(secret + SECRET - STRIPE));
            high = scramble_half(high, LOAD(secret + SECRET - STRIPE + 32));
        }
    }
    _mm256_storeu_si256((void *)sums, low);
    _mm256_storeu_si256((void *)(sums + 4), high);
}
#define ADD_STRIPES (__builtin_cpu_supports("avx2") ? add_stripes_avx2 : add_stripes)
#else
#define ADD_STRIPES add_stripes
#endif

static uint64_t folded_product(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

// Of LONG_MIN bytes or more.
uint64_t hga_kvd_checksum(const uint8_t *data, int64_t bytes, uint64_t seed)
{
    uint64_t sums[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    uint8_t secret[SECRET];
    for (int i = 0; i < SECRET; i += 8) {
        uint64_t value = word(SECRET_BYTES + i) + (i % 16 ? -seed : seed);
        memcpy(secret + i, &value, 8);
    }
    ADD_STRIPES(sums, data, bytes, secret);
    add_stripe(sums, data + bytes - STRIPE, secret + SECRET - STRIPE - 7);
    uint64_t hash = bytes * P64_1;
    for (int i = 0; i < 4; i++)
        hash += folded_product(sums[2 * i] ^ word(secret + 11 + 16 * i), sums[2 * i + 1] ^ word(secret + 19 + 16 * i));
    hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9;
    return hash ^ (hash >> 32);
}
