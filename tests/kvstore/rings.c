// Two clients' ends and a leader over proto/hga_kvd_proto/native.c, in threads, and a third client that writes what it likes
// into its counters and rings without a pause. What is passed beside the counters is plain memory: if a counter that moved
// did not bring it along, the thread sanitizer says so. Built and run by test_rings.py.

#include "native.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>

enum { CLIENTS = 2, LANES = CLIENTS + 1, ROUNDS = 4000, SPIN_NS = 20000 };

static struct {
    uint64_t posted, completed, awake, client_awake;
    uint64_t request, answer;
    int request_bell, bells[2];
    struct lane lane;
} all[LANES];
static int alarm_bell, finished, answered;

static void check(int sound, const char *what)
{
    if (!sound) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

static void *honest(void *number)
{
    typeof(all[0]) *mine = &all[(intptr_t)number];
    struct end end = {&mine->posted, &mine->completed, &mine->client_awake, &mine->awake, mine->request_bell, mine->bells[0], alarm_bell,
                      1, 0, 0, SPIN_NS};
    for (uint64_t n = 0; n < ROUNDS; n++) {
        mine->request = n;
        check(hga_kvd_exchange(&end, n + 1, n, 20LL * NS) == MOVED, "no answer");
        check(mine->answer == 3 * n, "an answer of another request");
        if (n % 400 == 0)
            usleep(1000);  // both sides sleep
    }
    check(hga_kvd_wait(&end, ROUNDS, 1000000) == TIME_IS_UP, "an answer that nobody asked for");
    __atomic_add_fetch(&finished, 1, __ATOMIC_SEQ_CST);
    uint64_t ring = 1;
    check(write(mine->request_bell, &ring, sizeof ring) == sizeof ring, "no ring");
    return NULL;
}

static void *hostile(void *number)
{
    typeof(all[0]) *mine = &all[(intptr_t)number];
    unsigned seed = 1;
    while (__atomic_load_n(&answered, __ATOMIC_SEQ_CST) < CLIENTS * ROUNDS / 2) {  // then its rings wake nobody any more
        uint64_t ring = 1;
        write_word(&mine->posted, (uint64_t)rand_r(&seed) << 33);
        write_word(&mine->awake, rand_r(&seed));
        write_word(&mine->client_awake, rand_r(&seed) % 3);
        (void)!write(mine->request_bell, &ring, sizeof ring);
    }
    return NULL;
}

int main(void)
{
    struct lane *lanes[LANES];
    uint64_t roused = 0;
    pthread_t threads[LANES];
    int epoll = epoll_create1(0);
    alarm_bell = eventfd(0, 0);
    for (intptr_t i = 0; i < LANES; i++) {
        struct epoll_event rung = {EPOLLIN | EPOLLET, {0}};
        all[i].request_bell = eventfd(0, EFD_NONBLOCK);
        check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, all[i].bells), "no socket");
        check(!epoll_ctl(epoll, EPOLL_CTL_ADD, all[i].request_bell, &rung), "no epoll");
        all[i].lane = (struct lane){&all[i].posted, &all[i].awake, 0, 0};
        lanes[i] = &all[i].lane;
        pthread_create(&threads[i], NULL, i < CLIENTS ? honest : hostile, (void *)i);
    }
    struct leader leader = {.lanes = lanes, .count = LANES, .roused = &roused, .spin_ns = SPIN_NS, .crowded_ns = 10000, .epoll = epoll};
    while (__atomic_load_n(&finished, __ATOMIC_SEQ_CST) < CLIENTS) {
        leader.looks = answered % 3 > 0;
        leader.since_ns = 0;
        int64_t place = hga_kvd_lead(&leader);
        if (place == LOOK_AGAIN)
            continue;
        check(place >= 0 && place < LANES, "a lane that is not there");
        typeof(all[0]) *lane = &all[place];
        if (place >= CLIENTS) {
            lane->lane.served = read_word(&lane->posted);
        } else {
            check(lane->request == lane->lane.served, "a request of another turn");
            lane->answer = 3 * lane->request;
            lane->lane.served++;
            __atomic_add_fetch(&answered, 1, __ATOMIC_SEQ_CST);
        }
        hga_kvd_publish(&lane->completed, lane->lane.served, &lane->client_awake, lane->bells[1]);
    }
    check(answered == CLIENTS * ROUNDS, "not all were answered");
    for (int i = 0; i < LANES; i++)
        pthread_join(threads[i], NULL);
    puts("sound");
    return 0;
}
