// Which clean extents leave the arena, and what they leave behind: Lrfu.evict and Residency._evict.

#include "pool.h"

enum { WINDOW_SLOTS = 1 << 13 };  // eviction.py

static int goes_before(const pool *p, int64_t a, int64_t b)
{
    return p->log_worth[a] < p->log_worth[b] || (p->log_worth[a] == p->log_worth[b] && a < b);
}

static void swap(int64_t *a, int64_t *b)
{
    int64_t kept = *a;
    *a = *b, *b = kept;
}

// heap[0] is the last to go; all but heap[i] are in order.
static void sink(const pool *p, int64_t *heap, int64_t count, int64_t i)
{
    for (int64_t child = 2 * i + 1; child < count; i = child, child = 2 * i + 1) {
        if (child + 1 < count && goes_before(p, heap[child], heap[child + 1]))
            child++;
        if (!goes_before(p, heap[i], heap[child]))
            return;
        swap(heap + i, heap + child);
    }
}

// The slots of least worth from `begin` to before `end`, least first, at most `count` of them. Returns how many.
static int64_t least(const pool *p, int64_t begin, int64_t end, int64_t *heap, int64_t count)
{
    int64_t held = 0;
    for (int64_t slot = begin; slot < end; slot++) {
        if (p->log_worth[slot] == INFINITY || p->pins[slot])
            continue;
        if (held < count) {
            heap[held++] = slot;
            for (int64_t i = held == count ? count / 2 : 0; i > 0; i--)
                sink(p, heap, count, i - 1);
        } else if (goes_before(p, slot, heap[0])) {
            heap[0] = slot;
            sink(p, heap, count, 0);
        }
    }
    for (int64_t i = held < count ? held / 2 : 0; i > 0; i--)
        sink(p, heap, held, i - 1);
    for (int64_t last = held - 1; last > 0; last--) {
        swap(heap, heap + last);
        sink(p, heap, last, 0);
    }
    return held;
}

// Chooses up to `count` slots to reuse now, of one window after the other, remembers them, and takes them from the policy.
// Returns how many.
int64_t hga_kvd_evict(const pool *p, int64_t *victims, int64_t count)
{
    int64_t found = 0, windows = (p->slot_count + WINDOW_SLOTS - 1) / WINDOW_SLOTS;
    for (; found < count && windows; windows--) {
        int64_t begin = *p->window >= 0 && *p->window < p->slot_count ? *p->window : 0, end = begin + WINDOW_SLOTS;
        *p->window = end < p->slot_count ? end : 0;
        found += least(p, begin, end < p->slot_count ? end : p->slot_count, victims + found, count - found);
    }
    for (int64_t i = 0; i < found; i++) {
        int64_t key = p->policy_key[victims[i]];
        uint64_t at = past_place(p, key);
        p->past_key[at] = ~key;
        p->past_log_worth[at] = p->log_worth[victims[i]];
        p->log_worth[victims[i]] = INFINITY;
    }
    return found;
}

// Takes what these slots hold out of them and out of the index. Returns 1; 0, and nothing was done, if some of it is another
// geometry's; or BROKEN.
int64_t hga_kvd_empty(const pool *p, const int64_t *slots, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (slots[i] <= 0 || slots[i] >= p->slot_count)
            return BROKEN;
        const int64_t *holder = p->holder + 3 * slots[i];
        if (holder[0] != p->number)
            return 0;
        if (holder[1] < 0 || holder[1] >= p->row_count || holder[2] < 0 || holder[2] >= p->layers)
            return BROKEN;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t *holder = p->holder + 3 * slots[i];
        p->slot_of[holder[1] * p->row_step + holder[2] * p->layer_step] = 0;
        memset(p->state + slots[i] * p->records, EMPTY, p->records);
        p->held[slots[i]] = 0;
    }
    return 1;
}
