// Where records are, and those that RAM has.

#include "pool.h"

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 6 };

int64_t hga_kvd_version(void) { return VERSION; }

enum { FEW_KEYS_MAX = 32 };

static int64_t find_one(const pool *p, const int64_t *rows, int64_t chunk_count, const key *asked, place *found)
{
    key k;
    memcpy(&k, asked, sizeof k);  // of any alignment
    int64_t chunk = k.group / (uint32_t)p->groups_per_chunk;
    if (chunk >= chunk_count || k.kv_head >= p->kv_heads || k.layer >= p->layers)
        return OUT_OF_RANGE;
    int64_t row = rows[chunk];
    if (row < 0 || row >= p->row_count)
        return BROKEN;
    int64_t slot = p->slot_of[row * p->row_step + k.layer * p->layer_step];
    if (slot < 0 || slot >= p->slot_count)
        return BROKEN;
    int64_t record = k.kv_head * p->groups_per_chunk + (k.group - chunk * p->groups_per_chunk);
    int64_t start = start_of(p, slot, record), state = p->state[slot * p->records + record];
    if (state == VALID && (start < 0 || start + p->record_bytes > p->region_bytes))
        return BROKEN;
    *found = (place){row, k.layer, record, slot, state, start, 0};
    return state == VALID;
}

// They were asked for: Lrfu.touch of the slots, of which none is counted twice.
static void count_use(const pool *p, place *found, int64_t count)
{
    int64_t asked = 0;
    for (int64_t i = 0; i < count; i++)
        asked += found[i].slot != 0;
    *p->now += asked * p->tick;
    for (int64_t i = 0; i < count; i++)
        found[i].worth = log_sum(p->log_worth[found[i].slot], *p->now);
    for (int64_t i = 0; i < count; i++)
        p->log_worth[found[i].slot] = found[i].worth;
}

// Where these records are; every slot that is named is pinned once for each of its keys, and its use is counted. Returns how
// many are VALID, or, with nothing done, -1 - i if the session has no such record as key i asks for; BROKEN - count for what cannot be.
int64_t hga_kvd_find(const pool *p, const int64_t *rows, int64_t chunk_count, const key *keys, int64_t count, place *found)
{
    int64_t valid = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t here = find_one(p, rows, chunk_count, keys + i, found + i);
        if (here < 0)
            return here == OUT_OF_RANGE ? -1 - i : BROKEN - count;
        valid += here;
    }
    for (int64_t i = 0; i < count; i++)
        p->pins[found[i].slot]++;
    count_use(p, found, count);
    return valid;
}

// The other half of find. Returns how many of the slots nobody has pinned any more.
int64_t hga_kvd_unpin(const pool *p, const place *found, int64_t count)
{
    int64_t free = 0;
    for (int64_t i = 0; i < count; i++)
        if (found[i].slot >= 0 && found[i].slot < p->slot_count)
            free += --p->pins[found[i].slot] == 0;
    return free;
}

// A whole small fetch: copies the records one behind the other if RAM has all of them, and counts their use. Returns 1;
// 0: nothing was done.
int64_t hga_kvd_fetch_few(const pool *p, const int64_t *rows, int64_t chunk_count, const key *keys, int64_t count,
                          char *into, int64_t into_bytes)
{
    place found[FEW_KEYS_MAX];
    if (count > FEW_KEYS_MAX || count * p->record_bytes > into_bytes)
        return 0;
    for (int64_t i = 0; i < count; i++)
        if (find_one(p, rows, chunk_count, keys + i, found + i) != 1)
            return 0;
    for (int64_t i = 0; i < count; i++)
        memcpy(into + i * p->record_bytes, p->region + found[i].start, p->record_bytes);
    count_use(p, found, count);
    return 1;
}

// Copies the records that are VALID, of key i to destination + i * record_bytes; what lies together in one piece. Returns
// how many, or BROKEN if one does not lie inside the region.
int64_t hga_kvd_copy_hits(const pool *p, const place *found, int64_t count, char *destination, int64_t destination_bytes)
{
    int64_t size = p->record_bytes, copied = 0, i = 0;
    if (count > destination_bytes / size)
        return BROKEN;
    while (i < count) {
        int64_t start = found[i].start, run = found[i].state == VALID;
        while (run && i + run < count && found[i + run].state == VALID && found[i + run].start == start + run * size)
            run++;
        if (run && (start < 0 || run * size > p->region_bytes - start))
            return BROKEN;
        memcpy(destination + i * size, p->region + start, run * size);
        copied += run;
        i += run + !run;
    }
    return copied;
}
