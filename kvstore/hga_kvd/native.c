// The hot path of the daemon in C: docs/adr/0039. No Python.h: ctypes calls it (native.py).
//
// What holds for every function:
// - It gets addresses and sizes that Python has checked, and checks every index against them: whatever the arrays say, it
//   stays inside the memory that it was given. A wrong index is an answer, never a crash.
// - It allocates nothing, keeps nothing, and takes no lock.
// - It has a twin in Python that does the same, and tests that compare the two.

#include <stdint.h>
#include <string.h>

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 1 };

int64_t hga_kvd_version(void) { return VERSION; }

// Copies `count` records of `size` bytes from source + starts[i] to destination + i * size. Returns how many: fewer than
// count if the next one does not lie inside the source or the destination.
int64_t hga_kvd_gather(const char *source, int64_t source_bytes, const int64_t *starts, int64_t count, int64_t size,
                       char *destination, int64_t destination_bytes)
{
    if (size <= 0)
        return 0;
    int64_t room = destination_bytes / size, i;
    for (i = 0; i < count && i < room; i++) {
        if (starts[i] < 0 || starts[i] > source_bytes - size)
            break;
        memcpy(destination + i * size, source + starts[i], size);
    }
    return i;
}
