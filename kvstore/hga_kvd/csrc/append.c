// Records into the arena.

#include "pool.h"

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
