// The hot path of the daemon in C: docs/adr/0039. No Python.h: ctypes calls it (native.py).
//
// What holds for every function:
// - It gets addresses and sizes that Python has checked, and checks every index against them: whatever the arrays say, it
//   stays inside the memory that it was given. A wrong index is an answer, never a crash.
// - It allocates nothing, keeps nothing, and takes no lock.
// - It has a twin in Python that does the same, and tests that compare the two.

#include <math.h>
#include <stdint.h>
#include <string.h>

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 4 };

int64_t hga_kvd_version(void) { return VERSION; }

enum { FEW_KEYS_MAX = 32 };
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
    double *log_worth;                  // [slot_count]
    int64_t *holder;                    // [slot_count][number, row, layer]
    const uint8_t *doomed;              // [slot_count]
    char *region;
    int64_t region_bytes;
} pool;

// Where a key's record is: native.FOUND.
typedef struct {
    int64_t row, layer, record, slot, state, start;  // start: in the region, bytes; of slot 0 nothing that counts
} place;

enum { OUT_OF_RANGE = -1, BROKEN = -2 };  // no such record in the session; an index that cannot be

static int64_t start_of(const pool *p, int64_t slot, int64_t record)
{
    return (slot - 1) * p->stride + (slot - 1) / p->slots_per_page * p->page_rest + record * p->record_bytes;
}

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
    *found = (place){row, k.layer, record, slot, state, start};
    return state == VALID;
}

// Where these records are; every slot that is named is pinned once for each of its keys. Returns how many are VALID, or,
// with nothing pinned, -1 - i if the session has no such record as key i asks for; BROKEN - count for what cannot be.
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

// log2(2^a + 2^b), as numpy.logaddexp2.
static double log_sum(double a, double b)
{
    double high = a > b ? a : b, low = a > b ? b : a;
    return high == low ? high + 1 : high + log1p(exp2(low - high)) * 1.4426950408889634;
}

// A whole small fetch: copies the records one behind the other if RAM has all of them, and counts the use of their slots at
// `now`, each once. Returns 1; 0: nothing was done.
int64_t hga_kvd_fetch_few(const pool *p, const int64_t *rows, int64_t chunk_count, const key *keys, int64_t count,
                          char *into, int64_t into_bytes, double now)
{
    place found[FEW_KEYS_MAX];
    if (count > FEW_KEYS_MAX || count * p->record_bytes > into_bytes)
        return 0;
    for (int64_t i = 0; i < count; i++)
        if (find_one(p, rows, chunk_count, keys + i, found + i) != 1)
            return 0;
    for (int64_t i = 0; i < count; i++)
        memcpy(into + i * p->record_bytes, p->region + found[i].start, p->record_bytes);
    for (int64_t i = 0; i < count; i++) {
        int64_t slot = found[i].slot, first = 0;
        while (found[first].slot != slot)
            first++;
        if (first == i)
            p->log_worth[slot] = log_sum(p->log_worth[slot], now);
    }
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

// --- what is to be read ---

// A record to read, in the order of reading: native.PLANNED, each field a column of its own.
typedef struct {
    int64_t *key, *record, *slot, *extent, *segment, *offset;  // slot: of its extent, or 0; then extent is an index of absent
    uint64_t *seed, *expected;
    int64_t *start;  // of its place in the region, or -1: known once it is claimed
} planned;

enum { PLANNED_COLUMNS = 9 };

static planned columns_of(int64_t *columns, int64_t room)
{
    int64_t *at[PLANNED_COLUMNS];
    for (int i = 0; i < PLANNED_COLUMNS; i++)
        at[i] = columns + i * room;
    return (planned){at[0], at[1], at[2], at[3], at[4], at[5], (uint64_t *)at[6], (uint64_t *)at[7], at[8]};
}

// What else a plan says: native.LISTS. Keys that ask for what another key asks for, and which of the records that is; keys
// of records that another call reads; keys of records that are nowhere; extents (row, layer) that have no slot; segments.
enum { COPY, COPIED, AWAITED, LOST, ABSENT_ROW, ABSENT_LAYER, SEGMENT, LISTS };

typedef struct {
    int64_t place, key;  // place: of the record, among all of the geometry
} turn;

static void sort_by_place(turn *turns, turn *scratch, int64_t count)  // equal ones stay in their order
{
    for (int64_t width = 1; width < count; width *= 2)
        for (int64_t begin = 0; begin + width < count; begin += 2 * width) {
            int64_t a = begin, middle = begin + width, b = middle, end = middle + width < count ? middle + width : count;
            if (turns[middle - 1].place <= turns[middle].place)
                continue;
            for (int64_t i = begin; i < end; i++)
                scratch[i] = b == end || (a < middle && turns[a].place <= turns[b].place) ? turns[a++] : turns[b++];
            memcpy(turns + begin, scratch + begin, (end - begin) * sizeof *turns);
        }
}

static uint64_t mix(uint64_t x)  // checksum.mix
{
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

// Of what `find` found, that which is not VALID: each record once, neighbours one behind the other, otherwise in the order of
// the keys. room: of every column and list, no fewer than there are such keys; scratch: 4 * room + count. counts: of the
// records, and of all lists but COPIED and ABSENT_LAYER, which are as long as the ones before. Returns 0, or BROKEN.
int64_t hga_kvd_plan(const pool *p, const place *found, int64_t count, int64_t *columns, int64_t *lists, int64_t room,
                     int64_t *scratch, int64_t *counts)
{
    planned to = columns_of(columns, room);
    turn *turns = (turn *)scratch, *rest = turns + room;
    int64_t *first = scratch + 4 * room, total = 0, seen = 0, items = 0, length[LISTS] = {0};
    for (int64_t i = 0; i < count; i++) {
        const place *f = found + i;
        first[i] = -1;
        if (f->state == VALID)
            continue;
        if (++seen > room || f->row < 0 || f->row >= p->chunk_count || f->row >= p->row_count || f->layer < 0 ||
            f->layer >= p->layers || f->record < 0 || f->record >= p->records || f->slot < 0 || f->slot >= p->slot_count)
            return BROKEN;
        if (f->state == FILLING)
            lists[AWAITED * room + length[AWAITED]++] = i;
        else if (!p->segment[f->row])
            lists[LOST * room + length[LOST]++] = i;
        else
            turns[total++] = (turn){(f->row * p->layers + f->layer) * p->records + f->record, i};
    }
    sort_by_place(turns, rest, total);
    int64_t distinct = 0;  // turns[0] .. turns[distinct]: each place once, with its first key
    for (int64_t i = 0; i < total; i++)
        if (distinct && turns[distinct - 1].place == turns[i].place) {
            lists[COPY * room + length[COPY]] = turns[i].key;
            lists[COPIED * room + length[COPY]++] = distinct - 1;
        } else
            turns[distinct++] = turns[i];
    int64_t lowest = 0;  // first[k]: the run of neighbours that is read when it is key k's turn
    for (int64_t i = 0, begin = 0; i < distinct; i++) {
        if (!i || turns[i].place != turns[i - 1].place + 1)
            begin = i, lowest = turns[i].key;
        if (turns[i].key < lowest)
            first[lowest] = -1, lowest = turns[i].key;
        first[lowest] = begin;
    }
    int64_t *extent_of = (int64_t *)rest, *turn_of = extent_of + room;  // by place
    for (int64_t i = 0; i < distinct; i++) {
        const place *f = found + turns[i].key;
        int64_t known = length[ABSENT_ROW];
        extent_of[i] = -1;
        if (f->slot)
            continue;
        if (!known || lists[ABSENT_ROW * room + known - 1] != f->row || lists[ABSENT_LAYER * room + known - 1] != f->layer) {
            lists[ABSENT_ROW * room + known] = f->row;
            lists[ABSENT_LAYER * room + known] = f->layer;
            length[ABSENT_ROW]++;
        }
        extent_of[i] = length[ABSENT_ROW] - 1;
    }
    for (int64_t key = 0; key < count; key++)
        for (int64_t i = first[key]; i >= 0; i = i + 1 < distinct && turns[i + 1].place == turns[i].place + 1 ? i + 1 : -1) {
            const place *f = found + turns[i].key;
            int64_t segment = p->segment[f->row], which = 0;
            while (which < length[SEGMENT] && lists[SEGMENT * room + which] != segment)
                which++;
            if (which == length[SEGMENT])
                lists[SEGMENT * room + length[SEGMENT]++] = segment;
            to.key[items] = turns[i].key, to.record[items] = f->record, to.slot[items] = f->slot;
            to.extent[items] = extent_of[i], to.segment[items] = which;
            to.offset[items] = p->offset[f->row] + f->layer * p->stride + f->record * p->record_bytes;
            to.seed[items] = mix(p->uid[f->row] ^ mix((uint64_t)f->layer << 32 | (uint64_t)f->record));
            to.expected[items] = p->checksums[turns[i].place];
            turn_of[i] = items++;
        }
    for (int64_t i = 0; i < length[COPY]; i++)
        lists[COPIED * room + i] = turn_of[lists[COPIED * room + i]];
    counts[0] = items;
    memcpy(counts + 1, length, sizeof length);
    return 0;
}

// Gives the first `fresh_count` of the extents that have none their slots, pinned once each, and every record that has one
// now its place there: FILLING, for this call alone to write. One that went BAD is never filled again. Returns 0, or BROKEN.
int64_t hga_kvd_claim(const pool *p, int64_t *columns, int64_t *lists, int64_t room, int64_t count, const int64_t *fresh,
                      int64_t fresh_count)
{
    planned to = columns_of(columns, room);
    for (int64_t i = 0; i < fresh_count; i++) {
        int64_t row = lists[ABSENT_ROW * room + i], layer = lists[ABSENT_LAYER * room + i], slot = fresh[i];
        if (slot <= 0 || slot >= p->slot_count || row < 0 || row >= p->row_count || layer < 0 || layer >= p->layers)
            return BROKEN;
        p->slot_of[row * p->row_step + layer * p->layer_step] = slot;
        memcpy(p->holder + 3 * slot, (int64_t[]){p->number, row, layer}, 3 * sizeof(int64_t));
        p->pins[slot]++;
    }
    for (int64_t i = 0; i < count; i++) {
        if (!to.slot[i] && to.extent[i] >= 0 && to.extent[i] < fresh_count)
            to.slot[i] = fresh[to.extent[i]];
        uint8_t *state = p->state + to.slot[i] * p->records + to.record[i];
        to.start[i] = -1;
        if (to.slot[i] && *state == EMPTY) {
            *state = FILLING;
            to.start[i] = start_of(p, to.slot[i], to.record[i]);
        } else
            to.slot[i] = 0;
    }
    return 0;
}

// Ends FILLING, VALID where keep[i], and unpins the slots that were fresh. A doomed slot stays as it is.
int64_t hga_kvd_settle(const pool *p, int64_t *columns, int64_t room, int64_t count, const uint8_t *keep,
                       const int64_t *fresh, int64_t fresh_count)
{
    planned to = columns_of(columns, room);
    for (int64_t i = 0; i < count; i++)
        if (to.slot[i] > 0 && to.slot[i] < p->slot_count && !p->doomed[to.slot[i]])
            p->state[to.slot[i] * p->records + to.record[i]] = keep[i] ? VALID : EMPTY;
    for (int64_t i = 0; i < fresh_count; i++)
        if (fresh[i] > 0 && fresh[i] < p->slot_count)
            p->pins[fresh[i]]--;
    return 0;
}

// --- XXH3, 64 bits, with a seed, of more than 240 bytes (the specification's "long" inputs) ---

static const uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D, P64_1 = 0x9E3779B185EBCA87,
                      P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9, P64_4 = 0x85EBCA77C2B2AE63,
                      P64_5 = 0x27D4EB2F165667C5;
enum { SECRET = 192, STRIPE = 64, STRIPES = (SECRET - STRIPE) / 8, LONG_MIN = 241 };
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

// --- records to the arena ---

// Copies `count` extents, one behind the other in source, into slots, with zeros behind each, and takes the checksum of each
// record as it lies there: the source is a client's, and may change. Of records of LONG_MIN bytes or more. Returns count;
// fewer if the next slot cannot be, or the source has no more.
int64_t hga_kvd_put_extents(const pool *p, const int64_t *slots, int64_t count, const char *source, int64_t source_bytes,
                            const uint64_t *seeds, uint64_t *checksums)
{
    int64_t size = p->record_bytes, extent = p->records * size, i;
    for (i = 0; i < count && i < source_bytes / extent; i++) {
        if (slots[i] < 1 || slots[i] >= p->slot_count || start_of(p, slots[i], 0) + p->stride > p->region_bytes)
            break;
        char *to = p->region + start_of(p, slots[i], 0);
        for (int64_t record = 0; record < p->records; record++, seeds++, checksums++, to += size) {
            memcpy(to, source + i * extent + record * size, size);
            *checksums = hga_kvd_checksum((const uint8_t *)to, size, *seeds);
        }
        memset(to, 0, p->stride - extent);
    }
    return i;
}

// --- records from disk ---

// Records to read: native.Batch, field by field. Item i belongs to destination + positions[i] * size, and is read there, or,
// if starts[i] is not below 0, to region + starts[i], from where it is copied when it has passed its checksum.
typedef struct {
    int64_t count, size, alignment;
    char *region;
    int64_t region_bytes;
    char *destination;
    int64_t destination_bytes;
    const int64_t *starts, *positions, *offsets;
    const int32_t *fds;
    const uint64_t *seeds, *expected;
    uint8_t *wrong;  // of each item: could not be read, or is not what was written
    int64_t *reads;  // room for count + 1
} batch;

static int inside(int64_t start, int64_t size, int64_t bytes) { return start >= 0 && start <= bytes - size; }

static int is_sound(const batch *b)
{
    if (b->size < LONG_MIN || b->count < 0 || b->destination_bytes < 0)
        return 0;
    for (int64_t i = 0; i < b->count; i++)
        if (b->positions[i] < 0 || b->positions[i] >= b->destination_bytes / b->size ||
            (b->starts[i] >= 0 && !inside(b->starts[i], b->size, b->region_bytes)))
            return 0;
    return 1;
}

static char *memory_of(const batch *b, int64_t i)
{
    return b->starts[i] >= 0 ? b->region + b->starts[i] : b->destination + b->positions[i] * b->size;
}

// Items from `first` to before `end` lie in memory: verifies those that are not wrong already, and copies what is right.
static void take(const batch *b, int64_t first, int64_t end)
{
    for (int64_t i = first; i < end; i++) {
        char *memory = memory_of(b, i);
        if (!b->wrong[i])
            b->wrong[i] = hga_kvd_checksum((uint8_t *)memory, b->size, b->seeds[i]) != b->expected[i];
        if (!b->wrong[i] && b->starts[i] >= 0)
            memcpy(b->destination + b->positions[i] * b->size, memory, b->size);
    }
}

// The same for whoever has read them. Returns 0, or BROKEN.
int64_t hga_kvd_take(const batch *b, int64_t first, int64_t end)
{
    if (!is_sound(b) || first < 0 || end > b->count)
        return BROKEN;
    take(b, first, end);
    return 0;
}

#ifdef __linux__
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// --- the ring: io_uring as uring.py has set it up ---

// native.Ring, field by field. `callers` is how many calls share the queue depth just now.
typedef struct {
    int64_t fd, entries, queue_depth;
    const int64_t *callers;
    uint32_t *sq_head, *sq_tail, *sq_array, *cq_head, *cq_tail;
    struct {
        uint8_t opcode, flags;
        uint16_t priority;
        int32_t fd;
        int64_t offset;
        uint64_t address;
        uint32_t length, rest;
        uint64_t row, more[3];
    } *sqes;
    struct {
        uint64_t row;
        int32_t result;
        uint32_t flags;
    } *cqes;
    int64_t cqe_count;
} ring;

enum { OP_READ = 22, GETEVENTS = 1, READ_BYTES_MAX = 1 << 30, BUSY_TRIES_MAX = 1000, BUSY_PAUSE_NS = 1000000 };
enum { WAIT_SHARE = 8 };  // a wait is for so much of what is in flight: the rest keeps the device busy,
enum { WAIT_LAST = 8 };   // and, once all is in flight, for so many: a wake costs as much as verifying one record
enum { AT_ONCE = 64 };    // completions that are taken from the queue before more reads are put into it

static uint32_t load(const uint32_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static void store(uint32_t *at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

// Submits what is queued and waits until `wanted` completions are there; 0 or errno.
static int enter(const ring *r, uint32_t wanted)
{
    uint32_t queued = *r->sq_tail - load(r->sq_head);
    return syscall(SYS_io_uring_enter, r->fd, queued, wanted, GETEVENTS, NULL, 0) < 0 ? errno : 0;
}

// Which items are read in one piece: read i brings those from reads[i] to before reads[i + 1]. Returns how many reads.
static int64_t plan_reads(const batch *b)
{
    int64_t count = 0;
    for (int64_t i = 0; i < b->count; i++) {
        int64_t length = i ? (i - b->reads[count - 1]) * b->size : 0;
        if (!i || b->fds[i] != b->fds[i - 1] || b->offsets[i] != b->offsets[i - 1] + b->size ||
            memory_of(b, i) != memory_of(b, i - 1) + b->size || length > READ_BYTES_MAX - b->size)
            b->reads[count++] = i;
    }
    b->reads[count] = b->count;
    return count;
}

static int is_aligned(const batch *b)
{
    uint64_t bits = b->size;
    for (int64_t i = 0; i < b->count; i++)
        bits |= (uint64_t)b->offsets[i] | (uint64_t)memory_of(b, i);
    return !(bits & (b->alignment - 1));
}

static void put_read(const ring *r, const batch *b, int64_t read)
{
    uint32_t tail = *r->sq_tail, place = tail & (r->entries - 1);
    int64_t first = b->reads[read], length = (b->reads[read + 1] - first) * b->size;
    memset(r->sqes + place, 0, sizeof *r->sqes);
    r->sqes[place].opcode = OP_READ;
    r->sqes[place].fd = b->fds[first];
    r->sqes[place].offset = b->offsets[first];
    r->sqes[place].address = (uint64_t)memory_of(b, first);
    r->sqes[place].length = length;
    r->sqes[place].row = read;
    r->sq_array[place] = place;
    store(r->sq_tail, tail + 1);
}

// Reads, verifies and copies all items, those that are complete while others are under way; and what RAM has, while all
// are (found: of `found_count` keys, to where copy_hits puts them). wrong is all 1 before, and 0 of what is right after it.
//
// Returns 0; BROKEN, or UNALIGNED, and nothing was done; or the errno of a ring that is of no more use. In every case
// nothing is in flight any more.
enum { UNALIGNED = -3 };

int64_t hga_kvd_bring(const ring *r, const batch *b, const pool *p, const place *found, int64_t found_count)
{
    if (!is_sound(b) || r->entries <= 0 || r->cqe_count < r->entries)
        return BROKEN;
    if (!is_aligned(b))
        return UNALIGNED;
    if (*r->sq_tail != load(r->sq_head) || load(r->cq_tail) != *r->cq_head)
        return EBUSY;
    if (!b->count)
        return found_count ? BROKEN : 0;
    int64_t reads = plan_reads(b), queued = 0, done = 0, tries = 0, error = 0, hits = found_count ? -1 : 0;  // -1: to copy
    struct {
        int64_t read, result;
    } complete[AT_ONCE];
    while (done < reads && !error) {
        int64_t count = 0;
        uint32_t head = *r->cq_head, tail = load(r->cq_tail);
        for (; head != tail && count < AT_ONCE; head++, count++) {
            complete[count].read = r->cqes[head & (r->cqe_count - 1)].row;
            complete[count].result = r->cqes[head & (r->cqe_count - 1)].result;
        }
        store(r->cq_head, head);
        done += count;
        int64_t callers = __atomic_load_n(r->callers, __ATOMIC_RELAXED);
        int64_t depth = callers > 1 ? r->queue_depth / callers : r->queue_depth;
        depth = depth < 1 ? 1 : depth > r->entries ? r->entries : depth;
        while (queued < reads && queued - done < depth && *r->sq_tail - load(r->sq_head) < r->entries)
            put_read(r, b, queued++);
        int64_t flying = queued - done, wait = (flying + WAIT_SHARE - 1) / WAIT_SHARE;
        if (queued == reads && wait < WAIT_LAST)
            wait = flying < WAIT_LAST ? flying : WAIT_LAST;
        int more = hits == -1 || count;  // there is something to do meanwhile
        if (done < reads && (!more || *r->sq_tail != load(r->sq_head)))
            error = enter(r, more ? 0 : wait);
        int busy = error == EAGAIN || error == EBUSY;  // short of memory for requests, or completions are to be read first
        tries = busy && !count ? tries + 1 : 0;
        if (busy && tries)
            nanosleep(&(struct timespec){0, BUSY_PAUSE_NS}, NULL);
        if (error == EINTR || (busy && tries < BUSY_TRIES_MAX))
            error = 0;
        for (int64_t i = 0; i < count; i++) {
            int64_t read = complete[i].read, first, end;
            if (read < 0 || read >= queued)
                continue;
            first = b->reads[read], end = b->reads[read + 1];
            if (complete[i].result == (end - first) * b->size) {  // else it is read again, by itself
                memset(b->wrong + first, 0, end - first);
                take(b, first, end);
            }
        }
        if (hits == -1)
            hits = hga_kvd_copy_hits(p, found, found_count, b->destination, b->destination_bytes);
    }
    // After an error: what the kernel has not taken it is not given, and for the rest is waited.
    queued -= *r->sq_tail - load(r->sq_head);
    store(r->sq_tail, *r->sq_head);
    while (done < queued) {
        done += load(r->cq_tail) - *r->cq_head;
        store(r->cq_head, load(r->cq_tail));
        if (done < queued && enter(r, 1))
            nanosleep(&(struct timespec){0, BUSY_PAUSE_NS}, NULL);
    }
    return hits < 0 ? BROKEN : error;
}
#endif
