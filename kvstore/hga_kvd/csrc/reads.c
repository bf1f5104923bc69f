// Records from disk.

#include "pool.h"

// Records to read: native.Batch, field by field. Item i belongs to destination + positions[i] * size, and is read there, or,
// if starts[i] is not below 0, to region + starts[i], from where it is copied when it has passed its checksum.
typedef struct {
    int64_t count, size, alignment;
    char *region;
    int64_t region_bytes;
    char *destination;
    int64_t destination_bytes;
    const int64_t *starts, *positions, *offsets, *files;  // files: which of the descriptors
    const int32_t *fds;
    int64_t file_count;
    const uint64_t *seeds, *expected;
    uint8_t *wrong;  // of each item: could not be read, or is not what was written
    int64_t *reads;  // room for count + 1
} batch;

static int is_sound(const batch *b)
{
    if (b->size < LONG_MIN || b->count < 0 || b->destination_bytes < 0)
        return 0;
    for (int64_t i = 0; i < b->count; i++)
        if (b->positions[i] < 0 || b->positions[i] >= b->destination_bytes / b->size ||
            (b->starts[i] >= 0 && !inside(b->starts[i], b->size, b->region_bytes)) ||
            (b->fds && (b->files[i] < 0 || b->files[i] >= b->file_count)))
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
        if (!i || b->files[i] != b->files[i - 1] || b->offsets[i] != b->offsets[i - 1] + b->size ||
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
    r->sqes[place].fd = b->fds[b->files[first]];
    r->sqes[place].offset = b->offsets[first];
    r->sqes[place].address = (uint64_t)memory_of(b, first);
    r->sqes[place].length = length;
    r->sqes[place].row = read;
    r->sq_array[place] = place;
    store(r->sq_tail, tail + 1);
}

// Reads, verifies and copies all items, those that are complete while others are under way; and what RAM has, while all
// are (found: of `found_count` keys, to where copy_hits puts them). wrong is 0 of what is right after it, and 1 of the rest.
//
// Returns 0; BROKEN, or UNALIGNED, and nothing was done; or the errno of a ring that is of no more use. In every case
// nothing is in flight any more.
enum { UNALIGNED = -3 };

int64_t hga_kvd_bring(const ring *r, const batch *b, const pool *p, const place *found, int64_t found_count)
{
    if (!is_sound(b) || !b->fds || r->entries <= 0 || r->cqe_count < r->entries)
        return BROKEN;
    memset(b->wrong, 1, b->count);
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
