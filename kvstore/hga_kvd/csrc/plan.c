// Which records are to be read, in which order, and which slots they get.

#include "pool.h"

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

// Lrfu.admit of one of the extents that are admitted at `now`.
static void admit(const pool *p, int64_t slot, int64_t row, int64_t layer, double now)
{
    int64_t key = p->number << 48 | row << 10 | layer;  // residency.extent_key
    uint64_t at = past_place(p, key);
    p->policy_key[slot] = key;
    p->log_worth[slot] = log_sum(p->past_key[at] == ~key ? p->past_log_worth[at] : -INFINITY, now);
}

// Gives the first `fresh_count` of the extents that have none their slots, pinned once each and known to the policy, and every record that has one
// now its place there: FILLING, for this call alone to write. One that went BAD is never filled again. Returns 0, or BROKEN.
int64_t hga_kvd_claim(const pool *p, int64_t *columns, int64_t *lists, int64_t room, int64_t count, const int64_t *fresh,
                      int64_t fresh_count)
{
    planned to = columns_of(columns, room);
    *p->now += fresh_count * p->tick;
    for (int64_t i = 0; i < fresh_count; i++) {
        int64_t row = lists[ABSENT_ROW * room + i], layer = lists[ABSENT_LAYER * room + i], slot = fresh[i];
        if (slot <= 0 || slot >= p->slot_count || row < 0 || row >= p->row_count || layer < 0 || layer >= p->layers)
            return BROKEN;
        p->slot_of[row * p->row_step + layer * p->layer_step] = slot;
        memcpy(p->holder + 3 * slot, (int64_t[]){p->number, row, layer}, 3 * sizeof(int64_t));
        p->pins[slot]++;
        admit(p, slot, row, layer, *p->now);
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

// Ends FILLING, EMPTY where unkept[i] and else VALID, and unpins the slots that were fresh. A doomed slot stays as it is.
int64_t hga_kvd_settle(const pool *p, int64_t *columns, int64_t room, int64_t count, const uint8_t *unkept,
                       const int64_t *fresh, int64_t fresh_count)
{
    planned to = columns_of(columns, room);
    for (int64_t i = 0; i < count; i++)
        if (to.slot[i] > 0 && to.slot[i] < p->slot_count && !p->doomed[to.slot[i]])
            p->state[to.slot[i] * p->records + to.record[i]] = unkept[i] ? EMPTY : VALID;
    for (int64_t i = 0; i < fresh_count; i++)
        if (fresh[i] > 0 && fresh[i] < p->slot_count)
            p->pins[fresh[i]]--;
    return 0;
}
