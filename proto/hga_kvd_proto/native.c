// What client and daemon do to their shared memory, in C: docs/adr/0039. No Python.h: ctypes calls it (native.py), with
// addresses and lengths that Python has checked.

#include <stdint.h>

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 1 };

int64_t hga_kvd_version(void) { return VERSION; }
