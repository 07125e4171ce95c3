// libnccl.so.2 on a machine without a GPU: ranks are processes that talk through a file in shared memory. Sums are in the order of
// ranks. (crates/collective/tests/fake has another, in one process, whose failures are scripted.)
//
// A rank that died is waited for until somebody aborts, as NCCL does within a machine; with SIMULATED_NCCL_TELLS=1 the
// communicator's state tells, as NCCL does over sockets.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <atomic>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "simulated_gpu.h"

enum { SUCCESS = 0, SYSTEM = 2, INVALID_ARGUMENT = 4, REMOTE = 6, IN_PROGRESS = 7 };
enum { RANKS = 8, PIECE = 256 << 10 };

struct Id { char name[128]; };
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga, min, max;
    const char* net;
    int share;
};

struct Call {
    char kind;  // a all-reduce, s reduce-scatter, g all-gather, r reduce, b broadcast, > send to and < receive from root
    char *from, *to;
    size_t count;
    int type, root;
};

// What a message belongs to: both sides have to mean the same.
struct Meaning {
    uint64_t operation, count;
    int kind, type, root, reserved;
    bool operator==(const Meaning& other) const { return !memcmp(this, &other, sizeof other); }
};

// One way between two ranks.
struct Channel {
    std::atomic<uint64_t> sent, taken;
    Meaning meaning;
    char piece[PIECE];
};

struct Shared {
    std::atomic<int> joined, left;
    Channel channels[RANKS][RANKS];  // from, to
};

struct Comm {
    Shared* shared;
    int file, world, rank, device;
    uint64_t operations = 0;
    std::atomic<int> state{IN_PROGRESS}, running{0};
    std::atomic<bool> aborted{false}, joined{false}, leaving{false}, dead{false};
};

static thread_local int groups;
static thread_local std::vector<Call> calls;
static thread_local Comm* open_comm;
static thread_local Stream* open_stream;

static size_t size_of(int type) {
    switch (type) {
    case 1: return 1;
    case 7: return 4;
    case 8: return 8;
    case 9: return 2;
    }
    die("data type %d", type);
}

// ---- Messages ----

struct Transfer {
    int peer;
    bool sends;
    char* at;
    size_t bytes;
    Meaning meaning;
    size_t done = 0;
    bool over = false;
};

// Whether a rank's process still holds its lock.
static bool lives(Comm* comm, int rank) {
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_start = rank;
    lock.l_len = 1;
    return fcntl(comm->file, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

static bool step(Comm* comm, Transfer& transfer) {
    Channel& channel = transfer.sends ? comm->shared->channels[comm->rank][transfer.peer] : comm->shared->channels[transfer.peer][comm->rank];
    const bool full = channel.sent.load(std::memory_order_acquire) != channel.taken.load(std::memory_order_acquire);
    if (full == transfer.sends) return false;
    const size_t bytes = std::min<size_t>(PIECE, transfer.bytes - transfer.done);
    if (transfer.sends) {
        channel.meaning = transfer.meaning;
        memcpy(channel.piece, transfer.at + transfer.done, bytes);
        channel.sent.fetch_add(1, std::memory_order_release);
    } else {
        const Meaning &a = channel.meaning, &b = transfer.meaning;
        if (!(a == b))
            die("ranks %d and %d do not mean the same: operation %lu, '%c' of %lu of type %d at %d against operation %lu, '%c' of %lu of type %d at %d",
                transfer.peer, comm->rank, a.operation, a.kind, a.count, a.type, a.root, b.operation, b.kind, b.count, b.type, b.root);
        memcpy(transfer.at + transfer.done, channel.piece, bytes);
        channel.taken.fetch_add(1, std::memory_order_release);
    }
    transfer.done += bytes;
    transfer.over = transfer.done == transfer.bytes;
    return true;
}

// All of them at once. False after an abort.
static bool exchange(Comm* comm, std::vector<Transfer>& transfers) {
    static const bool tells = getenv("SIMULATED_NCCL_TELLS");
    for (unsigned idle = 0;;) {
        bool moved = false, over = true;
        for (Transfer& transfer : transfers) {
            if (!transfer.over) moved |= step(comm, transfer);
            over &= transfer.over;
        }
        if (over) return true;
        if (comm->aborted) return false;
        if (moved) idle = 0;
        else if (++idle > 100) {
            usleep(100);
            if (tells && idle % 100 == 0)
                for (int rank = 0; rank < comm->world; rank++)
                    if (rank != comm->rank && !lives(comm, rank)) comm->state = REMOTE;
        }
    }
}

// ---- Operations ----

static float from_bf16(unsigned short half) {
    unsigned bits = (unsigned)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static unsigned short to_bf16(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void add(char* sum, const char* value, size_t count, int type) {
    for (size_t i = 0; i < count; i++) switch (type) {
        case 7: ((float*)sum)[i] += ((const float*)value)[i]; break;
        case 8: ((double*)sum)[i] += ((const double*)value)[i]; break;
        case 9: ((unsigned short*)sum)[i] = to_bf16(from_bf16(((unsigned short*)sum)[i]) + from_bf16(((const unsigned short*)value)[i])); break;
        default: die("a sum of type %d", type);
    }
}

// `sent(to)` is what rank `to` gets from this one, if anything; `received[from]` what comes from rank `from`.
static bool run_collective(Comm* comm, const Call& call, uint64_t operation) {
    const int world = comm->world, rank = comm->rank;
    const size_t bytes = call.count * size_of(call.type);
    const Meaning meaning = {operation, call.count, call.kind, call.type, call.root, 0};
    const bool sums = strchr("asr", call.kind), to_root = call.kind == 'r', from_root = call.kind == 'b';
    auto own_part = [&](int to) { return call.kind == 's' ? call.from + to * bytes : call.from; };
    std::vector<std::vector<char>> received(world);
    std::vector<Transfer> transfers;
    for (int other = 0; other < world; other++) {
        const bool receives = to_root ? rank == call.root : from_root ? other == call.root : true;
        const bool sends = to_root ? other == call.root : from_root ? rank == call.root : true;
        if (receives && bytes) received[other].resize(bytes);
        if (!bytes) continue;
        if (other == rank) {
            if (receives) memcpy(received[other].data(), own_part(rank), bytes);
            continue;
        }
        if (sends) transfers.push_back({other, true, own_part(other), bytes, meaning});
        if (receives) transfers.push_back({other, false, received[other].data(), bytes, meaning});
    }
    if (!exchange(comm, transfers)) return false;
    if (!bytes) return true;
    if (sums) {
        if (to_root && rank != call.root) return true;
        for (int other = 1; other < world; other++) add(received[0].data(), received[other].data(), call.count, call.type);
        memcpy(call.to, received[0].data(), bytes);
    } else if (call.kind == 'g') {
        for (int other = 0; other < world; other++) memcpy(call.to + other * bytes, received[other].data(), bytes);
    } else {
        memcpy(call.to, received[call.root].data(), bytes);
    }
    return true;
}

static void run(Comm* comm, const std::vector<Call>& group, uint64_t first) {
    std::vector<Transfer> moves;
    for (size_t i = 0; i < group.size(); i++) {
        const Call& call = group[i];
        if (call.kind == '>' || call.kind == '<') {
            // Which operation it is differs between ranks; the order between two does not.
            moves.push_back({call.root, call.kind == '>', call.from, call.count * size_of(call.type), {0, call.count, 'p', call.type, 0, 0}});
            moves.back().over = !call.count;
        } else if (!run_collective(comm, call, first + i)) {
            return;
        }
    }
    exchange(comm, moves);
}

// ---- The library ----

EXPORT int ncclGetVersion(int* version) {
    *version = 23007;
    return SUCCESS;
}

EXPORT int ncclGetUniqueId(Id* id) {
    *id = {};
    std::random_device random;
    snprintf(id->name, sizeof id->name, "/dev/shm/simulated-nccl-%08x%08x", random(), random());
    return SUCCESS;
}

EXPORT const char* ncclGetErrorString(int code) {
    switch (code) {
    case SUCCESS: return "no error";
    case SYSTEM: return "unhandled system error";
    case INVALID_ARGUMENT: return "invalid argument";
    case REMOTE: return "remote process exited or there was a network error";
    }
    return "unknown result code";
}

static Comm* alive(Comm* comm, const char* who) {
    if (comm->dead) die("%s of a communicator that is gone", who);
    return comm;
}

EXPORT const char* ncclGetLastError(Comm* comm) { return alive(comm, "ncclGetLastError")->state == REMOTE ? "a rank's process is gone" : ""; }

EXPORT int ncclCommInitRankConfig(Comm** made, int world, Id id, int rank, Config* config) {
    if (simulated_current_device() < 0) die("ncclCommInitRankConfig without a context");
    if (config->size != 48 || config->magic != 0xcafebeef || config->blocking != 0) die("a configuration of another layout");
    if (world < 1 || world > RANKS || rank < 0 || rank >= world || strncmp(id.name, "/dev/shm/simulated-nccl-", 24)) return INVALID_ARGUMENT;
    Comm* comm = new Comm;
    comm->file = open(id.name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (comm->file < 0 || ftruncate(comm->file, sizeof(Shared))) return SYSTEM;
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_start = rank;
    lock.l_len = 1;
    if (fcntl(comm->file, F_OFD_SETLK, &lock)) die("rank %d joins twice", rank);
    comm->shared = (Shared*)mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, comm->file, 0);
    if (comm->shared == MAP_FAILED) return SYSTEM;
    comm->world = world;
    comm->rank = rank;
    comm->device = simulated_current_device();
    // Who comes last takes the name away.
    if (++comm->shared->joined == world) unlink(id.name);
    *made = comm;
    return IN_PROGRESS;
}

EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
    alive(comm, "ncclCommGetAsyncError");
    if (comm->state == IN_PROGRESS) {
        if (comm->leaving) {
            if (comm->shared->left == comm->world) comm->state = SUCCESS;
        } else if (comm->shared->joined == comm->world) {
            comm->joined = true;
            comm->state = SUCCESS;
        }
    }
    *state = comm->state;
    return SUCCESS;
}

// Waits until nothing of it runs, as NCCL waits for its kernels.
static void end(Comm* comm) {
    comm->aborted = true;
    while (comm->running) usleep(100);
    comm->dead = true;
    munmap(comm->shared, sizeof(Shared));
    close(comm->file);
}

EXPORT int ncclCommAbort(Comm* comm) {
    alive(comm, "ncclCommAbort");
    if (groups) die("an abort inside a group");
    end(comm);
    return SUCCESS;
}

EXPORT int ncclCommFinalize(Comm* comm) {
    alive(comm, "ncclCommFinalize");
    while (comm->running) usleep(100);
    comm->leaving = true;
    comm->state = IN_PROGRESS;
    comm->shared->left++;
    return IN_PROGRESS;
}

EXPORT int ncclCommDestroy(Comm* comm) {
    alive(comm, "ncclCommDestroy");
    if (!comm->leaving || comm->state) die("ncclCommDestroy before the end of ncclCommFinalize");
    end(comm);
    return SUCCESS;
}

EXPORT int ncclGroupStart() {
    groups++;
    return SUCCESS;
}

EXPORT int ncclGroupEnd() {
    if (!groups) die("ncclGroupEnd without a start");
    if (--groups || calls.empty()) return SUCCESS;
    Comm* comm = open_comm;
    std::vector<Call> group = std::move(calls);
    calls.clear();
    open_comm = nullptr;
    const uint64_t first = comm->operations;
    comm->operations += group.size();
    comm->running++;
    comm->state = IN_PROGRESS;
    enqueue(open_stream, [comm, group, first] {
        if (!comm->aborted) run(comm, group, first);
        comm->running--;
    });
    return IN_PROGRESS;
}

static int call(char kind, char* from, char* to, size_t count, int type, int root, Comm* comm, Stream* stream) {
    alive(comm, "an operation");
    if (!groups) die("an operation outside a group");
    if (comm->state) die("an operation while the communicator is in state %d", comm->state.load());
    if (open_comm && (open_comm != comm || open_stream != stream)) die("a group over two communicators or streams");
    const size_t bytes = count * size_of(type), world = comm->world;
    if (kind == 's' && to != from + comm->rank * bytes) die("a reduce-scatter that is not in place");
    if (kind == 'g' && from != to + comm->rank * bytes) die("an all-gather that is not in place");
    if (bytes) {
        simulated_check_memory((uint64_t)from, kind == 's' ? bytes * world : bytes, "what a collective reads");
        simulated_check_memory((uint64_t)to, kind == 'g' ? bytes * world : bytes, "what a collective writes");
    }
    open_comm = comm;
    open_stream = stream;
    calls.push_back({kind, from, to, count, type, root});
    return SUCCESS;
}

EXPORT int ncclAllReduce(char* from, char* to, size_t count, int type, int op, Comm* comm, Stream* stream) {
    return op ? INVALID_ARGUMENT : call('a', from, to, count, type, 0, comm, stream);
}
EXPORT int ncclReduceScatter(char* from, char* to, size_t count, int type, int op, Comm* comm, Stream* stream) {
    return op ? INVALID_ARGUMENT : call('s', from, to, count, type, 0, comm, stream);
}
EXPORT int ncclAllGather(char* from, char* to, size_t count, int type, Comm* comm, Stream* stream) {
    return call('g', from, to, count, type, 0, comm, stream);
}
EXPORT int ncclReduce(char* from, char* to, size_t count, int type, int op, int root, Comm* comm, Stream* stream) {
    return op ? INVALID_ARGUMENT : call('r', from, to, count, type, root, comm, stream);
}
EXPORT int ncclBroadcast(char* from, char* to, size_t count, int type, int root, Comm* comm, Stream* stream) {
    return call('b', from, to, count, type, root, comm, stream);
}
EXPORT int ncclSend(char* from, size_t count, int type, int peer, Comm* comm, Stream* stream) {
    return call('>', from, from, count, type, peer, comm, stream);
}
EXPORT int ncclRecv(char* to, size_t count, int type, int peer, Comm* comm, Stream* stream) {
    return call('<', to, to, count, type, peer, comm, stream);
}
