/* A stand-in for libnccl.so.2 and libcuda.so.1 that runs on the memory of the host, so that everything around a device can be
 * tested without one: ranks are threads of one process, a stream is a queue, and queues advance whenever somebody asks.
 *
 * What it does is scripted by the bytes of the unique id, "key=value;..." :
 *   name=X         where the log goes: LOG_DIR/X.<rank>
 *   only=R         the rest applies to rank R alone
 *   init=E         ncclCommInitRankConfig answers E           init_late=E   the error comes while connecting
 *   init_hang=1    the ranks never find each other
 *   call=E@K       the first call of operation K answers E    end=E@K       ncclGroupEnd of operation K answers E
 *   late=E@K       the error comes after ncclGroupEnd         async=E@K     the error comes on the device
 *   hang=K         operation K never ends on the device       hold=1        not even after an abort
 *   slow=N         every group is put on the stream only after N looks at the communicator
 *   stuck=MS@K     ncclGroupEnd of operation K blocks         abort=E       ncclCommAbort answers E
 *   leave_hang=1   ncclCommFinalize never ends                say=TEXT      the last error
 * K counts operations from 0. Misuse that a real library would answer with undefined behaviour ends the process.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 23007
#endif
#ifndef LOG_DIR
#define LOG_DIR "."
#endif

enum { RANKS = 8, OPERATIONS = 4096, CALLS = 16 };
enum { IN_PROGRESS = 7, NOT_READY = 600, NO_CONTEXT = 201 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "fake library: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    abort();
}

/* ---- device memory, streams and events ---- */

typedef struct Memory {
    char *at;
    size_t bytes;
    struct Memory *next;
} Memory;

typedef struct Stream Stream;
typedef struct Comm Comm;

typedef struct {
    Stream *stream;
    uint64_t recorded, happened;
    bool destroyed;
} Event;

typedef struct {
    char kind; /* a all-reduce, s reduce-scatter, g all-gather, r reduce, b broadcast, > send to and < receive from root */
    char *from, *to;
    size_t count;
    int type, root;
} Call;

typedef struct Entry {
    enum { MARK, WAIT, OPERATION } kind;
    Event *event;
    uint64_t turn;
    Comm *comm;
    int index, calls;
    Call call[CALLS];
    bool arrived;
    struct Entry *next;
} Entry;

struct Stream {
    Entry *head, **tail;
    Stream *next;
};

typedef struct Group {
    char id[128];
    int world, joined, left;
    Entry *entry[OPERATIONS][RANKS];
    int arrived[OPERATIONS];
    bool done[OPERATIONS];
    struct Group *next;
} Group;

struct Comm {
    Group *group;
    int rank, state, looks, operations;
    bool dead, aborted, leaving, joined;
    Entry *soon;
    Stream *on;
    char script[129];
    FILE *log;
};

static Memory *memories;
static Stream *streams;
static Group *groups;
static __thread int contexts, open_groups;
static __thread Entry *open_entry;
static __thread Stream *open_stream;

static size_t size_of(int type) {
    switch (type) {
    case 1: return 1;
    case 7: return 4;
    case 8: return 8;
    case 9: return 2;
    }
    die("data type %d", type);
    return 0;
}

static Memory *memory_of(const char *at, size_t bytes) {
    for (Memory *memory = memories; memory; memory = memory->next)
        if (at >= memory->at && at + bytes <= memory->at + memory->bytes) return memory;
    die("%zu bytes at %p are no device memory", bytes, (void *)at);
    return NULL;
}

static void tell(Comm *comm, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(comm->log, format, arguments);
    fputc('\n', comm->log);
    fflush(comm->log);
}

/* ---- the script ---- */

static const char *find(Comm *comm, const char *key) {
    size_t length = strlen(key);
    for (const char *at = comm->script; at && *at; at = strchr(at, ';') ? strchr(at, ';') + 1 : NULL)
        if (!strncmp(at, key, length) && at[length] == '=') return at + length + 1;
    return NULL;
}

static bool meant(Comm *comm) {
    const char *only = find(comm, "only");
    return !only || atoi(only) == comm->rank;
}

static int number(Comm *comm, const char *key) {
    const char *value = find(comm, key);
    return value && meant(comm) ? atoi(value) : 0;
}

static int number_at(Comm *comm, const char *key, int operation) {
    const char *value = find(comm, key);
    const char *at = value ? strchr(value, '@') : NULL;
    return at && meant(comm) && atoi(at + 1) == operation ? atoi(value) : 0;
}

static bool hangs(Comm *comm, int operation) {
    const char *value = find(comm, "hang");
    return value && meant(comm) && atoi(value) == operation;
}

/* ---- operations ---- */

static void add(char *sum, const char *value, size_t count, int type) {
    for (size_t i = 0; i < count; i++) {
        if (type == 7) ((float *)sum)[i] += ((const float *)value)[i];
        else if (type == 8) ((double *)sum)[i] += ((const double *)value)[i];
        else die("a sum of type %d", type);
    }
}

static bool moves(const Call *call) { return call->kind == '>' || call->kind == '<'; }

/* What rank `to` receives from rank `from` in this operation. */
static Call *receiver(Entry *to, int from) {
    for (int i = 0; i < to->calls; i++)
        if (to->call[i].kind == '<' && to->call[i].root == from) return &to->call[i];
    return NULL;
}

/* Whether every element that is sent is received. */
static bool paired(Entry **entry, int world) {
    int sent = 0, received = 0;
    for (int rank = 0; rank < world; rank++)
        for (int i = 0; i < entry[rank]->calls; i++) {
            Call *call = &entry[rank]->call[i];
            if (!moves(call)) return false;
            if (call->kind == '<') {
                received++;
                continue;
            }
            Call *there = receiver(entry[call->root], rank);
            if (!there || there->count != call->count || there->type != call->type) return false;
            sent++;
        }
    return sent == received;
}

static bool same(Entry **entry, int world) {
    if (moves(&entry[0]->call[0])) return paired(entry, world);
    for (int rank = 1; rank < world; rank++) {
        if (entry[rank]->calls != entry[0]->calls) return false;
        for (int i = 0; i < entry[0]->calls; i++) {
            Call *one = &entry[0]->call[i], *other = &entry[rank]->call[i];
            if (one->kind != other->kind || one->count != other->count || one->type != other->type ||
                one->root != other->root)
                return false;
        }
    }
    return true;
}

/* Sums in the order of ranks of `count` elements from `skip` on. */
static char *sum(Entry **entry, int world, int i, size_t skip, size_t count, int type) {
    size_t size = size_of(type);
    char *result = malloc(count * size + 1);
    memcpy(result, entry[0]->call[i].from + skip * size, count * size);
    for (int rank = 1; rank < world; rank++) add(result, entry[rank]->call[i].from + skip * size, count, type);
    return result;
}

static void execute(Entry **entry, int world) {
    if (moves(&entry[0]->call[0])) {
        /* What is sent is not received into: the order does not show. */
        for (int rank = 0; rank < world; rank++)
            for (int i = 0; i < entry[rank]->calls; i++) {
                Call *call = &entry[rank]->call[i];
                if (call->kind == '>')
                    memcpy(receiver(entry[call->root], rank)->to, call->from, call->count * size_of(call->type));
            }
        return;
    }
    for (int i = 0; i < entry[0]->calls; i++) {
        Call *call = &entry[0]->call[i];
        size_t bytes = call->count * size_of(call->type);
        char *result[RANKS];
        switch (call->kind) {
        case 'a':
            result[0] = sum(entry, world, i, 0, call->count, call->type);
            for (int rank = 0; rank < world; rank++) memcpy(entry[rank]->call[i].to, result[0], bytes);
            free(result[0]);
            break;
        case 'r':
            result[0] = sum(entry, world, i, 0, call->count, call->type);
            memcpy(entry[call->root]->call[i].to, result[0], bytes);
            free(result[0]);
            break;
        case 's':
            for (int rank = 0; rank < world; rank++)
                result[rank] = sum(entry, world, i, rank * call->count, call->count, call->type);
            for (int rank = 0; rank < world; rank++) {
                memcpy(entry[rank]->call[i].to, result[rank], bytes);
                free(result[rank]);
            }
            break;
        case 'g':
            for (int to = 0; to < world; to++)
                for (int from = 0; from < world; from++)
                    memmove(entry[to]->call[i].to + from * bytes, entry[from]->call[i].from, bytes);
            break;
        case 'b':
            for (int rank = 0; rank < world; rank++)
                memmove(entry[rank]->call[i].to, entry[call->root]->call[i].from, bytes);
            break;
        }
    }
}

/* Whether an operation at the head of its stream is over. */
static bool is_over(Entry *entry) {
    Comm *comm = entry->comm;
    Group *group = comm->group;
    if (comm->aborted) return !number(comm, "hold");
    if (hangs(comm, entry->index)) return false;
    int error = number_at(comm, "async", entry->index);
    if (error) {
        comm->state = error;
        return false;
    }
    if (!entry->arrived) {
        entry->arrived = true;
        group->entry[entry->index][comm->rank] = entry;
        if (++group->arrived[entry->index] == group->world && same(group->entry[entry->index], group->world)) {
            execute(group->entry[entry->index], group->world);
            group->done[entry->index] = true;
        }
    }
    return group->done[entry->index];
}

static void advance(Stream *stream) {
    while (stream && stream->head) {
        Entry *entry = stream->head;
        if (entry->kind == MARK) entry->event->happened = entry->turn;
        else if (entry->kind == WAIT) {
            if (entry->event->stream != stream) advance(entry->event->stream);
            if (entry->event->happened < entry->turn) return;
        } else if (!is_over(entry)) return;
        stream->head = entry->next;
        if (!stream->head) stream->tail = &stream->head;
    }
}

static void put(Stream *stream, Entry *entry) {
    entry->next = NULL;
    *stream->tail = entry;
    stream->tail = &entry->next;
}

/* ---- NCCL ---- */

typedef struct {
    char internal[128];
} Id;

typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cga, min, max;
    const char *net;
    int share;
} Config;

int ncclGetVersion(int *version) {
    *version = VERSION;
    return 0;
}

int ncclGetUniqueId(Id *id) {
    static int made;
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&lock);
    snprintf(id->internal, sizeof id->internal, "name=made-%d-%d", (int)getpid(), made++);
    pthread_mutex_unlock(&lock);
    return 0;
}

const char *ncclGetErrorString(int code) {
    switch (code) {
    case 0: return "no error";
    case 2: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case 5: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case 6: return "remote process exited or there was a network error";
    }
    return "unknown result code";
}

static Comm *alive(Comm *comm, const char *who) {
    if (comm->dead) die("%s of a communicator that is gone", who);
    return comm;
}

const char *ncclGetLastError(Comm *comm) {
    static __thread char words[129];
    const char *say = find(alive(comm, "ncclGetLastError"), "say");
    snprintf(words, sizeof words, "%.*s", say ? (int)strcspn(say, ";") : 0, say ? say : "");
    return words;
}

int ncclCommInitRankConfig(Comm **made, int world, Id id, int rank, Config *config) {
    if (!contexts) die("ncclCommInitRankConfig without a context");
    if (config->size != 48 || config->magic != 0xcafebeef || config->version != 21800 || config->blocking != 0)
        die("a configuration of another layout");
    if (world > RANKS || rank < 0 || rank >= world) return 4;
    pthread_mutex_lock(&lock);
    Comm *comm = calloc(1, sizeof *comm);
    memcpy(comm->script, id.internal, 128);
    Group *group = groups;
    while (group && memcmp(group->id, id.internal, 128)) group = group->next;
    if (!group) {
        group = calloc(1, sizeof *group);
        memcpy(group->id, id.internal, 128);
        group->world = world;
        group->next = groups;
        groups = group;
    }
    comm->group = group;
    comm->rank = rank;
    char path[512];
    const char *name = find(comm, "name");
    if (!name) die("an id without a name");
    snprintf(path, sizeof path, "%s/%.*s.%d", LOG_DIR, (int)strcspn(name, ";"), name, rank);
    comm->log = fopen(path, "w");
    if (!comm->log) die("no log at %s", path);
    tell(comm, "init");
    comm->state = IN_PROGRESS;
    int error = number(comm, "init");
    if (!error) *made = comm;
    pthread_mutex_unlock(&lock);
    return error ? error : IN_PROGRESS;
}

/* What a communicator does in the background, whenever it is looked at. */
static void work(Comm *comm) {
    Group *group = comm->group;
    if (!comm->joined) {
        int error = number(comm, "init_late");
        if (error) comm->state = error;
        else if (!number(comm, "init_hang")) {
            comm->joined = true;
            group->joined++;
        }
        return;
    }
    if (comm->state != IN_PROGRESS) return;
    if (comm->leaving) {
        if (group->left == group->world && !number(comm, "leave_hang")) comm->state = 0;
    } else if (group->joined < group->world) {
        return;
    } else if (comm->looks > 0) {
        comm->looks--;
    } else {
        comm->state = 0;
        if (comm->soon) {
            int error = number_at(comm, "late", comm->soon->index);
            if (error) comm->state = error;
            else put(comm->on, comm->soon);
            comm->soon = NULL;
        }
    }
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    pthread_mutex_lock(&lock);
    alive(comm, "ncclCommGetAsyncError");
    work(comm);
    advance(comm->on);
    *state = comm->state;
    pthread_mutex_unlock(&lock);
    return 0;
}

#ifndef WITHOUT_ABORT
int ncclCommAbort(Comm *comm) {
    pthread_mutex_lock(&lock);
    alive(comm, "ncclCommAbort");
    if (open_groups) die("an abort inside a group");
    tell(comm, "abort");
    comm->aborted = comm->dead = true;
    int answer = number(comm, "abort");
    pthread_mutex_unlock(&lock);
    return answer;
}
#endif

int ncclCommFinalize(Comm *comm) {
    pthread_mutex_lock(&lock);
    alive(comm, "ncclCommFinalize");
    tell(comm, "finalize");
    comm->leaving = true;
    comm->group->left++;
    comm->state = IN_PROGRESS;
    pthread_mutex_unlock(&lock);
    return IN_PROGRESS;
}

int ncclCommDestroy(Comm *comm) {
    pthread_mutex_lock(&lock);
    alive(comm, "ncclCommDestroy");
    if (!comm->leaving || comm->state) die("ncclCommDestroy before the end of ncclCommFinalize");
    tell(comm, "destroy");
    comm->dead = true;
    pthread_mutex_unlock(&lock);
    return 0;
}

int ncclGroupStart(void) {
    open_groups++;
    return 0;
}

int ncclGroupEnd(void) {
    if (!open_groups) die("ncclGroupEnd without a start");
    open_groups--;
    Entry *entry = open_entry;
    open_entry = NULL;
    if (!entry) return 0;
    Comm *comm = entry->comm;
    int blocked = number_at(comm, "stuck", entry->index);
    if (blocked) usleep(blocked * 1000);
    pthread_mutex_lock(&lock);
    int error = number_at(comm, "end", entry->index);
    if (!error) {
        comm->state = IN_PROGRESS;
        comm->looks = number(comm, "slow");
        comm->on = open_stream;
        comm->soon = entry;
    }
    pthread_mutex_unlock(&lock);
    return error ? error : IN_PROGRESS;
}

static int call(char kind, char *from, char *to, size_t count, int type, int root, Comm *comm, Stream *stream) {
    pthread_mutex_lock(&lock);
    alive(comm, "an operation");
    if (!open_groups) die("an operation outside a group");
    if (comm->state) die("an operation while the communicator is in state %d", comm->state);
    if (!open_entry) {
        open_entry = calloc(1, sizeof *open_entry);
        open_entry->kind = OPERATION;
        open_entry->comm = comm;
        open_entry->index = comm->operations++;
        open_stream = stream;
        if (open_entry->index >= OPERATIONS) die("too many operations");
    }
    if (open_entry->calls >= CALLS) die("too many calls in a group");
    size_t bytes = count * size_of(type), world = comm->group->world;
    memory_of(from, kind == 's' ? bytes * world : bytes);
    memory_of(to, kind == 'g' ? bytes * world : bytes);
    if (kind == 's' && to != from + comm->rank * bytes) die("a reduce-scatter that is not in place");
    if (kind == 'g' && from != to + comm->rank * bytes) die("an all-gather that is not in place");
    tell(comm, "operation %d: %c of %zu, type %d, root %d", open_entry->index, kind, count, type, root);
    open_entry->call[open_entry->calls++] = (Call){kind, from, to, count, type, root};
    int error = number_at(comm, "call", open_entry->index);
    pthread_mutex_unlock(&lock);
    return error;
}

int ncclAllReduce(char *from, char *to, size_t count, int type, int op, Comm *comm, Stream *stream) {
    return op ? 4 : call('a', from, to, count, type, 0, comm, stream);
}

int ncclReduceScatter(char *from, char *to, size_t count, int type, int op, Comm *comm, Stream *stream) {
    return op ? 4 : call('s', from, to, count, type, 0, comm, stream);
}

int ncclAllGather(char *from, char *to, size_t count, int type, Comm *comm, Stream *stream) {
    return call('g', from, to, count, type, 0, comm, stream);
}

int ncclReduce(char *from, char *to, size_t count, int type, int op, int root, Comm *comm, Stream *stream) {
    return op ? 4 : call('r', from, to, count, type, root, comm, stream);
}

int ncclBroadcast(char *from, char *to, size_t count, int type, int root, Comm *comm, Stream *stream) {
    return call('b', from, to, count, type, root, comm, stream);
}

int ncclSend(char *from, size_t count, int type, int peer, Comm *comm, Stream *stream) {
    return call('>', from, from, count, type, peer, comm, stream);
}

int ncclRecv(char *to, size_t count, int type, int peer, Comm *comm, Stream *stream) {
    return call('<', to, to, count, type, peer, comm, stream);
}

/* ---- the CUDA driver ---- */

int cuInit(unsigned flags) { return flags ? 1 : 0; }

int cuDeviceGetCount(int *count) {
    *count = RANKS;
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < RANKS ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    static char of[RANKS];
    *context = &of[device];
    return 0;
}

int cuCtxPushCurrent_v2(void *context) {
    if (!context) return NO_CONTEXT;
    contexts++;
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = NULL;
    if (!contexts) die("no context to leave");
    contexts--;
    return 0;
}

int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return contexts ? 0 : NO_CONTEXT;
}

int cuStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) {
    if (!contexts) return NO_CONTEXT;
    if (flags != 1 || priority != -5) die("a stream of flags %u, priority %d", flags, priority);
    *stream = calloc(1, sizeof **stream);
    (*stream)->tail = &(*stream)->head;
    pthread_mutex_lock(&lock);
    (*stream)->next = streams;
    streams = *stream;
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuStreamDestroy_v2(Stream *stream) {
    (void)stream;
    return contexts ? 0 : NO_CONTEXT;
}

int cuEventCreate(Event **event, unsigned flags) {
    if (!contexts) return NO_CONTEXT;
    if (flags != 2) die("an event with a clock");
    *event = calloc(1, sizeof **event);
    return 0;
}

int cuEventDestroy_v2(Event *event) {
    if (event->destroyed) die("an event is destroyed twice");
    event->destroyed = true;
    return contexts ? 0 : NO_CONTEXT;
}

int cuEventRecord(Event *event, Stream *stream) {
    if (event->destroyed) die("a destroyed event is recorded");
    pthread_mutex_lock(&lock);
    Entry *entry = calloc(1, sizeof *entry);
    entry->kind = MARK;
    entry->event = event;
    entry->turn = ++event->recorded;
    event->stream = stream;
    put(stream, entry);
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuEventQuery(Event *event) {
    if (event->destroyed) die("a destroyed event is asked");
    pthread_mutex_lock(&lock);
    advance(event->stream);
    bool happened = event->happened == event->recorded;
    pthread_mutex_unlock(&lock);
    return happened ? 0 : NOT_READY;
}

int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    if (event->destroyed || flags) die("a wait for a destroyed event, or with flags");
    pthread_mutex_lock(&lock);
    Entry *entry = calloc(1, sizeof *entry);
    entry->kind = WAIT;
    entry->event = event;
    entry->turn = event->recorded;
    put(stream, entry);
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuStreamSynchronize(Stream *stream) {
    for (;;) {
        pthread_mutex_lock(&lock);
        advance(stream);
        bool empty = !stream->head;
        pthread_mutex_unlock(&lock);
        if (empty) return 0;
        usleep(100);
    }
}

int cuMemAlloc_v2(char **at, size_t bytes) {
    if (!contexts) return NO_CONTEXT;
    if (!bytes) return 1;
    if (bytes > (size_t)1 << 40) return 2;
    Memory *memory = calloc(1, sizeof *memory);
    /* Aligned as cuMemAlloc aligns. */
    if (posix_memalign((void **)&memory->at, 256, bytes)) return 2;
    memory->bytes = bytes;
    pthread_mutex_lock(&lock);
    memory->next = memories;
    memories = memory;
    pthread_mutex_unlock(&lock);
    *at = memory->at;
    return 0;
}

int cuMemFree_v2(char *at) {
    if (!contexts) return NO_CONTEXT;
    pthread_mutex_lock(&lock);
    Memory **link = &memories;
    while (*link && (*link)->at != at) link = &(*link)->next;
    if (!*link) die("what is freed was not allocated");
    Memory *memory = *link;
    for (Stream *stream = streams; stream; stream = stream->next)
        for (Entry *entry = stream->head; entry; entry = entry->next)
            for (int i = 0; i < entry->calls; i++)
                if (entry->call[i].from >= at && entry->call[i].from < at + memory->bytes)
                    die("memory is freed that the device still uses");
    *link = memory->next;
    free(memory->at);
    free(memory);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Copies wait for what is on the stream, as those of memory that is not pinned may. */
int cuMemcpyHtoDAsync_v2(char *to, const char *from, size_t bytes, Stream *stream) {
    if (!contexts) return NO_CONTEXT;
    cuStreamSynchronize(stream);
    pthread_mutex_lock(&lock);
    memory_of(to, bytes);
    pthread_mutex_unlock(&lock);
    memcpy(to, from, bytes);
    return 0;
}

int cuMemcpyDtoHAsync_v2(char *to, const char *from, size_t bytes, Stream *stream) {
    if (!contexts) return NO_CONTEXT;
    cuStreamSynchronize(stream);
    pthread_mutex_lock(&lock);
    memory_of(from, bytes);
    pthread_mutex_unlock(&lock);
    memcpy(to, from, bytes);
    return 0;
}

int cuGetErrorString(int code, const char **string) {
    *string = code == 2 ? "out of memory" : code == 101 ? "invalid device ordinal" : code == NO_CONTEXT ? "invalid device context" : NULL;
    return *string ? 0 : 1;
}
