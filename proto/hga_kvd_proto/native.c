// What client and daemon do to their shared counters and bells, in C: docs/adr/0039 and docs/fastlane.md. No Python.h: ctypes
// calls it (native.py), with addresses that Python keeps alive as long as the structures here name them.
//
// What holds for every function:
// - The other side may write anything into the shared words at any time. A word that it owns is read once for each use,
//   and only compared: nothing here is indexed by it.
// - A word is published with release and read with acquire, so who sees a counter move sees what was written before.
// - A side that is about to sleep takes back that it is awake, then looks once more; who posts, posts first and then asks
//   whether the other is awake. The full fences between make one of the two see the other.
// - Whoever never says that it is awake, as the twins in Python, is rung always.

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// Grows with every change of what is called here: a library of another version is not used.
enum { VERSION = 2 };

int64_t hga_kvd_version(void) { return VERSION; }

enum { EVENTS = 16, NS = 1000000000 };
// A wait that hears a ring without sleeping leaves it unread, for so many. A bell holds about 270.
enum { RINGS_UNREAD_MAX = 64, RINGS_READ_BYTES = 4096 };

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * NS + t.tv_nsec;
}

static uint64_t read_word(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static void write_word(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// --- the client's end ---

struct end {
    uint64_t *posted;              // ours
    const uint64_t *completed;     // theirs
    uint64_t *awake;               // ours: 1 while we look at `completed`
    const uint64_t *other_awake;   // theirs
    int32_t other_bell, bell;      // the one that we ring, an eventfd; the one that rings here, never blocking
    int32_t alarm;                 // readable or hung up: waiting is over
    int32_t quick;                 // whether the last wait was short, and this one looks before it sleeps
    int32_t unread, unused;        // rings that may not have been read
    int64_t spin_ns;
};

enum { MOVED, TIME_IS_UP, ALARMED, INTERRUPTED };

static void read_rings(struct end *end)
{
    char rings[RINGS_READ_BYTES];
    (void)!read(end->bell, rings, sizeof rings);
    end->unread = 0;
}

// Waits until the other side's counter is not `seen`.
int64_t hga_kvd_wait(struct end *end, uint64_t seen, int64_t timeout_ns)
{
    int64_t started = now_ns(), now = started;
    if (end->quick) {
        write_word(end->awake, 1);
        for (; now - started < end->spin_ns; now = now_ns()) {
            if (read_word(end->completed) != seen) {
                if (++end->unread >= RINGS_UNREAD_MAX)
                    read_rings(end);
                return MOVED;
            }
            sched_yield();
        }
    }
    write_word(end->awake, 0);
    fence();
    for (;;) {
        read_rings(end);  // whoever rings from here on wakes the poll
        if (read_word(end->completed) != seen)
            break;
        int64_t left = started + timeout_ns - now_ns();
        if (left <= 0)
            return TIME_IS_UP;
        struct pollfd fds[2] = {{end->bell, POLLIN, 0}, {end->alarm, POLLIN, 0}};
        struct timespec limit = {left / NS, left % NS};
        if (ppoll(fds, 2, &limit, NULL) < 0)
            return INTERRUPTED;  // Python's handlers of signals have their turn
        if (fds[1].revents)
            return read_word(end->completed) == seen ? ALARMED : MOVED;
    }
    end->quick = now_ns() - started < 2 * end->spin_ns;
    return MOVED;
}

// Publishes that so many requests are posted, rings if the other side may sleep, and waits.
int64_t hga_kvd_exchange(struct end *end, uint64_t posted, uint64_t seen, int64_t timeout_ns)
{
    write_word(end->posted, posted);
    fence();
    if (read_word(end->other_awake) != 1) {
        uint64_t ring = 1;
        if (write(end->other_bell, &ring, sizeof ring) < 0 && errno == EINTR)
            (void)!write(end->other_bell, &ring, sizeof ring);
    }
    return hga_kvd_wait(end, seen, timeout_ns);
}

// --- the daemon's end ---

struct lane {
    const uint64_t *posted;  // theirs
    uint64_t *awake;         // ours: 1 while the leader looks
    uint64_t served;
    uint64_t busy;           // a thread makes a call of it: not the leader's
};

struct leader {
    struct lane **lanes;
    int64_t count, first;          // first: of the lanes, looked at before the others
    const uint64_t *roused;        // another word than `heard`: come back
    uint64_t heard;
    int64_t since_ns, waited_ns;   // when this wait began, 0: now; how long it took
    int64_t spin_ns, crowded_ns;   // how long it looks; how long a look may take on a core that nobody else wants
    int32_t epoll, looks;          // looks: whether it does, before it sleeps; 0 once it has given that up
    int32_t crowded, unused;
};

enum { LOOK_AGAIN = -1 };

static int64_t found(const struct leader *leader)
{
    for (int64_t i = 0; i < leader->count; i++) {
        int64_t place = (leader->first + i) % leader->count;
        struct lane *lane = leader->lanes[place];
        if (!read_word(&lane->busy) && read_word(lane->posted) != lane->served)
            return place;
    }
    return LOOK_AGAIN;
}

static void say_awake(const struct leader *leader, uint64_t awake)
{
    for (int64_t i = 0; i < leader->count; i++)
        if (read_word(leader->lanes[i]->awake) != awake)
            write_word(leader->lanes[i]->awake, awake);
}

static int64_t wait_for_request(struct leader *leader)
{
    int64_t place, now = now_ns();
    if (!leader->since_ns)
        leader->since_ns = now;
    if (leader->looks)
        say_awake(leader, 1);
    while (leader->looks && (leader->looks = now - leader->since_ns < leader->spin_ns)) {
        sched_yield();
        int64_t after = now_ns();
        if (after - now > leader->crowded_ns) {
            leader->crowded = 1;
            leader->looks = 0;
        }
        now = after;
        if ((place = found(leader)) >= 0)
            return place;
        if (read_word(leader->roused) != leader->heard)
            return LOOK_AGAIN;
    }
    say_awake(leader, 0);
    fence();
    if ((place = found(leader)) >= 0 || read_word(leader->roused) != leader->heard)
        return place;
    struct epoll_event events[EVENTS];
    epoll_wait(leader->epoll, events, EVENTS, -1);
    return found(leader);
}

// Waits for a request. Returns the place of its lane; LOOK_AGAIN when somebody rang or roused the leader: the wait goes on.
int64_t hga_kvd_lead(struct leader *leader)
{
    int64_t place = found(leader);
    leader->waited_ns = 0;
    if (place < 0) {
        place = wait_for_request(leader);
        leader->waited_ns = now_ns() - leader->since_ns;
    }
    if (place >= 0)
        leader->first = place + 1;
    return place;
}

// Publishes that so many requests are answered, and rings if the client may sleep. Never blocks, whatever the client does to
// the socket: a bell that is full has rung.
void hga_kvd_publish(uint64_t *completed, uint64_t count, const uint64_t *other_awake, int32_t bell)
{
    write_word(completed, count);
    fence();
    if (read_word(other_awake) != 1)
        (void)!send(bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}
