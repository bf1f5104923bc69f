// What the steps of a fetch share: docs/adr/0039. No Python.h: ctypes calls them (native.py).
//
// What holds for every function here:
// - It gets addresses and sizes that Python has checked, and checks every index against them: whatever the arrays say, it
//   stays inside the memory that it was given. A wrong index is an answer, never a crash.
// - It allocates nothing, keeps nothing, and takes no lock.
// - It has a twin in Python that does the same, and tests that compare the two.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { EMPTY, FILLING, VALID, BAD };  // arena.py

// KEY_DTYPE
typedef struct {
    uint32_t group;
    uint16_t kv_head, layer;
} key;

// What a fetch needs to know of one geometry's chunks and slots: native.Pool, field by field. A row is a chunk's; slot 0 is
// nobody's.
typedef struct {
    int64_t layers, kv_heads, groups_per_chunk, record_bytes, records;  // records of an extent: kv_heads * groups_per_chunk
    int64_t slot_count, stride, slots_per_page, page_rest;
    int64_t row_count, row_step, layer_step;  // of slot_of: [row][layer] in these steps
    int64_t *slot_of;
    int64_t chunk_count;                // rows of the next four
    const int64_t *segment, *offset;    // segment 0: not on disk
    const uint64_t *uid, *checksums;    // checksums: [row][layer][record]
    int64_t number;                     // of the geometry, in holder
    uint8_t *state;                     // [slot_count][records]
    int32_t *pins;                      // [slot_count]
    // The policy's (eviction.py): of slots; of what was evicted, in places by hash; and its clock.
    double *log_worth;                  // [slot_count]
    int64_t *policy_key;                // [slot_count]
    int64_t *past_key;                  // [past_count], inverted
    double *past_log_worth;             // [past_count]
    int64_t past_count;                 // a power of two
    double *now, tick;
    int64_t *window;                    // where the next choice of victims begins
    int64_t *holder;                    // [slot_count][number, row, layer]
    const uint8_t *doomed;              // [slot_count]
    uint8_t *held;                      // [slot_count]
    char *region;
    int64_t region_bytes;
} pool;

// Where a key's record is: native.FOUND.
typedef struct {
    int64_t row, layer, record, slot, state, start;  // start: in the region, bytes; of slot 0 nothing that counts
    double worth;  // of the slot, once its use is counted
} place;

enum { OUT_OF_RANGE = -1, BROKEN = -2 };  // no such record in the session; an index that cannot be

static inline int64_t start_of(const pool *p, int64_t slot, int64_t record)
{
    return (slot - 1) * p->stride + (slot - 1) / p->slots_per_page * p->page_rest + record * p->record_bytes;
}

// log2(2^a + 2^b), as numpy.logaddexp2.
static inline double log_sum(double a, double b)
{
    double high = a > b ? a : b, low = a > b ? b : a;
    if (isinf(high))  // a slot that may not be evicted
        return high;
    return high == low ? high + 1 : high + log1p(exp2(low - high)) * 1.4426950408889634;
}

// Of an evicted extent in past_key and past_log_worth: Past._at.
static inline uint64_t past_place(const pool *p, int64_t key)
{
    return (uint64_t)key * 0x9E3779B97F4A7C15 >> (64 - __builtin_ctzll(p->past_count));
}

static inline int inside(int64_t start, int64_t size, int64_t bytes) { return start >= 0 && start <= bytes - size; }

// find.c
int64_t hga_kvd_copy_hits(const pool *p, const place *found, int64_t count, char *destination, int64_t destination_bytes);

// checksum.c
enum { LONG_MIN = 241 };  // bytes of the shortest one that it knows
uint64_t hga_kvd_checksum(const uint8_t *data, int64_t bytes, uint64_t seed);
